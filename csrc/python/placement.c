// placement.c - chapter L for Python (csrc/plan/placement.h): hops of token paths, and placements as int32 arrays [L, E].
// SPDX-License-Identifier: Apache-2.0
#include "../plan/placement.h"
#include "arrays.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char HOPS[] = "moeshard.hops"; // the name of the capsule

static void hops_drop(PyObject *capsule) {
  ms_hops *hops = PyCapsule_GetPointer(capsule, HOPS);
  ms_hops_free(hops);
  free(hops);
}

PyDoc_STRVAR(
    count_doc,
    "count_hops($module, /, paths, num_experts)\n--\n\n"
    "Count the hops between experts of consecutive layers.\n\n"
    "Args:\n"
    "    paths: [T, L, K] int32, the experts of each token in each layer; -1: none. T at least 1.\n"
    "    num_experts: number of experts E of a layer.\n\n"
    "Returns:\n"
    "    A capsule for hops_table, hops_totals, place and place_measure. A token with K choices in "
    "both "
    "layers makes\n"
    "    K * K hops.\n\n"
    "Raises:\n"
    "    RangeError: an expert outside -1..E-1; says token and layer.\n"
    "    ShapeError, DTypeError: not [T, L, K] int32.\n");

static PyObject *count_hops(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"paths", "num_experts", NULL};
  core_state *state = PyModule_GetState(module);
  PyObject *paths = NULL, *capsule = NULL;
  long long experts;
  int32_t E;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL:count_hops", names, &paths, &experts))
    return NULL;
  if (!core_int32(state, "num_experts", experts, &E)) return NULL;
  array_need need = {
      .name = "paths", .type = NPY_INT32, .ndim = 3, .shape = {-1, -1, -1}, .dims = "T, L, K"};
  PyArrayObject *array = array_take(state, paths, &need);
  if (!array) return NULL;
  ms_hops *hops = calloc(1, sizeof *hops);
  npy_intp L = PyArray_DIM(array, 1), K = PyArray_DIM(array, 2);
  if (!hops) {
    PyErr_NoMemory();
  } else if (L > MS_MAX_LAYERS || K > MS_MAX_CHOICES) {
    core_fail(state, MS_ESHAPE, "paths: got %zd layers and %zd choices, expected at most %d and %d",
              L, K, MS_MAX_LAYERS, MS_MAX_CHOICES);
  } else {
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    ms_status status = ms_hops_count(PyArray_DATA(array), PyArray_DIM(array, 0), (int32_t)L,
                                     (int32_t)K, E, hops, &err);
    PyEval_RestoreThread(gil);
    if (status == MS_OK) capsule = PyCapsule_New(hops, HOPS, hops_drop);
    if (status != MS_OK) core_raise(state, &err);
  }
  if (!capsule) {
    ms_hops_free(hops);
    free(hops);
  }
  Py_DECREF((PyObject *)array);
  return capsule;
}

PyDoc_STRVAR(table_doc,
             "hops_table($module, hops, /)\n--\n\n"
             "Hops from each expert of a layer to each of the next: [L - 1, E, E] int64.\n");

static PyObject *hops_table(PyObject *module, PyObject *capsule) {
  (void)module;
  const ms_hops *hops = PyCapsule_GetPointer(capsule, HOPS);
  if (!hops) return NULL;
  npy_intp shape[3] = {hops->L - 1, hops->E, hops->E};
  PyObject *array = PyArray_ZEROS(3, shape, NPY_INT64, 0);
  if (!array) return NULL;
  int64_t *table = array_data(array);
  for (int64_t row = 0; row < (hops->L - 1) * (int64_t)hops->E; row++)
    for (int64_t k = hops->next_at[row]; k < hops->next_at[row + 1]; k++)
      table[row * hops->E + hops->next[k].expert] = hops->next[k].count;
  return array;
}

PyDoc_STRVAR(totals_doc, "hops_totals($module, hops, /)\n--\n\n"
                         "Number of hops from each layer to the next: [L - 1] int64.\n");

