// exchange.c - NcclExchange: what carries messages between CUDA devices, for Python.
//
// It has no close: an Engine keeps a reference to it, and the last reference lets the other ranks go.
//
// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"
#include "../../csrc/python/error.h"
#include "../exchange/nccl.h"

static cuda_exchange_object *as_exchange(PyObject *self) { return (cuda_exchange_object *)self; }

// Waits look here about every 50 ms, without the GIL: has a signal come (Ctrl-C) whose handler raises?
// The exception stays set in this thread, and core_raise finds it.
static int poll_signals(void *unused) {
  (void)unused;
  PyGILState_STATE gil = PyGILState_Ensure();
  int stop = PyErr_CheckSignals();
  PyGILState_Release(gil);
  return stop;
}

// ---- where NCCL may be ----------------------------------------------------------------------------

// A sequence of str as a list of C strings that ends with NULL; `owners` keeps the bytes. NULL with an exception set.
static const char **take_paths(PyObject *sequence, PyObject **owners) {
  const char **paths = NULL;
  if (!(*owners = PySequence_List(sequence))) return NULL;
  Py_ssize_t count = PyList_Size(*owners);
  if (!(paths = PyMem_Calloc((size_t)count + 1, sizeof *paths))) {
    PyErr_NoMemory();
    goto failed;
  }
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *bytes = NULL;
    if (!PyUnicode_FSConverter(PyList_GetItem(*owners, i), &bytes)) goto failed;
    paths[i] = PyBytes_AsString(bytes); // no '\0' inside: the converter refuses
    if (PyList_SetItem(*owners, i, bytes)) goto failed;
  }
  return paths;
failed:
  PyMem_Free(paths);
  Py_CLEAR(*owners);
  return NULL;
}

PyDoc_STRVAR(
    unique_id_doc,
    "nccl_unique_id($module, /, search_paths)\n--\n\n"
    "A name for a new group of ranks: rank 0 makes it, all give it to NcclExchange. Used once.\n\n"
    "Args:\n"
    "    search_paths: files to look for NCCL in, after MOESHARD_NCCL and the copy that the "
    "process has "
    "already, before the system's.\n\n"
    "Returns:\n"
    "    128 bytes.\n\n"
    "Raises:\n"
    "    CommError: no usable NCCL; says where it was looked for.\n");

static PyObject *unique_id(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"search_paths", NULL};
  PyObject *sequence = NULL, *owners = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:nccl_unique_id", names, &sequence)) return NULL;
  const char **paths = take_paths(sequence, &owners);
  if (!paths) return NULL;
  char id[MS_NCCL_ID_BYTES];
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_nccl_unique_id(paths, id, &err);
  PyEval_RestoreThread(gil);
  PyMem_Free(paths);
  Py_DECREF(owners);
  if (status != MS_OK) return core_raise(PyModule_GetState(module), &err);
  return PyBytes_FromStringAndSize(id, sizeof id);
}

// ---- the type -------------------------------------------------------------------------------------

PyDoc_STRVAR(type_doc,
             "NcclExchange(unique_id, rank, ranks, device, timeout, search_paths)\n--\n\n"
             "The ranks of a group, one CUDA device each, through NCCL. Collective: returns when "
             "all are there.\n\n"
             "Every collective is watched: when a rank is lost, or late by more than the timeout, "
             "the communicator is "
             "aborted, so\nthat nothing waits on the device for ever, and every later call raises. "
             "What a forward that "
             "had returned by then\nwrites is undefined. Not to be used in a child after fork.\n\n"
             "Args:\n"
             "    unique_id: what nccl_unique_id returned on rank 0.\n"
             "    rank: this rank, 0 to ranks-1.\n"
             "    ranks: number of ranks R.\n"
             "    device: the number of this rank's CUDA device.\n"
             "    timeout: seconds that a rank may be late, here and in every later call.\n"
             "    search_paths: as nccl_unique_id.\n\n"
             "Raises:\n"
             "    ArgumentError: a rank, number of ranks, id or timeout that cannot be.\n"
             "    CommError: no usable NCCL, or its error by name.\n"
             "    CudaError: the device cannot be used.\n"
             "    CommTimeout: not all ranks came.\n");

