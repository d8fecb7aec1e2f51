// plan.c - chapter P for Python: the column table as an int64 array [R, E, 2].
// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct sizes {
  int32_t R, E;
  long long F;
} sizes;

static bool take_sizes(core_state *state, long long ranks, long long experts, sizes *out) {
  return core_int32(state, "ranks", ranks, &out->R) &&
         core_int32(state, "num_experts", experts, &out->E);
}

// The table as an array; the plan is freed.
static PyObject *finish(core_state *state, ms_status status, ms_plan *plan, const ms_error *err) {
  PyObject *array = NULL;
  if (status == MS_OK) {
    npy_intp shape[3] = {plan->R, plan->E, 2};
    array = PyArray_SimpleNew(3, shape, NPY_INT64);
    if (array)
      memcpy(array_data(array), plan->columns, (size_t)PyArray_NBYTES((PyArrayObject *)array));
    ms_plan_free(plan);
  } else {
    core_raise(state, err);
  }
  return array;
}

PyDoc_STRVAR(shard_doc,
             "plan_shard($module, /, ranks, num_experts, d_ff, speed=None)\n--\n\n"
             "Cut every expert over every rank.\n\n"
             "Args:\n"
             "    ranks: number of ranks R, 1 to 1024.\n"
             "    num_experts: number of experts E, 1 to 65536.\n"
             "    d_ff: hidden width F of each expert.\n"
             "    speed: [R] positive numbers, widths in proportion to them. None: all alike.\n\n"
             "Returns:\n"
             "    [R, E, 2] int64: rank r holds columns [start, stop) of expert e. Widths differ "
             "from the exact share by\n"
             "    less than one column; odd columns rotate over the ranks with the expert.\n\n"
             "Raises:\n"
             "    ArgumentError: a size out of range, or a speed that is not positive and finite.\n"
             "    ShapeError: not R speeds.\n\n"
             "Example:\n"
             "    >>> plan_shard(2, 1, 37).tolist()\n"
             "    [[[0, 19]], [[19, 37]]]\n\n"
             "Source: arXiv 2503.08467 section 3; deviation: ragged and weighted widths.\n");

static PyObject *plan_shard(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"ranks", "num_experts", "d_ff", "speed", NULL};
  core_state *state = PyModule_GetState(module);
  long long ranks, experts;
  sizes s;
  PyObject *speed = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLL|O:plan_shard", names, &ranks, &experts, &s.F,
                                   &speed))
    return NULL;
  if (!take_sizes(state, ranks, experts, &s)) return NULL;
  PyArrayObject *array = NULL;
  if (speed != Py_None) {
    char dims[32];
    snprintf(dims, sizeof dims, "R=%d", s.R);
    array_need need = {
        .name = "speed", .type = NPY_DOUBLE, .ndim = 1, .shape = {s.R}, .dims = dims};
    if (!(array = array_take(state, speed, &need))) return NULL;
  }
  ms_plan plan;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_plan_shard(s.R, s.E, s.F, array ? PyArray_DATA(array) : NULL, &plan, &err);
  PyEval_RestoreThread(gil);
  Py_XDECREF((PyObject *)array);
  return finish(state, status, &plan, &err);
}

PyDoc_STRVAR(
    expert_parallel_doc,
    "plan_expert_parallel($module, /, ranks, num_experts, d_ff, owner=None)\n--\n\n"
    "Give each expert whole to one rank.\n\n"
    "Args:\n"
    "    ranks: number of ranks R, 1 to 1024.\n"
    "    num_experts: number of experts E, 1 to 65536.\n"
    "    d_ff: hidden width F of each expert.\n"
    "    owner: [E] integers, the rank of each expert. None: contiguous blocks of experts.\n\n"
    "Returns:\n"
    "    [R, E, 2] int64: [0, d_ff) at the owner, [0, 0) elsewhere.\n\n"
    "Raises:\n"
    "    ArgumentError: a size out of range, or an owner outside 0..R-1.\n"
    "    ShapeError: not E owners.\n\n"
    "Example:\n"
    "    >>> plan_expert_parallel(2, 2, 8).tolist()\n"
    "    [[[0, 8], [0, 0]], [[0, 0], [0, 8]]]\n");

