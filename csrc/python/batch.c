// batch.c - Batch: one forward pass for Python. Steps 1, 3 and 4, and the halves of 2 and 5 for transports in Python.
//
// The core trusts its caller with pointers; this file does not trust Python. It keeps what a batch has borrowed
// alive, refuses steps out of order, and refuses rows whose exchange has moved on or closed: then they lie nowhere.
//
// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"
#include "error.h"
#include "routing_args.h"
#include "../base/memory.h"
#include "../layout.h"

#include <stdlib.h>
#include <string.h>

static batch_object *as_batch(PyObject *self) { return (batch_object *)self; }

// ---- one thread at a time -----------------------------------------------------------------------

bool core_batch_enter(core_state *state, batch_object *self) {
  if (!atomic_exchange(&self->busy, true)) return true;
  core_fail(state, MS_EINVAL, "batch is in use by another thread");
  return false;
}

void core_batch_leave(batch_object *self) { atomic_store(&self->busy, false); }

// ---- what is borrowed ---------------------------------------------------------------------------

static void owe(batch_debts *debts, tensor_hold *hold) {
  for (int i = 0; i < 2 + BATCH_GATHERED; i++)
    if (!debts->holds[i].owner && !debts->holds[i].managed && !debts->holds[i].legacy) {
      debts->holds[i] = *hold;
      break;
    }
  *hold = (tensor_hold){0};
}

static const char lease_name[] = "moeshard.partial";

static void free_lease(PyObject *capsule) {
  ms_buffer *buffer = PyCapsule_GetPointer(capsule, lease_name);
  ms_buffer_free(buffer);
  free(buffer);
}

// Arrays of combine_choices that are still in use keep the memory they show; the batch will get itself new memory.
static PyObject *settle_lease(batch_object *self) {
  PyObject *lease = self->lease;
  self->lease = NULL;
  if (lease && Py_REFCNT(lease) > 1) {
    ms_buffer *leased = PyCapsule_GetPointer(lease, lease_name);
    *leased = self->batch->memory->partial;
    self->batch->memory->partial = (ms_buffer){0};
  }
  return lease;
}

void core_batch_forget_gather(batch_object *self, batch_debts *debts) {
  self->gathered = self->counted = false;
  for (int i = 0; i < BATCH_GATHERED; i++) owe(debts, &self->arrays[i]);
  debts->objects[0] = (PyObject *)self->exchange;
  self->exchange = NULL;
  debts->objects[1] = settle_lease(self);
}

void core_batch_forget_route(batch_object *self, batch_debts *debts) {
  core_batch_forget_gather(self, debts);
  self->routed = false;
  owe(debts, &self->hidden);
  owe(debts, &self->out);
  if (self->batch) self->batch->layout = NULL; // NULL: it could not be made
  debts->objects[2] = self->layout;
  self->layout = NULL;
}

void core_batch_pay(batch_debts *debts) {
  for (int i = 0; i < 2 + BATCH_GATHERED; i++) tensor_hold_release(&debts->holds[i]);
  for (int i = 0; i < 3; i++) Py_CLEAR(debts->objects[i]);
}

// ---- the order of the steps ---------------------------------------------------------------------

static bool check_routed(core_state *state, const batch_object *self, const char *step) {
  if (self->routed) return true;
  core_fail(state, MS_EINVAL, "%s: the batch holds no tokens, call route first", step);
  return false;
}

// Take the batch, and the exchange in whose memory its rows lie. False with an exception set and nothing taken.
static bool enter_gathered(core_state *state, batch_object *self, const char *step) {
  if (!core_batch_enter(state, self)) return false;
  if (!self->gathered) {
    core_fail(state, MS_EINVAL, "%s: nothing was gathered since the last route", step);
  } else if (!self->exchange) {
    return true;
  } else if (core_exchange_enter(state, self->exchange)) {
    if (self->exchange->exchange && self->exchange->turn == self->turn) return true;
    core_fail(state, MS_EINVAL,
              "%s: the exchange was used for another call since, or closed: gather again", step);
    core_exchange_leave(self->exchange);
  }
  core_batch_leave(self);
  return false;
}

static void leave_gathered(batch_object *self) {
  if (self->exchange) core_exchange_leave(self->exchange);
  core_batch_leave(self);
}

// ---- construction -------------------------------------------------------------------------------

static PyObject *batch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {NULL};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Batch", names)) return NULL;
  batch_object *self = (batch_object *)PyType_GenericAlloc(type, 0);
  if (!self) return NULL;
  ms_error err;
  if (ms_batch_create(&self->batch, &err) == MS_OK) return (PyObject *)self;
  core_raise(PyType_GetModuleState(type), &err);
  Py_DECREF(self);
  return NULL;
}

static int batch_traverse(PyObject *object, visitproc visit, void *arg) {
  batch_object *self = as_batch(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->hidden.owner);
  Py_VISIT(self->out.owner);
  for (int i = 0; i < BATCH_GATHERED; i++) Py_VISIT(self->arrays[i].owner);
  Py_VISIT(self->exchange);
  return 0;
}

static int batch_clear(PyObject *self) {
  batch_debts debts = {0};
  core_batch_forget_route(as_batch(self), &debts);
  core_batch_pay(&debts);
  return 0;
}

static void batch_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  batch_clear(self);
  ms_batch_free(as_batch(self)->batch);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}

// ---- step 1 -------------------------------------------------------------------------------------