static PyObject *hops_totals(PyObject *module, PyObject *capsule) {
  (void)module;
  const ms_hops *hops = PyCapsule_GetPointer(capsule, HOPS);
  PyObject *array = hops ? array_new(NPY_INT64, 1, hops->L - 1, 0) : NULL;
  if (!array) return NULL;
  int64_t *total = array_data(array);
  for (int64_t l = 0; l + 1 < hops->L; l++) {
    total[l] = 0;
    for (int64_t k = hops->next_at[l * hops->E]; k < hops->next_at[(l + 1) * hops->E]; k++)
      total[l] += hops->next[k].count;
  }
  return array;
}

// What place and place_measure take alike; arrays are borrowed from the two references.
typedef struct placing {
  ms_place_spec spec;
  PyArrayObject *counts, *apart;
} placing;

static void placing_free(placing *p) {
  Py_XDECREF((PyObject *)p->counts);
  Py_XDECREF((PyObject *)p->apart);
}

// -1 with an exception set; to be freed all the same.
static int take_placing(core_state *state, PyObject *counts, long long ranks, double slack,
                        PyObject *hops, PyObject *apart, placing *out) {
  *out = (placing){.spec.slack = slack};
  array_need need = {
      .name = "counts", .type = NPY_INT64, .ndim = 2, .shape = {-1, -1}, .dims = "L, E"};
  if (!core_int32(state, "ranks", ranks, &out->spec.R)) return -1;
  if (!(out->counts = array_take(state, counts, &need))) return -1;
  npy_intp L = PyArray_DIM(out->counts, 0), E = PyArray_DIM(out->counts, 1);
  if (L > MS_MAX_LAYERS || E > MS_MAX_EXPERTS) {
    core_fail(state, MS_ESHAPE, "counts: got [%zd, %zd], expected at most [%d, %d]", L, E,
              MS_MAX_LAYERS, MS_MAX_EXPERTS);
    return -1;
  }
  out->spec.L = (int32_t)L;
  out->spec.E = (int32_t)E;
  out->spec.counts = PyArray_DATA(out->counts);
  if (hops != Py_None && !(out->spec.hops = PyCapsule_GetPointer(hops, HOPS))) return -1;
  if (apart != Py_None) {
    array_need same = {
        .name = "apart", .type = NPY_BOOL, .ndim = 2, .shape = {L, E}, .dims = "L, E"};
    if (!(out->apart = array_take(state, apart, &same))) return -1;
    out->spec.apart = PyArray_DATA(out->apart);
  }
  return 0;
}

PyDoc_STRVAR(place_doc, "place($module, /, method, counts, ranks, slack=0.02, hops=None, "
                        "apart=None, starts=4, seed=0)\n--\n\n"
                        "Give each expert of each layer whole to one rank.\n\n"
                        "Args:\n"
                        "    method: \"contiguous\", \"balanced\", \"two-stage\", \"sweep\" or "
                        "\"exact\" (csrc/plan/placement.h).\n"
                        "    counts: [L, E] integers, slots (token, choice) of each expert.\n"
                        "    ranks: number of ranks R.\n"
                        "    slack: how much heavier than the bound a rank may be: 0.02 is 2 %.\n"
                        "    hops: of count_hops. None: only balance is known.\n"
                        "    apart: [L, E] bool, experts that get no rank. None: all get one.\n"
                        "    starts, seed: of sweep.\n\n"
                        "Returns:\n"
                        "    [L, E] int32, the rank of each expert, -1 for those apart.\n\n"
                        "Raises:\n"
                        "    ArgumentError: an unknown method, a size out of range, or a case too "
                        "large for \"exact\".\n"
                        "    ShapeError, RangeError: counts or hops that do not fit.\n");