static PyObject *plan_expert_parallel(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"ranks", "num_experts", "d_ff", "owner", NULL};
  core_state *state = PyModule_GetState(module);
  long long ranks, experts;
  sizes s;
  PyObject *owner = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLL|O:plan_expert_parallel", names, &ranks,
                                   &experts, &s.F, &owner))
    return NULL;
  if (!take_sizes(state, ranks, experts, &s)) return NULL;
  int32_t *owners = NULL;
  if (owner != Py_None && !(owners = array_take_int32(state, owner, "owner", s.E))) return NULL;
  ms_plan plan;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_plan_expert_parallel(s.R, s.E, s.F, owners, &plan, &err);
  PyEval_RestoreThread(gil);
  free(owners);
  return finish(state, status, &plan, &err);
}

PyDoc_STRVAR(
    hybrid_doc,
    "plan_hybrid($module, /, ranks, num_experts, d_ff, group)\n--\n\n"
    "Give contiguous blocks of experts to groups of consecutive ranks, and cut them evenly inside "
    "the group.\n\n"
    "Args:\n"
    "    ranks: number of ranks R, 1 to 1024.\n"
    "    num_experts: number of experts E, 1 to 65536.\n"
    "    d_ff: hidden width F of each expert.\n"
    "    group: ranks in a group, a divisor of R: R is plan_shard, 1 is plan_expert_parallel.\n\n"
    "Returns:\n"
    "    [R, E, 2] int64.\n\n"
    "Raises:\n"
    "    ArgumentError: a size out of range, or R is not a multiple of group.\n\n"
    "Example:\n"
    "    >>> plan_hybrid(4, 2, 8, group=2)[:, 0].tolist()\n"
    "    [[0, 4], [4, 8], [0, 0], [0, 0]]\n");

static PyObject *plan_hybrid(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"ranks", "num_experts", "d_ff", "group", NULL};
  core_state *state = PyModule_GetState(module);
  long long ranks, experts, group;
  sizes s;
  int32_t members;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLLL:plan_hybrid", names, &ranks, &experts, &s.F,
                                   &group))
    return NULL;
  if (!take_sizes(state, ranks, experts, &s) || !core_int32(state, "group", group, &members))
    return NULL;
  ms_plan plan;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_plan_hybrid(s.R, s.E, s.F, members, &plan, &err);
  PyEval_RestoreThread(gil);
  return finish(state, status, &plan, &err);
}

int core_take_plan(core_state *state, PyObject *table, PyObject *copies, PyArrayObject **columns,
                   ms_plan *out) {
  array_need need = {
      .name = "columns", .type = NPY_INT64, .ndim = 3, .shape = {-1, -1, 2}, .dims = "R, E, 2"};
  *out = (ms_plan){0};
  if (!(*columns = array_take(state, table, &need))) return -1;
  npy_intp R = PyArray_DIM(*columns, 0), E = PyArray_DIM(*columns, 1);
  if (R > MS_MAX_RANKS || E > MS_MAX_EXPERTS) {
    core_fail(state, MS_ESHAPE, "columns: got [%zd, %zd, 2], expected at most [%d, %d, 2]", R, E,
              MS_MAX_RANKS, MS_MAX_EXPERTS);
    goto failed;
  }
  *out = (ms_plan){.R = (int32_t)R, .E = (int32_t)E, .columns = PyArray_DATA(*columns)};
  if (copies != Py_None) {
    out->copies = array_take_int32(state, copies, "copies", E);
  } else if ((out->copies = malloc((size_t)E * sizeof *out->copies))) {
    for (npy_intp e = 0; e < E; e++) out->copies[e] = 1;
  } else {
    PyErr_NoMemory();
  }
  if (out->copies) return 0;
failed:
  Py_CLEAR(*columns);
  return -1;
}