static PyObject *nccl_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"unique_id", "rank", "ranks", "device", "timeout", "search_paths", NULL};
  core_state *state = PyType_GetModuleState(type);
  const char *id = NULL;
  Py_ssize_t bytes = 0;
  int rank, ranks, device;
  double timeout;
  PyObject *sequence = NULL, *owners = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#iiidO:NcclExchange", names, &id, &bytes, &rank,
                                   &ranks, &device, &timeout, &sequence))
    return NULL;
  if (bytes != MS_NCCL_ID_BYTES)
    return core_fail(state, MS_EINVAL, "unique_id: expected %d bytes, got %zd", MS_NCCL_ID_BYTES,
                     bytes);
  const char **paths = take_paths(sequence, &owners);
  if (!paths) return NULL;
  ms_cuda_exchange *exchange = NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_exchange_nccl(paths, id, rank, ranks, device, timeout, poll_signals,
                                           NULL, &exchange, &err);
  PyEval_RestoreThread(gil);
  PyMem_Free(paths);
  Py_DECREF(owners);
  if (status != MS_OK) return core_raise(state, &err);
  cuda_exchange_object *self =
      PyErr_Occurred() ? NULL : (cuda_exchange_object *)PyType_GenericAlloc(type, 0);
  if (self)
    self->exchange = exchange;
  else
    exchange->free(exchange);
  return (PyObject *)self;
}

static void nccl_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  ms_cuda_exchange *exchange = as_exchange(self)->exchange;
  if (exchange) { // waits some seconds at most for ranks in a last collective
    PyThreadState *gil = PyEval_SaveThread();
    exchange->free(exchange);
    PyEval_RestoreThread(gil);
  }
  PyObject_Free(self);
  Py_DECREF(type);
}

PyDoc_STRVAR(check_doc, "check($self, /)\n--\n\n"
                        "Raise what has gone wrong so far, if anything. Waits for nothing.\n\n"
                        "Raises:\n"
                        "    RankLost, CommTimeout, CommError: as the next call would.\n");

static PyObject *nccl_check(PyObject *self, PyObject *unused) {
  (void)unused;
  ms_cuda_exchange *exchange = as_exchange(self)->exchange;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = exchange->check(exchange, &err);
  PyEval_RestoreThread(gil);
  return core_none(core_state_of(self), status, &err);
}

PyDoc_STRVAR(abort_doc, "abort($self, reason, /)\n--\n\n"
                        "End what waits on the device for other ranks, because they are known to "
                        "be lost. Legal twice.\n\n"
                        "Args:\n"
                        "    reason: what every later call raises as CommError.\n");

static PyObject *nccl_abort(PyObject *self, PyObject *reason) {
  PyObject *bytes = NULL;
  if (!PyUnicode_Check(reason))
    return PyErr_Format(PyExc_TypeError, "reason: expected str, got %R", Py_TYPE(reason));
  if (!(bytes = PyUnicode_AsEncodedString(reason, "utf-8", "replace"))) return NULL;
  const char *why = PyBytes_AsString(bytes);
  PyThreadState *gil = PyEval_SaveThread();
  ms_nccl_abort(as_exchange(self)->exchange, why);
  PyEval_RestoreThread(gil);
  Py_DECREF(bytes);
  Py_RETURN_NONE;
}

static PyObject *get_rank(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(as_exchange(self)->exchange->rank);
}

static PyObject *get_ranks(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(as_exchange(self)->exchange->R);
}

static PyObject *get_device(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(as_exchange(self)->exchange->device);
}

static PyMethodDef methods[] = {
    {"check", nccl_check, METH_NOARGS, check_doc}, {"abort", nccl_abort, METH_O, abort_doc}, {0}};

static PyGetSetDef getset[] = {
    {"rank", get_rank, NULL, "This rank, 0 to R-1.", NULL},
    {"ranks", get_ranks, NULL, "Number of ranks R.", NULL},
    {"device", get_device, NULL, "Number of this rank's CUDA device.", NULL},
    {0}};

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc}, {Py_tp_new, nccl_new},
                              {Py_tp_dealloc, nccl_dealloc}, {Py_tp_methods, methods},
                              {Py_tp_getset, getset},        {0, NULL}};

static PyType_Spec spec = {.name = "moeshard._cuda.NcclExchange",
                           .basicsize = sizeof(cuda_exchange_object),
                           .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                           .slots = slots};

static PyMethodDef functions[] = {{"nccl_unique_id", (PyCFunction)(void (*)(void))unique_id,
                                   METH_VARARGS | METH_KEYWORDS, unique_id_doc},
                                  {0}};

int cuda_add_exchange(PyObject *module, core_state *state) {
  state->exchange_type = core_add_type(module, &spec);
  return state->exchange_type ? PyModule_AddFunctions(module, functions) : -1;
}