static PyObject *place(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"method", "counts", "ranks", "slack", "hops",
                          "apart",  "starts", "seed",  NULL};
  core_state *state = PyModule_GetState(module);
  const char *method = NULL;
  PyObject *counts = NULL, *hops = Py_None, *apart = Py_None, *owner = NULL;
  long long ranks, starts = 4;
  unsigned long long seed = 0;
  double slack = 0.02;
  int32_t first;
  placing p = {0};
  ms_error err;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOL|dOOLK:place", names, &method, &counts, &ranks,
                                   &slack, &hops, &apart, &starts, &seed))
    return NULL;
  if (!core_int32(state, "starts", starts, &first)) return NULL;
  if (take_placing(state, counts, ranks, slack, hops, apart, &p)) goto done;
  if (!(owner = array_new(NPY_INT32, 2, p.spec.L, p.spec.E))) goto done;
  int32_t *to = array_data(owner);
  ms_status status;
  PyThreadState *gil = PyEval_SaveThread();
  if (!strcmp(method, "contiguous"))
    status = ms_place_contiguous(&p.spec, to, &err);
  else if (!strcmp(method, "balanced"))
    status = ms_place_balanced(&p.spec, to, &err);
  else if (!strcmp(method, "two-stage"))
    status = ms_place_two_stage(&p.spec, to, &err);
  else if (!strcmp(method, "sweep"))
    status = ms_place_sweep(&p.spec, first, seed, to, &err);
  else if (!strcmp(method, "exact"))
    status = ms_place_exact(&p.spec, to, &err);
  else
    status = ms_fail(
        &err, MS_EINVAL,
        "method: got '%.40s', expected contiguous, balanced, two-stage, sweep or exact", method);
  PyEval_RestoreThread(gil);
  if (status != MS_OK) {
    Py_CLEAR(owner);
    core_raise(state, &err);
  }
done:
  placing_free(&p);
  return owner;
}

PyDoc_STRVAR(measure_doc, "place_measure($module, /, owner, counts, ranks, slack=0.02, hops=None, "
                          "apart=None, gap=True)\n--\n\n"
                          "What a placement is worth.\n\n"
                          "Args:\n"
                          "    owner: [L, E] int32, as place returns.\n"
                          "    counts, ranks, slack, hops, apart: as of place.\n"
                          "    gap: prove how good each layer is, which takes the longest.\n\n"
                          "Returns:\n"
                          "    (load [L, R] int64: slots of each rank; bound [L] float64: "
                          "max(mean, hottest expert), no rank can "
                          "always be\n"
                          "    below; cap [L] int64: what slack allows; local [L - 1] int64: hops "
                          "that stay on their rank; most "
                          "[L - 1] int64:\n"
                          "    no placement has more; gap [L] int64: what changing one layer alone "
                          "could save at most).\n\n"
                          "Raises:\n"
                          "    ArgumentError: an owner that is no rank.\n"
                          "    ShapeError, RangeError: arrays that do not fit.\n");

static PyObject *place_measure(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"owner", "counts", "ranks", "slack", "hops", "apart", "gap", NULL};
  core_state *state = PyModule_GetState(module);
  PyObject *like = NULL, *counts = NULL, *hops = Py_None, *apart = Py_None, *result = NULL;
  PyObject *load = NULL, *bound = NULL, *cap = NULL, *local = NULL, *most = NULL, *gaps = NULL;
  PyArrayObject *owner = NULL;
  long long ranks;
  double slack = 0.02;
  int with_gap = 1;
  placing p = {0};
  ms_error err;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOL|dOOp:place_measure", names, &like, &counts,
                                   &ranks, &slack, &hops, &apart, &with_gap))
    return NULL;
  if (take_placing(state, counts, ranks, slack, hops, apart, &p)) goto done;
  const int32_t L = p.spec.L;
  array_need need = {
      .name = "owner", .type = NPY_INT32, .ndim = 2, .shape = {L, p.spec.E}, .dims = "L, E"};
  if (!(owner = array_take(state, like, &need))) goto done;
  if (p.spec.R < 1) { // before an array of that size is made
    core_fail(state, MS_EINVAL, "ranks: got %d, expected at least 1", p.spec.R);
    goto done;
  }
  load = array_new(NPY_INT64, 2, L, p.spec.R);
  bound = array_new(NPY_DOUBLE, 1, L, 0);
  cap = array_new(NPY_INT64, 1, L, 0);
  local = array_new(NPY_INT64, 1, L - 1, 0);
  most = array_new(NPY_INT64, 1, L - 1, 0);
  gaps = array_new(NPY_INT64, 1, L, 0);
  if (!load || !bound || !cap || !local || !most || !gaps) goto done;
  memset(array_data(gaps), 0, (size_t)L * sizeof(int64_t));
  ms_place_score score = {.load = array_data(load),
                          .bound = array_data(bound),
                          .cap = array_data(cap),
                          .local = array_data(local),
                          .most = array_data(most),
                          .gap = with_gap ? array_data(gaps) : NULL};
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_place_measure(&p.spec, PyArray_DATA(owner), &score, &err);
  PyEval_RestoreThread(gil);
  if (status != MS_OK)
    core_raise(state, &err);
  else
    result = PyTuple_Pack(6, load, bound, cap, local, most, gaps);