PyDoc_STRVAR(
    check_doc,
    "plan_check($module, /, columns, d_ff, copies=None)\n--\n\n"
    "Check that every column of every expert is held by as many ranks as declared.\n\n"
    "Args:\n"
    "    columns: [R, E, 2] integers: rank r holds columns [start, stop) of expert e.\n"
    "    d_ff: hidden width F of each expert.\n"
    "    copies: [E] integers, how many ranks hold each column of an expert (0: pruned). None: "
    "one.\n\n"
    "Raises:\n"
    "    ArgumentError: names the expert, the columns, and by how many ranks they are held.\n"
    "    ShapeError: columns is not [R, E, 2], or copies not [E].\n"
    "    DTypeError: not integers.\n");

static PyObject *plan_check(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"columns", "d_ff", "copies", NULL};
  core_state *state = PyModule_GetState(module);
  PyObject *table = NULL, *copies = Py_None;
  PyArrayObject *columns = NULL;
  long long F;
  ms_plan plan;
  ms_error err;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL|O:plan_check", names, &table, &F, &copies))
    return NULL;
  if (F < 1) return core_fail(state, MS_EINVAL, "d_ff: got %lld, expected at least 1", F);
  if (core_take_plan(state, table, copies, &columns, &plan)) return NULL;
  plan.F = F;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_plan_check(&plan, &err);
  PyEval_RestoreThread(gil);
  free(plan.copies);
  Py_DECREF(columns);
  return core_none(state, status, &err);
}

PyDoc_STRVAR(work_doc,
             "plan_work($module, /, columns, counts, copies=None)\n--\n\n"
             "Work of each rank for a routing histogram.\n\n"
             "Args:\n"
             "    columns: [R, E, 2] integers, as plan_shard returns.\n"
             "    counts: [E] integers, slots (token, choice) of each expert.\n"
             "    copies: [E] integers, as in plan_check. None: one.\n\n"
             "Returns:\n"
             "    [R] float64, in token-columns: sum_e counts[e] * columns held / copies[e].\n\n"
             "Raises:\n"
             "    ShapeError: an argument of another shape.\n"
             "    DTypeError: not integers.\n\n"
             "Example:\n"
             "    >>> plan_work(plan_expert_parallel(2, 2, 8), [3, 1]).tolist()\n"
             "    [24.0, 8.0]\n");

static PyObject *plan_work(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"columns", "counts", "copies", NULL};
  core_state *state = PyModule_GetState(module);
  PyObject *table = NULL, *histogram = NULL, *copies = Py_None, *work = NULL;
  PyArrayObject *columns = NULL, *counts = NULL;
  ms_plan plan;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:plan_work", names, &table, &histogram,
                                   &copies))
    return NULL;
  if (core_take_plan(state, table, copies, &columns, &plan)) return NULL;
  char dims[32];
  snprintf(dims, sizeof dims, "E=%d", plan.E);
  array_need need = {
      .name = "counts", .type = NPY_INT64, .ndim = 1, .shape = {plan.E}, .dims = dims};
  if (!(counts = array_take(state, histogram, &need))) goto done;
  if (!(work = array_new(NPY_DOUBLE, 1, plan.R, 0))) goto done;
  ms_plan_work(&plan, PyArray_DATA(counts), array_data(work));
done:
  free(plan.copies);
  Py_XDECREF((PyObject *)counts);
  Py_DECREF(columns);
  return work;
}

// ---- the cost model -------------------------------------------------------------------------------------
// A machine and a layer come as tuples of arrays and numbers; moeshard/planner makes them.

typedef struct described { // what the C structs point into
  PyArrayObject *flops, *bandwidth, *memory, *constants, *tokens, *load;
  int32_t *host;
  ms_cluster cluster;
  ms_moe_layer layer;
} described;

static void described_drop(described *d) {
  Py_XDECREF((PyObject *)d->flops);
  Py_XDECREF((PyObject *)d->bandwidth);
  Py_XDECREF((PyObject *)d->memory);
  Py_XDECREF((PyObject *)d->constants);
  Py_XDECREF((PyObject *)d->tokens);
  Py_XDECREF((PyObject *)d->load);
  free(d->host);
  *d = (described){0};
}