PyDoc_STRVAR(route_doc,
             "route($self, /, hidden_states, top_k_index, top_k_weights, num_experts, out=None, *, "
             "layer=0, replicated=False, layout=None)\n--\n\n"
             "Step 1: take the router's choices for this rank's tokens, and refuse bad ones.\n\n"
             "Index and weights are copied. hidden_states and out are borrowed: the batch keeps "
             "them alive, and they must not\n"
             "be resized, until combine or the next route.\n\n"
             "Args:\n"
             "    hidden_states: [T, D] float32, bfloat16 or float16, contiguous, in CPU memory.\n"
             "    top_k_index: [T, K] int32 or int64, the experts of each token, 0 to E-1; -1 = no "
             "expert. K is 0 to 64.\n"
             "    top_k_weights: [T, K] float32, bfloat16 or float16, finite; multiplies each "
             "expert's output.\n"
             "    num_experts: number of experts E.\n"
             "    out: [T, D] of the dtype of hidden_states, contiguous, not overlapping it; "
             "combine writes it.\n"
             "        None: nothing is combined, the rows are only gathered.\n"
             "    layer: which layer this is; ranks check that they agree.\n"
             "    replicated: all ranks hold the same tokens: none are gathered, and out is the "
             "sum over the ranks.\n"
             "    layout: the Layout of this rank, the same table on all of them: only slots that "
             "it computes are computed.\n"
             "        None: every rank holds columns of every expert, once.\n\n"
             "Raises:\n"
             "    ShapeError: a shape that does not fit the others.\n"
             "    DTypeError: a dtype that is not accepted, or no tensor.\n"
             "    RangeError: an index outside -1..E-1, or a weight that is not finite; names "
             "token, choice and value.\n"
             "    ArgumentError: a tensor that is not contiguous, not in CPU memory, read-only "
             "(out) or overlapping (out); a\n"
             "        num_experts out of range; a batch in use by another thread.\n\n"
             "Example:\n"
             "    >>> import numpy as np\n"
             "    >>> batch = Batch()\n"
             "    >>> batch.route(np.ones((3, 4), np.float32), np.zeros((3, 1), int), np.ones((3, "
             "1), np.float32), 2)\n"
             "    >>> batch.shape\n"
             "    (3, 4, 1)\n");

static const tensor_where on_cpu = {.place = TENSOR_ON_CPU};

static bool check_layout(core_state *state, PyObject *layout, int32_t E) {
  if (layout == Py_None) return true;
  if (!Py_IS_TYPE(layout, state->layout_type)) {
    PyErr_Format(PyExc_TypeError, "layout: expected moeshard._core.Layout or None, got %R",
                 Py_TYPE(layout));
    return false;
  }
  int32_t experts = ((layout_object *)layout)->experts;
  if (experts != E)
    core_fail(state, MS_ESHAPE, "layout: it has %d experts, expected num_experts=%d", experts, E);
  return experts == E;
}

static PyObject *batch_route(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"hidden_states", "top_k_index", "top_k_weights", "num_experts", "out",
                          "layer",         "replicated",  "layout",        NULL};
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  PyObject *tensors[4] = {NULL, NULL, NULL, Py_None};
  long long experts, layer = 0;
  int replicated = 0;
  PyObject *layout = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOL|O$LpO:route", names, &tensors[0],
                                   &tensors[1], &tensors[2], &experts, &tensors[3], &layer,
                                   &replicated, &layout))
    return NULL;
  int32_t E;
  if (!core_int32(state, "num_experts", experts, &E)) return NULL;
  if (!check_layout(state, layout, E)) return NULL;

  // Tensors are opened before the batch is taken and closed after it is left: both may run any Python code.
  routing_views v = {0};
  batch_debts debts = {0};
  PyObject *result = NULL;
  if (routing_take(state, tensors, &on_cpu, &v)) goto done;
  if (!core_batch_enter(state, self)) goto done;
  core_batch_forget_route(self, &debts);
  self->grouped = false;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_route(self->batch, v.hidden.data, v.hidden.type, v.index.data, v.index.type,
                              v.weights.data, v.weights.type, v.hidden.shape[0], v.hidden.shape[1],
                              (int32_t)v.index.shape[1], E, v.out.data, &err);
  PyEval_RestoreThread(gil);
  if (status == MS_OK) {
    self->batch->layer = layer;
    self->batch->replicated = replicated;
    self->routed = true;
    if (layout != Py_None) {
      self->layout = Py_NewRef(layout);
      self->batch->layout = ((layout_object *)layout)->layout;
    }
    self->hidden = v.hidden.hold;
    self->out = v.out.hold;
    v.hidden.hold = v.out.hold = (tensor_hold){0};
  }
  core_batch_leave(self);
  result = core_none(state, status, &err);
done:
  routing_close(&v);
  core_batch_pay(&debts);
  return result;
}

// ---- step 2, the half for a transport in Python -------------------------------------------------

enum { HEADER_WORDS = sizeof(ms_header) / sizeof(int64_t) };
_Static_assert(sizeof(ms_header) % sizeof(int64_t) == 0, "a header travels as int64 words");

PyDoc_STRVAR(header_doc, "header($self, /, call)\n--\n\n"
                         "What ranks tell each other before a call: send it to all of them, then "
                         "header_check what came.\n\n"
                         "Args:\n"
                         "    call: number of this call, the same on all ranks.\n\n"
                         "Returns:\n"
                         "    [9] int64, the words of ms_header in csrc/moeshard.h: call, layer, "
                         "T, D, K, E, dtype and replicated\n"
                         "    (int32 each), digest of the routing, digest of the layout.\n\n"
                         "Raises:\n"
                         "    ArgumentError: a negative call, or nothing routed.\n");

