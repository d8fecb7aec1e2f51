// threads.c - the pool of worker threads of this module, shared by all its batches; which kernels they run.
//
// A call takes the pool for as long as it runs. set_num_threads puts a new one in its place; the old one ends with
// its last call.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "error.h"

#include <sched.h> // sched_getaffinity
#include <stdlib.h>

static int32_t cores_of_process(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

// NULL with an exception set.
static core_pool *pool_create(core_state *state, int32_t count) {
  core_pool *pool = malloc(sizeof *pool);
  if (!pool) {
    PyErr_NoMemory();
    return NULL;
  }
  ms_error err;
  *pool = (core_pool){.users = 1};
  if (ms_threads_create(count, &pool->threads, &err) == MS_OK) return pool;
  free(pool);
  core_raise(state, &err);
  return NULL;
}

void core_pool_give_back(core_state *state, core_pool *pool) {
  if (!pool) return;
  pthread_mutex_lock(&state->lock);
  bool last = --pool->users == 0;
  pthread_mutex_unlock(&state->lock);
  if (!last) return;
  PyThreadState *gil = PyEval_SaveThread();
  ms_threads_free(pool->threads);
  PyEval_RestoreThread(gil);
  free(pool);
}

// Put `pool` (NULL: nothing) in the place of the current one.
static void pool_replace(core_state *state, core_pool *pool) {
  pthread_mutex_lock(&state->lock);
  core_pool *old = state->pool;
  state->pool = pool;
  if (pool) state->threads = ms_threads_count(pool->threads);
  pthread_mutex_unlock(&state->lock);
  core_pool_give_back(state, old);
}

static core_pool *pool_current(core_state *state) {
  pthread_mutex_lock(&state->lock);
  core_pool *pool = state->pool;
  if (pool) pool->users++;
  pthread_mutex_unlock(&state->lock);
  return pool;
}

core_pool *core_pool_take(core_state *state) {
  core_pool *pool = pool_current(state);
  if (pool) return pool;
  if (!(pool = pool_create(state, state->threads))) return NULL;
  pool->users++; // of the state, and of the caller
  pool_replace(state, pool);
  return pool;
}

void core_pool_drop(core_state *state) { pool_replace(state, NULL); }

PyDoc_STRVAR(
    isa_doc,
    "isa($module, /)\n--\n\n"
    "The instruction set that the kernels of this process use: 'avx512bf16', 'avx512', 'avx2' or "
    "'generic'.\n\n"
    "The best one of this CPU, or what the environment variable MOESHARD_ISA says.\n\n"
    "Raises:\n"
    "    ArgumentError: MOESHARD_ISA names one that does not exist or that this CPU lacks.\n");

static PyObject *isa(PyObject *module, PyObject *unused) {
  (void)unused;
  const char *name = NULL;
  ms_error err;
  if (ms_isa(&name, &err) != MS_OK) return core_raise(PyModule_GetState(module), &err);
  return PyUnicode_FromString(name);
}

PyDoc_STRVAR(isa_available_doc,
             "isa_available($module, /)\n--\n\n"
             "The instruction sets that this CPU can run, best first: a tuple of str.\n");

static PyObject *isa_available(PyObject *module, PyObject *unused) {
  (void)module, (void)unused;
  const char *const *names = ms_isa_available();
  Py_ssize_t count = 0;
  while (names[count]) count++;
  PyObject *tuple = PyTuple_New(count);
  for (Py_ssize_t i = 0; tuple && i < count; i++) {
    PyObject *name = PyUnicode_FromString(names[i]);
    if (!name || PyTuple_SetItem(tuple, i, name)) Py_CLEAR(tuple);
  }
  return tuple;
}

PyDoc_STRVAR(set_doc,
             "set_num_threads($module, count, /)\n--\n\n"
             "Set the number of threads that compute, the calling one included. Results do not "
             "depend on it.\n\n"
             "Calls that are running in other Python threads keep the threads they began with.\n\n"
             "Args:\n"
             "    count: 1 to 4096; 1 starts no thread.\n\n"
             "Raises:\n"
             "    ArgumentError: another number.\n");

static PyObject *set_num_threads(PyObject *module, PyObject *number) {
  core_state *state = PyModule_GetState(module);
  long long asked = PyLong_AsLongLong(number);
  if (asked == -1 && PyErr_Occurred()) return NULL;
  int32_t count;
  if (!core_int32(state, "threads", asked, &count)) return NULL;
  core_pool *pool = pool_create(state, count);
  if (!pool) return NULL;
  pool_replace(state, pool);
  Py_RETURN_NONE;
}

PyDoc_STRVAR(
    get_doc,
    "get_num_threads($module, /)\n--\n\n"
    "The number of threads that compute; at first, the cores that this process may use.\n");

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
  (void)unused;
  return PyLong_FromLong(((core_state *)PyModule_GetState(module))->threads);
}

PyDoc_STRVAR(
    measure_doc,
    "measure_machine($module, seconds=0.2, /)\n--\n\n"
    "What this machine can do at most with the current threads: what measured times are held "
    "against.\n\n"
    "Args:\n"
    "    seconds: how long to measure; at least 0.1 s are used, and 256 MiB of memory.\n\n"
    "Returns:\n"
    "    (flops, dot_flops, bytes), each per second: fp32 multiply-adds in registers, bf16 dot "
    "products (0 without the\n"
    "    instruction), reads from memory.\n\n"
    "Raises:\n"
    "    ArgumentError: seconds outside 0 to 60.\n");

static PyObject *measure_machine(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  double seconds = 0.2;
  if (!PyArg_ParseTuple(args, "|d:measure_machine", &seconds)) return NULL;
  core_pool *pool = core_pool_take(state);
  if (!pool) return NULL;
  ms_machine machine;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_machine_measure(pool->threads, seconds, &machine, &err);
  PyEval_RestoreThread(gil);
  core_pool_give_back(state, pool);
  if (status != MS_OK) return core_raise(state, &err);
  return Py_BuildValue("ddd", machine.flops, machine.dot_flops, machine.bytes);
}

static PyMethodDef functions[] = {{"isa", isa, METH_NOARGS, isa_doc},
                                  {"isa_available", isa_available, METH_NOARGS, isa_available_doc},
                                  {"set_num_threads", set_num_threads, METH_O, set_doc},
                                  {"get_num_threads", get_num_threads, METH_NOARGS, get_doc},
                                  {"measure_machine", measure_machine, METH_VARARGS, measure_doc},
                                  {0}};

int core_add_threads(PyObject *module, core_state *state) {
  state->threads = cores_of_process();
  return PyModule_AddFunctions(module, functions);
}