static PyArrayObject *take_numbers(core_state *state, PyObject *like, const char *name, int64_t n) {
  char dims[32] = "N";
  if (n >= 0) snprintf(dims, sizeof dims, "%lld", (long long)n);
  array_need need = {.name = name, .type = NPY_DOUBLE, .ndim = 1, .shape = {n}, .dims = dims};
  return array_take(state, like, &need);
}

enum { CONSTANTS = 16 };

// 0, or -1 with an exception set; described_drop either way.
static int described_take(core_state *state, PyObject *machine, PyObject *layer, described *d) {
  PyObject *flops, *bandwidth, *memory, *host, *constants, *tokens, *load;
  long long D, F, E;
  int K, matrices, weight_size, token_size, exact;
  *d = (described){0};
  if (!PyArg_ParseTuple(machine, "OOOOO;machine", &flops, &bandwidth, &memory, &host, &constants))
    return -1;
  if (!PyArg_ParseTuple(layer, "OOLLiiiip;layer", &tokens, &load, &D, &F, &K, &matrices,
                        &weight_size, &token_size, &exact))
    return -1;
  if (!(d->flops = take_numbers(state, flops, "flops", -1))) return -1;
  long long R = PyArray_DIM(d->flops, 0);
  if (!(d->bandwidth = take_numbers(state, bandwidth, "bandwidth", R)) ||
      !(d->memory = take_numbers(state, memory, "memory", R)) ||
      !(d->host = array_take_int32(state, host, "host", R)) ||
      !(d->constants = take_numbers(state, constants, "constants", CONSTANTS)) ||
      !(d->tokens = take_numbers(state, tokens, "tokens", R)) ||
      !(d->load = take_numbers(state, load, "load", -1)))
    return -1;
  E = PyArray_DIM(d->load, 0);
  const double *c = PyArray_DATA(d->constants);
  d->cluster = (ms_cluster){.flops = PyArray_DATA(d->flops),
                            .bandwidth = PyArray_DATA(d->bandwidth),
                            .memory = PyArray_DATA(d->memory),
                            .host = d->host,
                            .host_bandwidth = c[0],
                            .inside = {c[1], c[2], c[3]},
                            .between = {c[4], c[5], c[6]},
                            .step = c[7],
                            .expert = c[8],
                            .slot = c[9],
                            .router = c[10],
                            .logit = c[11],
                            .flops_share = c[12],
                            .bandwidth_share = c[13],
                            .idle_rows = c[14],
                            .panel = (int64_t)c[15]};
  d->layer = (ms_moe_layer){.K = K,
                            .D = D,
                            .F = F,
                            .matrices = matrices,
                            .weight_size = weight_size,
                            .token_size = token_size,
                            .tokens = PyArray_DATA(d->tokens),
                            .load = PyArray_DATA(d->load),
                            .exact = exact};
  return core_int32(state, "ranks", R, &d->cluster.R) &&
                 core_int32(state, "num_experts", E, &d->layer.E)
             ? 0
             : -1;
}

// (route, gather, group, ffn, combine, total, sparse)
static PyObject *cost_tuple(const ms_cost *cost) {
  return Py_BuildValue("(ddddddN)", cost->route, cost->gather, cost->group, cost->ffn,
                       cost->combine, cost->total, PyBool_FromLong(cost->sparse));
}

PyDoc_STRVAR(cost_doc,
             "plan_cost($module, columns, copies, machine, layer, /)\n--\n\n"
             "Predict the time of one layer under a table.\n\n"
             "Args:\n"
             "    columns: [R, E, 2] integers, as plan_shard returns.\n"
             "    copies: [E] integers, or None: one.\n"
             "    machine: (flops [R], bandwidth [R], memory [R], host [R], constants "
             "[14]); the constants are\n"
             "        host_bandwidth, latency, message and bandwidth inside a host, the same "
             "between hosts, step, expert, slot,\n"
             "        router, logit, flops_share, bandwidth_share, idle_rows, panel "
             "(csrc/moeshard.h, ms_cluster).\n"
             "    layer: (tokens [R], load [E], d_model, d_ff, top_k, matrices, "
             "weight_size, token_size, exact).\n\n"
             "Returns:\n"
             "    ((route, gather, group, ffn, combine, total, sparse), ranks): seconds "
             "of the slowest rank; ranks is\n"
             "    [4, R] float64: seconds of ffn, bytes of weights, bytes that arrive in "
             "gather, in combine.\n\n"
             "Raises:\n"
             "    ArgumentError, ShapeError, DTypeError: a number or an array that does "
             "not fit; says which.\n");