static PyObject *batch_header(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"call", NULL};
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  long long call;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L:header", names, &call)) return NULL;
  if (call < 0) return core_fail(state, MS_EINVAL, "call: got %lld, expected at least 0", call);
  if (!core_batch_enter(state, self)) return NULL;
  PyObject *words = NULL;
  if (check_routed(state, self, "header")) {
    ms_header header;
    ms_header_fill(self->batch, (uint64_t)call, &header);
    words = array_copy(NPY_INT64, 1, HEADER_WORDS, 0, &header);
  }
  core_batch_leave(self);
  return words;
}

PyDoc_STRVAR(
    header_check_doc,
    "header_check($module, headers, /)\n--\n\n"
    "Compare the headers of all ranks: the same verdict, with the same text, on every rank.\n\n"
    "Args:\n"
    "    headers: [R, 9] int64, Batch.header of every rank.\n\n"
    "Raises:\n"
    "    RankMismatch: names what differs, the ranks and both values.\n"
    "    ShapeError, DTypeError: not such an array.\n");

static PyObject *header_check(PyObject *module, PyObject *headers) {
  core_state *state = PyModule_GetState(module);
  array_need need = {
      .name = "headers", .type = NPY_INT64, .ndim = 2, .shape = {-1, HEADER_WORDS}, .dims = "R, 9"};
  PyArrayObject *array = array_take(state, headers, &need);
  if (!array) return NULL;
  int32_t R;
  PyObject *result = NULL;
  if (core_int32(state, "headers", PyArray_DIM(array, 0), &R)) {
    ms_error err;
    result = core_none(state, ms_header_check(PyArray_DATA(array), R, &err), &err);
  }
  Py_DECREF(array);
  return result;
}

// Rows of all ranks: as many as `tokens` says, the same tokens when replicated.
static int count_rows(core_state *state, const ms_batch *batch, PyArrayObject *tokens, int64_t *N) {
  const int64_t *count = PyArray_DATA(tokens);
  *N = 0;
  for (npy_intp r = 0; r < PyArray_DIM(tokens, 0); r++)
    if (count[r] < 0 || __builtin_add_overflow(*N, count[r], N)) {
      core_fail(state, MS_EINVAL, "tokens[%zd]: got %lld, expected the tokens of a rank", r,
                (long long)count[r]);
      return -1;
    }
  if (batch->replicated) *N = batch->T;
  return 0;
}

// What a transport brings, as it is kept: rows, then the routing.
enum { HIDDEN, ROUTING };
static const char *const brought[BATCH_GATHERED] = {"hidden_states", "top_k_index",
                                                    "top_k_weights"};

static void close_brought(tensor_view views[BATCH_GATHERED]) {
  for (int i = 0; i < BATCH_GATHERED; i++) tensor_view_close(&views[i]);
}

// Open tensors[first .. end).
static int open_brought(core_state *state, PyObject *const tensors[BATCH_GATHERED], int first,
                        int end, tensor_view views[BATCH_GATHERED]) {
  for (int i = first; i < end; i++)
    if (tensor_view_open(state, tensors[i], brought[i], false, NULL, &views[i])) return -1;
  return 0;
}

static int check_hidden(core_state *state, const ms_batch *batch, int64_t rows, const char *dims,
                        tensor_view *view) {
  tensor_need need = {.name = brought[HIDDEN],
                      .dtypes = 1u << batch->dtype,
                      .ndim = 2,
                      .shape = {rows, batch->D},
                      .dims = dims};
  return tensor_view_check(state, &need, view);
}

static int check_routing(core_state *state, const ms_batch *batch, int64_t N,
                         tensor_view views[BATCH_GATHERED]) {
  const ms_dtype dtypes[] = {MS_I32, MS_F32};
  for (int i = ROUTING; i < BATCH_GATHERED; i++) {
    tensor_need need = {.name = brought[i],
                        .dtypes = 1u << dtypes[i - ROUTING],
                        .ndim = 2,
                        .shape = {N, batch->K},
                        .dims = "NK"};
    if (tensor_view_check(state, &need, &views[i])) return -1;
  }
  return 0;
}

static void keep_brought(batch_object *self, int first, int end, tensor_view *views) {
  for (int i = first; i < end; i++) {
    self->arrays[i] = views[i].hold;
    views[i].hold = (tensor_hold){0};
  }
}

// With the batch taken. rows: hidden_states is there too. None, or NULL with an exception set.
static PyObject *gather_from(core_state *state, batch_object *self, bool rows, int32_t rank,
                             PyArrayObject *tokens, tensor_view views[BATCH_GATHERED],
                             batch_debts *debts) {
  int64_t N;
  int32_t R;
  ms_error err;
  if (!check_routed(state, self, rows ? "gather_from" : "gather_routing")) return NULL;
  if (!core_int32(state, "tokens", PyArray_DIM(tokens, 0), &R)) return NULL;
  if (count_rows(state, self->batch, tokens, &N)) return NULL;
  if (rows && check_hidden(state, self->batch, N, "ND", &views[HIDDEN])) return NULL;
  if (check_routing(state, self->batch, N, views)) return NULL;
  core_batch_forget_gather(self, debts);
  self->grouped = false;
  const int64_t *of_ranks = PyArray_DATA(tokens);
  const int32_t *index = views[ROUTING].data;
  const float *weight = views[ROUTING + 1].data;
  ms_status status =
      rows ? ms_gather_from(self->batch, rank, R, of_ranks, views[HIDDEN].data, index, weight, &err)
           : ms_gather_routing(self->batch, rank, R, of_ranks, index, weight, &err);
  if (status == MS_OK) {
    *(rows ? &self->gathered : &self->counted) = true;
    keep_brought(self, rows ? HIDDEN : ROUTING, BATCH_GATHERED, views);
  }
  return core_none(state, status, &err);
}