done:
  placing_free(&p);
  Py_XDECREF((PyObject *)owner);
  Py_XDECREF(load);
  Py_XDECREF(bound);
  Py_XDECREF(cap);
  Py_XDECREF(local);
  Py_XDECREF(most);
  Py_XDECREF(gaps);
  return result;
}

PyDoc_STRVAR(assign_doc, "assign($module, cost, /)\n--\n\n"
                         "Put items into bins of equal size at least cost, exactly.\n\n"
                         "Args:\n"
                         "    cost: [n, R] integers; the largest magnitudes of the items sum to "
                         "at most 2^59.\n\n"
                         "Returns:\n"
                         "    (owner [n] int32: the bin of each item, floor(n/R) or ceil(n/R) "
                         "items in each bin; total cost).\n\n"
                         "Raises:\n"
                         "    ShapeError, DTypeError, RangeError: costs that cannot be used.\n\n"
                         "Example:\n"
                         "    >>> assign([[1, 5], [2, 9]])\n"
                         "    (array([1, 0], dtype=int32), 7)\n");

static PyObject *assign(PyObject *module, PyObject *like) {
  core_state *state = PyModule_GetState(module);
  PyObject *owner = NULL, *result = NULL;
  ms_assigner *assigner = NULL;
  int64_t *price = NULL;
  ms_error err;
  array_need need = {
      .name = "cost", .type = NPY_INT64, .ndim = 2, .shape = {-1, -1}, .dims = "n, R"};
  PyArrayObject *cost = array_take(state, like, &need);
  if (!cost) return NULL;
  npy_intp n = PyArray_DIM(cost, 0), R = PyArray_DIM(cost, 1);
  const int64_t *data = PyArray_DATA(cost);
  if (n > MS_MAX_EXPERTS || R > MS_MAX_RANKS) {
    core_fail(state, MS_ESHAPE, "cost: got [%zd, %zd], expected at most [%d, %d]", n, R,
              MS_MAX_EXPERTS, MS_MAX_RANKS);
    goto done;
  }
  int64_t left = MS_MAX_COST;
  for (npy_intp i = 0; i < n; i++) {
    int64_t largest = 0;
    for (const int64_t *at = data + i * R; at < data + (i + 1) * R; at++) {
      if (*at > left || *at < -left) {
        core_fail(state, MS_ERANGE,
                  "cost: item %zd: got %lld, expected largest magnitudes that sum to at most 2^59",
                  i, (long long)*at);
        goto done;
      }
      if (*at > largest || *at < -largest) largest = *at < 0 ? -*at : *at;
    }
    left -= largest;
  }
  if (!(owner = array_new(NPY_INT32, 1, n, 0))) goto done;
  if (!(price = calloc((size_t)R + 1, sizeof *price))) {
    PyErr_NoMemory();
    goto done;
  }
  if (ms_assigner_create((int32_t)n, (int32_t)R, &assigner, &err) != MS_OK) {
    core_raise(state, &err);
    goto done;
  }
  int64_t total;
  PyThreadState *gil = PyEval_SaveThread();
  total = ms_assign(assigner, data, (int32_t)n, price, array_data(owner));
  PyEval_RestoreThread(gil);
  result = Py_BuildValue("OL", owner, (long long)total);
done:
  ms_assigner_free(assigner);
  free(price);
  Py_XDECREF(owner);
  Py_DECREF((PyObject *)cost);
  return result;
}

static PyMethodDef functions[] = {
    {"count_hops", (PyCFunction)(void (*)(void))count_hops, METH_VARARGS | METH_KEYWORDS,
     count_doc},
    {"hops_table", hops_table, METH_O, table_doc},
    {"hops_totals", hops_totals, METH_O, totals_doc},
    {"place", (PyCFunction)(void (*)(void))place, METH_VARARGS | METH_KEYWORDS, place_doc},
    {"place_measure", (PyCFunction)(void (*)(void))place_measure, METH_VARARGS | METH_KEYWORDS,
     measure_doc},
    {"assign", assign, METH_O, assign_doc},
    {0}};

int core_add_placement(PyObject *module) { return PyModule_AddFunctions(module, functions); }