static PyObject *plan_cost(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *table, *copies, *machine, *layer, *ranks = NULL, *result = NULL;
  PyArrayObject *columns = NULL;
  ms_plan plan = {0};
  described d = {0};
  if (!PyArg_ParseTuple(args, "OOO!O!:plan_cost", &table, &copies, &PyTuple_Type, &machine,
                        &PyTuple_Type, &layer))
    return NULL;
  if (described_take(state, machine, layer, &d)) goto done;
  if (core_take_plan(state, table, copies, &columns, &plan)) goto done;
  plan.F = d.layer.F;
  if (!(ranks = array_new(NPY_DOUBLE, 2, 4, d.cluster.R))) goto done;
  double *at = array_data(ranks);
  ms_rank_costs each = {at, at + d.cluster.R, at + 2 * d.cluster.R, at + 3 * d.cluster.R};
  ms_cost cost;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_plan_cost(&plan, &d.cluster, &d.layer, &cost, &each, &err);
  PyEval_RestoreThread(gil);
  if (status == MS_OK)
    result = Py_BuildValue("(NO)", cost_tuple(&cost), ranks);
  else
    core_raise(state, &err);
done:
  free(plan.copies);
  Py_XDECREF((PyObject *)columns);
  Py_XDECREF(ranks);
  described_drop(&d);
  return result;
}

PyDoc_STRVAR(
    search_doc,
    "plan_search($module, machine, layer, kinds, /)\n--\n\n"
    "Find the layout with the least predicted time that fits into memory.\n\n"
    "Args:\n"
    "    machine, layer: as in plan_cost.\n"
    "    kinds: a mask of 1 << kind: 0 shard, 1 uneven shard, 2 expert parallel, 3 the same "
    "balanced, 4 hybrid,\n"
    "        5 hot experts sharded, 6 hot experts copied, 7 every table of a tiny layer.\n\n"
    "Returns:\n"
    "    (columns [R, E, 2] int64, copies [E] int32, candidates, chosen, proven). A candidate is\n"
    "    (kind, group, hot, hot_group, fits, memory, cost), the cost as in plan_cost.\n\n"
    "Raises:\n"
    "    RangeError: nothing fits into memory.\n"
    "    ArgumentError, ShapeError, DTypeError: as in plan_cost.\n");

static PyObject *plan_search(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *machine, *layer, *columns = NULL, *copies = NULL, *list = NULL, *result = NULL;
  unsigned int kinds;
  described d = {0};
  ms_plan plan = {0};
  if (!PyArg_ParseTuple(args, "O!O!I:plan_search", &PyTuple_Type, &machine, &PyTuple_Type, &layer,
                        &kinds))
    return NULL;
  if (described_take(state, machine, layer, &d)) goto done;
  ms_candidate found[MS_CANDIDATES];
  int32_t count, chosen;
  bool proven;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status =
      ms_plan_search(&d.cluster, &d.layer, kinds, &plan, found, &count, &chosen, &proven, &err);
  PyEval_RestoreThread(gil);
  if (status != MS_OK) {
    core_raise(state, &err);
    goto done;
  }
  npy_intp shape[3] = {plan.R, plan.E, 2}, experts[1] = {plan.E};
  if (!(columns = PyArray_SimpleNew(3, shape, NPY_INT64))) goto done;
  memcpy(array_data(columns), plan.columns, (size_t)PyArray_NBYTES((PyArrayObject *)columns));
  if (!(copies = PyArray_SimpleNew(1, experts, NPY_INT32))) goto done;
  memcpy(array_data(copies), plan.copies, (size_t)PyArray_NBYTES((PyArrayObject *)copies));
  if (!(list = PyList_New(count))) goto done;
  for (int32_t i = 0; i < count; i++) {
    const ms_candidate *c = &found[i];
    PyObject *entry = Py_BuildValue("(iiiiNdN)", (int)c->kind, c->group, c->hot, c->hot_group,
                                    PyBool_FromLong(c->fits), c->memory, cost_tuple(&c->cost));
    if (!entry || PyList_SetItem(list, i, entry)) goto done;
  }
  result = Py_BuildValue("(OOOiN)", columns, copies, list, chosen, PyBool_FromLong(proven));
done:
  Py_XDECREF(columns);
  Py_XDECREF(copies);
  Py_XDECREF(list);
  ms_plan_free(&plan);
  described_drop(&d);
  return result;
}