// gather_from and gather_routing, whose arguments are (rank, tokens, then tensors[first ..]).
static PyObject *take_gathered(PyObject *object, long long rank, PyObject *counts,
                               PyObject *const tensors[BATCH_GATHERED], int first) {
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  array_need need = {.name = "tokens", .type = NPY_INT64, .ndim = 1, .shape = {-1}, .dims = "R"};
  int32_t me;
  PyArrayObject *tokens = NULL;
  PyObject *result = NULL;
  tensor_view views[BATCH_GATHERED] = {{0}};
  batch_debts debts = {0};
  if (!core_int32(state, "rank", rank, &me)) return NULL;
  if (!(tokens = array_take(state, counts, &need))) return NULL;
  if (open_brought(state, tensors, first, BATCH_GATHERED, views)) goto done;
  if (!core_batch_enter(state, self)) goto done;
  result = gather_from(state, self, first == HIDDEN, me, tokens, views, &debts);
  core_batch_leave(self);
done:
  close_brought(views);
  core_batch_pay(&debts);
  Py_XDECREF((PyObject *)tokens);
  return result;
}

PyDoc_STRVAR(
    gather_from_doc,
    "gather_from($self, /, rank, tokens, hidden_states, top_k_index, top_k_weights)\n--\n\n"
    "Step 2 with rows that a transport in Python has brought. Instead of Exchange.gather.\n\n"
    "The arrays are borrowed, and kept alive, until combine_ranks or the next route.\n\n"
    "Args:\n"
    "    rank: this rank.\n"
    "    tokens: [R] integers, tokens of each rank; N is their sum (T when replicated).\n"
    "    hidden_states: [N, D] of the dtype given to route, contiguous, in rank order.\n"
    "    top_k_index: [N, K] int32, contiguous.\n"
    "    top_k_weights: [N, K] float32, contiguous.\n\n"
    "Raises:\n"
    "    ShapeError, DTypeError: an array that does not fit the batch; a layout of other ranks.\n"
    "    ArgumentError: nothing routed; tokens[rank] is not T; a rank out of range.\n");

static PyObject *batch_gather_from(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"rank", "tokens", "hidden_states", "top_k_index", "top_k_weights", NULL};
  PyObject *counts = NULL, *tensors[BATCH_GATHERED] = {NULL};
  long long rank;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LOOOO:gather_from", names, &rank, &counts,
                                   &tensors[0], &tensors[1], &tensors[2]))
    return NULL;
  return take_gathered(object, rank, counts, tensors, HIDDEN);
}

PyDoc_STRVAR(gather_routing_doc,
             "gather_routing($self, /, rank, tokens, top_k_index, top_k_weights)\n--\n\n"
             "Step 2 for a sparse layout, first half: the routing of all ranks, but no rows.\n\n"
             "Then needed tells which rows go where, and gather_rows takes those that came.\n\n"
             "Args:\n"
             "    rank, tokens, top_k_index, top_k_weights: as in gather_from.\n\n"
             "Raises:\n"
             "    As gather_from.\n");

static PyObject *batch_gather_routing(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"rank", "tokens", "top_k_index", "top_k_weights", NULL};
  PyObject *counts = NULL, *tensors[BATCH_GATHERED] = {NULL};
  long long rank;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LOOO:gather_routing", names, &rank, &counts,
                                   &tensors[ROUTING], &tensors[ROUTING + 1]))
    return NULL;
  return take_gathered(object, rank, counts, tensors, ROUTING);
}

// With the batch taken: whether a transport in Python has brought the routing.
static bool check_brought(core_state *state, const batch_object *self, const char *step) {
  if (self->counted || (self->gathered && !self->exchange)) return true;
  core_fail(state, MS_EINVAL, "%s: gather_routing or gather_from has not run since the last route",
            step);
  return false;
}

static bool check_rank(core_state *state, const ms_batch *b, const char *name, long long rank) {
  if (rank >= 0 && rank < b->R) return true;
  core_fail(state, MS_EINVAL, "%s: got %lld, expected 0 to %d", name, rank, b->R - 1);
  return false;
}

PyDoc_STRVAR(
    needed_doc,
    "needed($self, /, source, reader)\n--\n\n"
    "The tokens of rank source that rank reader computes something of.\n\n"
    "Args:\n"
    "    source, reader: ranks.\n\n"
    "Returns:\n"
    "    [returned] int32, ascending, counted from the source's first token (of all tokens "
    "when replicated). Without a\n"
    "    sparse layout: all.\n\n"
    "Raises:\n"
    "    ArgumentError: gather_routing or gather_from has not run; a rank out of range.\n");

static PyObject *batch_needed(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"source", "reader", NULL};
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  long long source, reader;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LL:needed", names, &source, &reader)) return NULL;
  if (!core_batch_enter(state, self)) return NULL;
  const ms_batch *b = self->batch;
  PyObject *array = NULL;
  if (check_brought(state, self, "needed") && check_rank(state, b, "source", source) &&
      check_rank(state, b, "reader", reader)) {
    int64_t count = ms_gather_needed(b, (int32_t)source, (int32_t)reader, NULL);
    array = array_new(NPY_INT32, 1, count, 0);
    if (array) ms_gather_needed(b, (int32_t)source, (int32_t)reader, array_data(array));
  }
  core_batch_leave(self);
  return array;
}

static int64_t rows_to_come(const ms_batch *b) {
  int64_t rows = 0;
  for (int32_t r = 0; r < b->R && !b->replicated; r++)
    if (r != b->rank) rows += ms_gather_needed(b, r, b->rank, NULL);
  return rows;
}

PyDoc_STRVAR(
    gather_rows_doc,
    "gather_rows($self, hidden_states, /)\n--\n\n"
    "Step 2 for a sparse layout, second half, after gather_routing.\n\n"
    "Args:\n"
    "    hidden_states: [M, D] of the dtype given to route, contiguous: the rows of needed(r, "
    "rank) of "
    "each other rank r,\n"
    "        in rank order. Borrowed, and kept alive, until combine_ranks or the next route. Own "
    "rows are read from what\n"
    "        route was given.\n\n"
    "Raises:\n"
    "    ShapeError, DTypeError: not such rows.\n"
    "    ArgumentError: gather_routing has not run since the last gather.\n");

static PyObject *batch_gather_rows(PyObject *object, PyObject *rows) {
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  PyObject *result = NULL, *tensors[BATCH_GATHERED] = {rows};
  tensor_view views[BATCH_GATHERED] = {{0}};
  if (open_brought(state, tensors, HIDDEN, HIDDEN + 1, views)) goto done;
  if (!core_batch_enter(state, self)) goto done;
  if (!self->counted) {
    core_fail(state, MS_EINVAL, "gather_rows: gather_routing has not run since the last gather");
  } else if (!check_hidden(state, self->batch, rows_to_come(self->batch), "MD", views)) {
    ms_gather_received(self->batch, views[HIDDEN].data);
    keep_brought(self, HIDDEN, HIDDEN + 1, views);
    self->counted = false;
    self->gathered = true;
    result = Py_NewRef(Py_None);
  }
  core_batch_leave(self);
done:
  close_brought(views);
  return result;
}

PyDoc_STRVAR(take_doc, "take($self, tokens=None, /)\n--\n\n"
                       "Rows of this rank's own tokens, for a transport in Python to send.\n\n"
                       "Args:\n"
                       "    tokens: [n] integers, 0 to T-1, in any order. None: all.\n\n"
                       "Returns:\n"
                       "    [n, D], a copy: float32, or uint16 words for bfloat16 and float16.\n\n"
                       "Raises:\n"
                       "    RangeError: a token outside 0..T-1.\n"
                       "    ArgumentError: nothing routed, or already combined.\n");

static bool check_tokens(core_state *state, const int64_t *token, int64_t count, int64_t T) {
  for (int64_t i = 0; i < count; i++)
    if (token[i] < 0 || token[i] >= T) {
      core_fail(state, MS_ERANGE, "tokens[%lld]: got %lld, expected 0 to %lld", (long long)i,
                (long long)token[i], (long long)T - 1);
      return false;
    }
  return true;
}

static PyObject *batch_take(PyObject *object, PyObject *args) {
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  PyObject *like = Py_None, *array = NULL, *tokens = NULL;
  if (!PyArg_ParseTuple(args, "|O:take", &like)) return NULL;
  if (like != Py_None) { // as array_take, but there may be none
    PyObject *any = PyArray_FROM_O(like);
    if (any) tokens = PyArray_FROM_OTF(any, NPY_INT64, NPY_ARRAY_IN_ARRAY);
    Py_XDECREF(any);
    if (!tokens) return core_fail_from(state, MS_EDTYPE, "tokens: expected integers [n]");
  }
  if (!core_batch_enter(state, self)) goto done;
  const ms_batch *b = self->batch;
  const int64_t *token = tokens ? array_data(tokens) : NULL;
  int64_t count = tokens ? (int64_t)PyArray_SIZE((PyArrayObject *)tokens) : b->T;
  if (check_routed(state, self, "take") && (!tokens || check_tokens(state, token, count, b->T)) &&
      (array = array_new(b->dtype == MS_F32 ? NPY_FLOAT : NPY_UINT16, 2, count, b->D))) {
    char *to = array_data(array);
    size_t bytes = (size_t)(b->D * ms_dtype_size(b->dtype));
    PyThreadState *gil = PyEval_SaveThread();
    for (int64_t i = 0; i < count; i++, to += bytes)
      memcpy(to, (const char *)b->hidden + (size_t)(token ? token[i] : i) * bytes, bytes);
    PyEval_RestoreThread(gil);
  }
  core_batch_leave(self);
done:
  Py_XDECREF(tokens);
  return array;
}

// ---- steps 3 and 4 ------------------------------------------------------------------------------

PyDoc_STRVAR(
    group_doc,
    "group($self, /)\n--\n\n"
    "Step 3: sort the (token, choice) slots of all ranks by expert. Tokens are not moved.\n\n"
    "Raises:\n"
    "    ArgumentError: nothing was gathered.\n"
    "    RangeError: a gathered index outside -1..E-1.\n");

static PyObject *batch_group(PyObject *object, PyObject *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  if (!enter_gathered(state, self, "group")) return NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_group(self->batch, &err);
  PyEval_RestoreThread(gil);
  self->grouped = status == MS_OK;
  leave_gathered(self);
  return core_none(state, status, &err);
}