PyDoc_STRVAR(simulate_doc,
             "plan_simulate($module, columns, copies, machine, layer, simulation, /)\n--\n\n"
             "Run a layer many times on paper.\n\n"
             "Args:\n"
             "    columns, copies, machine, layer: as in plan_cost; exact is ignored.\n"
             "    simulation: (steps, chunks, jitter, slow_chance, slow_factor, drift, seed), see "
             "ms_simulation.\n\n"
             "Returns:\n"
             "    (seconds [steps] float64, mean share of the ranks' time that ffn takes).\n\n"
             "Raises:\n"
             "    ArgumentError, ShapeError, DTypeError: as in plan_cost.\n");

static PyObject *plan_simulate(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *table, *copies, *machine, *layer, *seconds = NULL, *result = NULL;
  PyArrayObject *columns = NULL;
  ms_plan plan = {0};
  described d = {0};
  ms_simulation how;
  int steps, chunks, drift;
  unsigned long long seed;
  if (!PyArg_ParseTuple(args, "OOO!O!(iidddpK):plan_simulate", &table, &copies, &PyTuple_Type,
                        &machine, &PyTuple_Type, &layer, &steps, &chunks, &how.jitter,
                        &how.slow_chance, &how.slow_factor, &drift, &seed))
    return NULL;
  how.steps = steps;
  how.chunks = chunks;
  how.drift = drift;
  how.seed = seed;
  if (described_take(state, machine, layer, &d)) goto done;
  if (core_take_plan(state, table, copies, &columns, &plan)) goto done;
  plan.F = d.layer.F;
  if (!(seconds = array_new(NPY_DOUBLE, 1, steps > 0 ? steps : 1, 0))) goto done;
  double busy;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status =
      ms_plan_simulate(&plan, &d.cluster, &d.layer, &how, array_data(seconds), &busy, &err);
  PyEval_RestoreThread(gil);
  if (status == MS_OK)
    result = Py_BuildValue("(Od)", seconds, busy);
  else
    core_raise(state, &err);
done:
  free(plan.copies);
  Py_XDECREF((PyObject *)columns);
  Py_XDECREF(seconds);
  described_drop(&d);
  return result;
}

static PyMethodDef functions[] = {
    {"plan_cost", plan_cost, METH_VARARGS, cost_doc},
    {"plan_search", plan_search, METH_VARARGS, search_doc},
    {"plan_simulate", plan_simulate, METH_VARARGS, simulate_doc},
    {"plan_shard", (PyCFunction)(void (*)(void))plan_shard, METH_VARARGS | METH_KEYWORDS,
     shard_doc},
    {"plan_expert_parallel", (PyCFunction)(void (*)(void))plan_expert_parallel,
     METH_VARARGS | METH_KEYWORDS, expert_parallel_doc},
    {"plan_hybrid", (PyCFunction)(void (*)(void))plan_hybrid, METH_VARARGS | METH_KEYWORDS,
     hybrid_doc},
    {"plan_check", (PyCFunction)(void (*)(void))plan_check, METH_VARARGS | METH_KEYWORDS,
     check_doc},
    {"plan_work", (PyCFunction)(void (*)(void))plan_work, METH_VARARGS | METH_KEYWORDS, work_doc},
    {0}};

int core_add_plan(PyObject *module) { return PyModule_AddFunctions(module, functions); }