PyDoc_STRVAR(
    ffn_doc,
    "ffn($self, experts, /)\n--\n\n"
    "Step 4: both matrices of every expert, this rank's columns, for the slots of all ranks.\n\n"
    "The same bits for any number of threads, and for a token whatever its neighbours are.\n\n"
    "Args:\n"
    "    experts: PackedExperts with the E and D that were routed.\n\n"
    "Raises:\n"
    "    ShapeError: experts of another E or D.\n"
    "    ArgumentError: the batch was not grouped since the last gather.\n");

static PyObject *batch_ffn(PyObject *object, PyObject *experts) {
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  if (!Py_IS_TYPE(experts, state->experts_type)) {
    PyErr_SetString(PyExc_TypeError, "experts: expected moeshard._core.PackedExperts");
    return NULL;
  }
  core_pool *pool = core_pool_take(state);
  if (!pool) return NULL;
  PyObject *result = NULL;
  if (!enter_gathered(state, self, "ffn")) goto done;
  if (self->grouped) {
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    ms_status status =
        ms_ffn(self->batch, ((experts_object *)experts)->experts, pool->threads, &err);
    PyEval_RestoreThread(gil);
    result = core_none(state, status, &err);
  } else {
    core_fail(state, MS_EINVAL, "ffn: nothing was grouped since the last gather");
  }
  leave_gathered(self);
done:
  core_pool_give_back(state, pool);
  return result;
}

// ---- step 5, the halves for a transport in Python -----------------------------------------------

// Take a batch whose rows gather_from brought. False with an exception set and nothing taken.
static bool enter_gathered_from(core_state *state, batch_object *self, const char *step) {
  if (!enter_gathered(state, self, step)) return false;
  if (!self->exchange) return true;
  core_fail(state, MS_EINVAL, "%s: the rows were gathered by an exchange, call its combine", step);
  leave_gathered(self);
  return false;
}

// partial [N, D] as an array, which keeps the memory when the batch needs new memory first (settle_lease).
static PyObject *lease_partial(batch_object *self) {
  const ms_batch *b = self->batch;
  if (!b->partial || b->N == 0) return array_new(NPY_FLOAT, 2, b->N, b->D);
  if (!self->lease) {
    ms_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return PyErr_NoMemory();
    if (!(self->lease = PyCapsule_New(buffer, lease_name, free_lease))) {
      free(buffer);
      return NULL;
    }
  }
  npy_intp shape[2] = {(npy_intp)b->N, (npy_intp)b->D};
  PyObject *array = PyArray_SimpleNewFromData(2, shape, NPY_FLOAT, b->partial);
  if (array && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(self->lease)))
    Py_CLEAR(array);
  return array;
}

PyDoc_STRVAR(
    combine_choices_doc,
    "combine_choices($self, /)\n--\n\n"
    "Step 5, first half: the sum of the K choices of each token, over this rank's columns.\n\n"
    "Returns:\n"
    "    [N, D] float32, this rank's partial outputs for the tokens of all ranks; with a sparse "
    "layout, rows of tokens that\n"
    "    it computes nothing of hold anything. Not a copy: later steps of this call write to it; "
    "from "
    "the next gather on it\n"
    "    is the caller's own.\n\n"
    "Raises:\n"
    "    ArgumentError: not gathered by gather_from, or ffn has not run.\n");

static PyObject *batch_combine_choices(PyObject *object, PyObject *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  core_pool *pool = core_pool_take(state);
  if (!pool) return NULL;
  PyObject *array = NULL;
  if (!enter_gathered_from(state, self, "combine_choices")) goto done;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_combine_choices(self->batch, pool->threads, &err);
  PyEval_RestoreThread(gil);
  array = status == MS_OK ? lease_partial(self) : core_raise(state, &err);
  leave_gathered(self);
done:
  core_pool_give_back(state, pool);
  return array;
}

static int open_parts(core_state *state, PyObject *parts, Py_ssize_t count, tensor_view *views) {
  for (Py_ssize_t r = 0; r < count; r++) {
    PyObject *part = PySequence_GetItem(parts, r);
    int failed = part ? tensor_view_open(state, part, "parts", false, NULL, &views[r]) : -1;
    Py_XDECREF(part);
    if (failed) return -1;
  }
  return 0;
}

// With the batch taken.
static PyObject *combine_ranks(core_state *state, batch_object *self, core_pool *pool,
                               Py_ssize_t count, tensor_view *views, const float **data) {
  const ms_batch *b = self->batch;
  if (count != b->R)
    return core_fail(state, MS_ESHAPE,
                     "parts: got %zd arrays, expected one of each of the %d ranks", count, b->R);
  for (Py_ssize_t r = 0; r < count; r++) {
    bool all = r == b->rank || !ms_sparse(b);
    tensor_need need = {
        .name = "parts",
        .dtypes = 1u << MS_F32,
        .ndim = 2,
        .shape = {all ? b->T : ms_gather_needed(b, b->rank, (int32_t)r, NULL), b->D},
        .dims = all ? "TD" : "MD"};
    if (tensor_view_check(state, &need, &views[r])) return NULL;
    data[r] = views[r].data;
  }
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_combine_ranks(self->batch, data, (int32_t)count, true, pool->threads, &err);
  PyEval_RestoreThread(gil);
  return core_none(state, status, &err);
}

PyDoc_STRVAR(combine_ranks_doc, "combine_ranks($self, parts, /)\n--\n\n"
                                "Step 5, second half: out[t] = the sum of all ranks' partial "
                                "outputs for this rank's tokens, in rank order.\n\n"
                                "Closes the call: the batch lets go of what it has borrowed. "
                                "Without an out, that is all it does.\n\n"
                                "Args:\n"
                                "    parts: R arrays [T, D] float32, contiguous, in rank order. "
                                "With a sparse layout those of other ranks\n"
                                "        have only the rows of needed(rank, r).\n\n"
                                "Raises:\n"
                                "    ShapeError: not R arrays, or one that is not [T, D].\n"
                                "    DTypeError: not float32.\n"
                                "    ArgumentError: not gathered by gather_from.\n");

static PyObject *batch_combine_ranks(PyObject *object, PyObject *parts) {
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  Py_ssize_t count = PySequence_Size(parts);
  if (count < 0) return NULL;
  batch_debts debts = {0};
  PyObject *result = NULL;
  core_pool *pool = NULL;
  tensor_view *views = PyMem_Calloc((size_t)count, sizeof *views);
  const float **data = PyMem_Calloc((size_t)count, sizeof *data);
  if (!views || !data) {
    PyErr_NoMemory();
    goto done;
  }
  if (open_parts(state, parts, count, views)) goto done;
  if (!(pool = core_pool_take(state))) goto done;
  if (!enter_gathered_from(state, self, "combine_ranks")) goto done;
  result = combine_ranks(state, self, pool, count, views, data);
  if (result) core_batch_forget_route(self, &debts);
  core_batch_leave(self);
done:
  core_pool_give_back(state, pool);
  for (Py_ssize_t r = 0; views && r < count; r++) tensor_view_close(&views[r]);
  PyMem_Free(data);
  PyMem_Free(views);
  core_batch_pay(&debts);
  return result;
}

// ---- what is in it ------------------------------------------------------------------------------

PyDoc_STRVAR(routing_doc,
             "routing($self, /)\n--\n\n"
             "What route has taken of this rank's tokens.\n\n"
             "Returns:\n"
             "    (top_k_index [T, K] int32, top_k_weights [T, K] float32), copies.\n\n"
             "Raises:\n"
             "    ArgumentError: nothing routed, or already combined.\n");

static PyObject *batch_routing(PyObject *object, PyObject *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  PyObject *index = NULL, *weights = NULL, *pair = NULL;
  if (!core_batch_enter(state, self)) return NULL;
  const ms_batch *b = self->batch;
  if (!check_routed(state, self, "routing")) goto done;
  if (!(index = array_copy(NPY_INT32, 2, b->T, b->K, b->expert))) goto done;
  if (!(weights = array_copy(NPY_FLOAT, 2, b->T, b->K, b->weight))) goto done;
  pair = PyTuple_Pack(2, index, weights);
done:
  core_batch_leave(self);
  Py_XDECREF(index);
  Py_XDECREF(weights);
  return pair;
}

PyDoc_STRVAR(
    rows_doc,
    "rows($self, /)\n--\n\n"
    "The gathered tokens of all ranks.\n\n"
    "Returns:\n"
    "    [N, D], a copy, in rank order: float32, or uint16 words for bfloat16 and float16. Rows "
    "that gather_rows did not bring\n"
    "    are zero.\n\n"
    "Raises:\n"
    "    ArgumentError: nothing was gathered, or already combined.\n");

static PyObject *batch_rows(PyObject *object, PyObject *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  if (!enter_gathered(state, self, "rows")) return NULL;
  const ms_batch *b = self->batch;
  PyObject *array = array_new(b->dtype == MS_F32 ? NPY_FLOAT : NPY_UINT16, 2, b->N, b->D);
  if (array) {
    char *to = array_data(array);
    size_t bytes = (size_t)(b->D * ms_dtype_size(b->dtype));
    PyThreadState *gil = PyEval_SaveThread();
    for (int64_t i = 0; i < b->N; i++, to += bytes)
      b->row[i] ? memcpy(to, b->row[i], bytes) : memset(to, 0, bytes);
    PyEval_RestoreThread(gil);
  }
  leave_gathered(self);
  return array;
}

// [n] int64: the lengths of n consecutive ranges, from their n + 1 limits.
static PyObject *lengths(const int64_t *limits, int64_t n) {
  PyObject *array = array_new(NPY_INT64, 1, n, 0);
  for (int64_t i = 0; array && i < n; i++)
    ((int64_t *)array_data(array))[i] = limits[i + 1] - limits[i];
  return array;
}

PyDoc_STRVAR(counts_doc, "counts($self, own=False, /)\n--\n\n"
                         "How many (token, choice) slots of all ranks each expert has.\n\n"
                         "Args:\n"
                         "    own: only those that this rank computes, wholly or in part.\n\n"
                         "Returns:\n"
                         "    [E] int64. Slots without an expert are in none of them.\n\n"
                         "Raises:\n"
                         "    ArgumentError: not grouped since the last gather.\n");

static PyObject *batch_counts(PyObject *object, PyObject *args) {
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  int own = 0;
  if (!PyArg_ParseTuple(args, "|p:counts", &own)) return NULL;
  if (!core_batch_enter(state, self)) return NULL;
  const ms_batch *b = self->batch;
  PyObject *array = NULL;
  if (!self->grouped)
    core_fail(state, MS_EINVAL, "counts: nothing was grouped since the last gather");
  else
    array = own ? lengths(b->offset, b->E) : array_copy(NPY_INT64, 1, b->E, 0, b->count);
  core_batch_leave(self);
  return array;
}

static PyObject *get_rows_read(PyObject *object, void *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  if (!core_batch_enter(state, self)) return NULL;
  const ms_batch *b = self->batch;
  PyObject *pair = NULL;
  if (!self->grouped)
    core_fail(state, MS_EINVAL, "rows_read: nothing was grouped since the last gather");
  else
    pair = Py_BuildValue("(LL)", (long long)b->tokens_read, (long long)b->partials_read);
  core_batch_leave(self);
  return pair;
}

static PyObject *get_sparse(PyObject *object, void *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  if (!core_batch_enter(core_state_of(object), self)) return NULL;
  bool sparse = ms_sparse(self->batch) != NULL;
  core_batch_leave(self);
  return PyBool_FromLong(sparse);
}

static PyObject *get_tokens_per_rank(PyObject *object, void *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  core_state *state = core_state_of(object);
  if (!core_batch_enter(state, self)) return NULL;
  const ms_batch *b = self->batch;
  PyObject *array = NULL;
  if (b->R < 1)
    core_fail(state, MS_EINVAL, "tokens_per_rank: nothing was gathered since the last route");
  else
    array = lengths(b->first, b->R);
  core_batch_leave(self);
  return array;
}

static PyObject *get_shape(PyObject *object, void *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  if (!core_batch_enter(core_state_of(object), self)) return NULL;
  const ms_batch *b = self->batch;
  PyObject *shape = Py_BuildValue("(LLi)", (long long)b->T, (long long)b->D, b->K);
  core_batch_leave(self);
  return shape;
}

static PyObject *get_dtype(PyObject *object, void *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  if (!core_batch_enter(core_state_of(object), self)) return NULL;
  ms_dtype dtype = self->batch->dtype;
  core_batch_leave(self);
  return PyUnicode_FromString(ms_dtype_name(dtype));
}

static PyObject *get_nbytes(PyObject *object, void *unused) {
  (void)unused;
  batch_object *self = as_batch(object);
  if (!core_batch_enter(core_state_of(object), self)) return NULL;
  int64_t bytes = ms_batch_bytes(self->batch);
  core_batch_leave(self);
  return PyLong_FromLongLong(bytes);
}

// ---- the type -----------------------------------------------------------------------------------

static PyMethodDef methods[] = {
    {"route", (PyCFunction)(void (*)(void))batch_route, METH_VARARGS | METH_KEYWORDS, route_doc},
    {"group", batch_group, METH_NOARGS, group_doc},
    {"ffn", batch_ffn, METH_O, ffn_doc},
    {"header", (PyCFunction)(void (*)(void))batch_header, METH_VARARGS | METH_KEYWORDS, header_doc},
    {"gather_from", (PyCFunction)(void (*)(void))batch_gather_from, METH_VARARGS | METH_KEYWORDS,
     gather_from_doc},
    {"gather_routing", (PyCFunction)(void (*)(void))batch_gather_routing,
     METH_VARARGS | METH_KEYWORDS, gather_routing_doc},
    {"needed", (PyCFunction)(void (*)(void))batch_needed, METH_VARARGS | METH_KEYWORDS, needed_doc},
    {"gather_rows", batch_gather_rows, METH_O, gather_rows_doc},
    {"take", batch_take, METH_VARARGS, take_doc},
    {"combine_choices", batch_combine_choices, METH_NOARGS, combine_choices_doc},
    {"combine_ranks", batch_combine_ranks, METH_O, combine_ranks_doc},
    {"routing", batch_routing, METH_NOARGS, routing_doc},
    {"rows", batch_rows, METH_NOARGS, rows_doc},
    {"counts", batch_counts, METH_VARARGS, counts_doc},
    {0}};

static PyGetSetDef getset[] = {
    {"tokens_per_rank", get_tokens_per_rank, NULL,
     "[R] int64: the tokens of each rank in the last gather; all of them at rank 0 when "
     "replicated.",
     NULL},
    {"rows_read", get_rows_read, NULL,
     "(tokens, partial outputs): rows of other ranks that ffn and combine of the last group read.",
     NULL},
    {"sparse", get_sparse, NULL,
     "Whether route was given a sparse layout: rows travel only where they are computed.", NULL},
    {"shape", get_shape, NULL, "(T, D, K) of the last route.", NULL},
    {"dtype", get_dtype, NULL, "The dtype of the last route's hidden_states.", NULL},
    {"nbytes", get_nbytes, NULL,
     "Bytes of memory held: it grows to the largest shape seen and never shrinks.", NULL},
    {0}};

PyDoc_STRVAR(
    type_doc,
    "Batch()\n--\n\n"
    "One forward pass, filled step by step: route, gather, group, ffn, combine. Used again for the "
    "next one.\n\n"
    "Steps 2 and 5 belong to the exchange: exchange.gather(batch), exchange.combine(batch). A "
    "transport written in\n"
    "Python uses header, gather_from (or gather_routing, needed and gather_rows), combine_choices "
    "and combine_ranks\n"
    "instead.\n\n"
    "For one thread at a time: a call that finds it in use by another raises ArgumentError.\n");

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},  {Py_tp_new, batch_new},
                              {Py_tp_dealloc, batch_dealloc}, {Py_tp_traverse, batch_traverse},
                              {Py_tp_clear, batch_clear},     {Py_tp_methods, methods},
                              {Py_tp_getset, getset},         {0, NULL}};

static PyType_Spec spec = {.name = "moeshard._core.Batch",
                           .basicsize = sizeof(batch_object),
                           .flags =
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
                           .slots = slots};

static PyMethodDef functions[] = {{"header_check", header_check, METH_O, header_check_doc}, {0}};

int core_add_batch(PyObject *module, core_state *state) {
  state->batch_type = core_add_type(module, &spec);
  return state->batch_type ? PyModule_AddFunctions(module, functions) : -1;
}
