// engine.c - the layer of moeshard_cuda.h for Python: Engine, whose forward enqueues a layer on the caller's stream.
// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"
#include "../../csrc/python/arrays.h"
#include "../../csrc/python/error.h"
#include "../../csrc/python/routing_args.h"

typedef struct engine_object {
  PyObject_HEAD ms_cuda_engine *engine;
  cuda_exchange_object *exchange; // NULL: one rank; kept alive, the engine only borrows it
  int32_t device;
  atomic_bool busy; // a call is running
} engine_object;

static engine_object *as_engine(PyObject *self) { return (engine_object *)self; }

// Take the engine for one call; false with ArgumentError set when another thread has it.
static bool enter(core_state *state, engine_object *self) {
  if (!atomic_exchange(&self->busy, true)) return true;
  core_fail(state, MS_EINVAL, "engine is in use by another thread");
  return false;
}

static void leave(engine_object *self) { atomic_store(&self->busy, false); }

// ---- construction -------------------------------------------------------------------------------

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"device", "exchange", "chunks", NULL};
  core_state *state = PyType_GetModuleState(type);
  PyObject *exchange = Py_None;
  long long number, asked = 1;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|O$L:Engine", names, &number, &exchange, &asked))
    return NULL;
  int32_t device, chunks;
  if (!core_int32(state, "device", number, &device)) return NULL;
  if (!core_int32(state, "chunks", asked, &chunks)) return NULL;
  if (exchange != Py_None && !Py_IS_TYPE(exchange, state->exchange_type))
    return core_fail(state, MS_EDTYPE, "exchange: expected a moeshard._cuda.NcclExchange or None");
  ms_cuda_exchange *ranks = NULL;
  if (exchange != Py_None && !(ranks = ((cuda_exchange_object *)exchange)->exchange))
    return core_fail(state, MS_ECOMM, "exchange: it is closed");

  engine_object *self = (engine_object *)PyType_GenericAlloc(type, 0);
  if (!self) return NULL;
  self->device = device;
  if (ranks) self->exchange = (cuda_exchange_object *)Py_NewRef(exchange);
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_engine_create(ranks, device, chunks, &self->engine, &err);
  PyEval_RestoreThread(gil);
  if (status == MS_OK) return (PyObject *)self;
  Py_DECREF(self);
  return core_raise(state, &err);
}

static void engine_dealloc(PyObject *object) {
  engine_object *self = as_engine(object);
  PyTypeObject *type = Py_TYPE(object);
  PyThreadState *gil = PyEval_SaveThread(); // waits for what is enqueued
  ms_cuda_engine_free(self->engine);
  PyEval_RestoreThread(gil);
  Py_XDECREF((PyObject *)self->exchange);
  PyObject_Free(object);
  Py_DECREF(type);
}

// ---- forward ------------------------------------------------------------------------------------

PyDoc_STRVAR(
    forward_doc,
    "forward($self, /, experts, hidden_states, top_k_index, top_k_weights, out, *, capacity=None, "
    "layer=0, replicated=False, tf32=False, layout=None)\n--\n\n"
    "Enqueue a whole layer, and return without waiting for it.\n\n"
    "It runs on the stream on which the library of hidden_states works now (torch's current "
    "stream); on the legacy\n"
    "default stream if that library has no DLPack exchange table. Collective with an exchange.\n\n"
    "If the device finds something wrong with the call, out becomes NaN on every rank, and a later "
    "call raises.\n\n"
    "Args:\n"
    "    experts: a moeshard._cuda.PackedExperts on the device of the engine.\n"
    "    hidden_states: [T, D] float32, bfloat16 or float16, contiguous, on that device, as are "
    "the others.\n"
    "    top_k_index: [T, K] int32 or int64, the experts of each token, 0 to E-1; -1 = no expert.\n"
    "    top_k_weights: [T, K] float32, bfloat16 or float16, finite; multiplies each expert's "
    "output.\n"
    "    out: [T, D] of the dtype of hidden_states, contiguous, not overlapping it.\n"
    "    capacity: rows to reserve for each rank, the same on all, at least the tokens of any. "
    "None: T.\n"
    "    layer: which layer this is; ranks check that they agree.\n"
    "    replicated: all ranks hold the same tokens; out is the sum over the ranks, on all of "
    "them.\n"
    "    tf32: multiply float32 matrices on tensor cores, with 10 bits of mantissa.\n"
    "    layout: the Layout of this rank, of the same table on all. None: every rank holds columns "
    "of every expert, once.\n\n"
    "Raises:\n"
    "    ShapeError, DTypeError, ArgumentError: a bad argument.\n"
    "    RangeError: an index outside -1..E-1 or a weight that is not finite, in an earlier call: "
    "the device finds it.\n"
    "    RankMismatch: ranks that disagree about an earlier call.\n"
    "    CudaError, CommError: a call of the CUDA runtime or of NCCL failed.\n");

static PyObject *engine_forward(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"experts", "hidden_states", "top_k_index", "top_k_weights",
                          "out",     "capacity",      "layer",       "replicated",
                          "tf32",    "layout",        NULL};
  engine_object *self = as_engine(object);
  core_state *state = core_state_of(object);
  PyObject *experts = NULL, *tensors[4] = {NULL}, *room = Py_None, *layout = Py_None;
  long long layer = 0;
  int replicated = 0, tf32 = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO|$OLppO:forward", names, &experts,
                                   &tensors[0], &tensors[1], &tensors[2], &tensors[3], &room,
                                   &layer, &replicated, &tf32, &layout))
    return NULL;
  if (!Py_IS_TYPE(experts, state->experts_type))
    return core_fail(state, MS_EDTYPE, "experts: expected a moeshard._cuda.PackedExperts");
  if (layout != Py_None && !Py_IS_TYPE(layout, state->layout_type))
    return core_fail(state, MS_EDTYPE, "layout: expected a moeshard._cuda.Layout or None");
  if (tensors[3] == Py_None)
    return core_fail(state, MS_EDTYPE, "out: got None, expected a tensor like hidden_states");
  long long capacity = room == Py_None ? -1 : PyLong_AsLongLong(room);
  if (capacity == -1 && PyErr_Occurred()) return NULL;
  const ms_cuda_experts *packed = ((cuda_experts_object *)experts)->experts;

  // Tensors are opened before the engine is taken and closed after it is left: both may run any Python code.
  tensor_where where = {.place = TENSOR_ON_CUDA, .device = self->device};
  if (tensor_stream(state, tensors[0], self->device, &where.stream)) return NULL;
  routing_views v = {0};
  PyObject *result = NULL;
  if (routing_take(state, tensors, &where, &v)) goto done;
  ms_cuda_call call = {.hidden = v.hidden.data,
                       .index = v.index.data,
                       .weight = v.weights.data,
                       .out = v.out.data,
                       .dtype = v.hidden.type,
                       .index_dtype = v.index.type,
                       .weight_dtype = v.weights.type,
                       .tokens = v.hidden.shape[0],
                       .capacity = capacity < 0 ? v.hidden.shape[0] : capacity,
                       .K = (int32_t)v.index.shape[1],
                       .layer = layer,
                       .replicated = replicated,
                       .tf32 = tf32,
                       .layout = layout == Py_None ? NULL : ((cuda_layout_object *)layout)->layout};
  if (v.hidden.shape[1] != packed->spec.D) {
    core_fail(state, MS_ESHAPE,
              "hidden_states: got [T=%lld, D=%lld], expected D=%lld as the experts",
              (long long)call.tokens, (long long)v.hidden.shape[1], (long long)packed->spec.D);
    goto done;
  }
  if (capacity >= 0 && capacity < call.tokens) {
    core_fail(state, MS_EINVAL, "capacity: got %lld, expected at least T=%lld", capacity,
              (long long)call.tokens);
    goto done;
  }
  if (!enter(state, self)) goto done;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_forward(self->engine, packed, &call, where.stream, &err);
  PyEval_RestoreThread(gil);
  leave(self);
  result = core_none(state, status, &err);
done:
  routing_close(&v);
  return result;
}

PyDoc_STRVAR(faults_doc,
             "faults($self, /)\n--\n\n"
             "Wait for the calls so far and raise what they found on the device. Without it, the "
             "next forward raises it.\n\n"
             "Raises:\n"
             "    RangeError, RankMismatch, CudaError, CommError: see forward.\n");

static PyObject *engine_faults(PyObject *object, PyObject *unused) {
  (void)unused;
  engine_object *self = as_engine(object);
  core_state *state = core_state_of(object);
  if (!enter(state, self)) return NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_engine_faults(self->engine, &err);
  PyEval_RestoreThread(gil);
  leave(self);
  return core_none(state, status, &err);
}

// ---- times, for profiles ------------------------------------------------------------------------

PyDoc_STRVAR(
    record_doc,
    "start_recording($self, /)\n--\n\n"
    "Record every call from now on: when its steps begin on the device. Captured calls are "
    "not.\n\n"
    "Waits for the device; times count from the moment at which this returns. Legal "
    "twice.\n\n"
    "Raises:\n"
    "    CudaError: a call of the CUDA runtime failed.\n");

static PyObject *engine_start_recording(PyObject *object, PyObject *unused) {
  (void)unused;
  engine_object *self = as_engine(object);
  core_state *state = core_state_of(object);
  if (!enter(state, self)) return NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_engine_record(self->engine, true, &err);
  PyEval_RestoreThread(gil);
  leave(self);
  return core_none(state, status, &err);
}

PyDoc_STRVAR(stamp_doc,
             "stamp($self, tensor, /)\n--\n\n"
             "The model's router begins to work for the next call, on the stream on which the "
             "library of `tensor` works.\n\n"
             "Nothing while nobody records.\n\n"
             "Raises:\n"
             "    CudaError: a call of the CUDA runtime failed.\n");

static PyObject *engine_stamp(PyObject *object, PyObject *tensor) {
  engine_object *self = as_engine(object);
  core_state *state = core_state_of(object);
  void *stream = NULL;
  if (tensor_stream(state, tensor, self->device, &stream)) return NULL;
  if (!enter(state, self)) return NULL;
  ms_error err;
  ms_status status = ms_cuda_engine_stamp(self->engine, stream, &err);
  leave(self);
  return core_none(state, status, &err);
}

static PyObject *times_as_tuple(const ms_cuda_times *t) {
  PyObject *steps = PyTuple_New(MS_CUDA_STEPS), *result = NULL;
  PyObject *seen = array_copy(NPY_INT64, 1, (int64_t)t->E + 1, 0, t->after);
  if (!steps || !seen) goto done;
  int64_t *counts = array_data(seen);
  for (int32_t e = 0; e <= t->E; e++) counts[e] -= t->before[e];
  for (int32_t i = 0; i < MS_CUDA_STEPS; i++) {
    PyObject *value = PyFloat_FromDouble(t->step[i]);
    if (!value || PyTuple_SetItem(steps, i, value)) goto done;
  }
  result = Py_BuildValue("(LLisddOO)", (long long)t->layer, (long long)t->tokens, (int)t->K,
                         ms_dtype_name(t->dtype), t->block, t->begin, steps, seen);
done:
  Py_XDECREF(steps);
  Py_XDECREF(seen);
  return result;
}

PyDoc_STRVAR(stop_doc,
             "stop_recording($self, /)\n--\n\n"
             "Wait for the device and stop.\n\n"
             "Returns:\n"
             "    A list, in the order of the calls, of (layer, tokens, choices, dtype, block, "
             "begin, steps, seen). block: when\n"
             "    the router began to work, nan if nobody said so with `stamp`; begin: when the "
             "layer began: nanoseconds\n"
             "    since recording began. steps: nanoseconds in route, gather, group, ffn and "
             "combine. seen: [E+1] int64,\n"
             "    slots of each expert, all slots; zeros if the call had a fault.\n\n"
             "Raises:\n"
             "    CudaError: a call of the CUDA runtime failed.\n");

static PyObject *engine_stop_recording(PyObject *object, PyObject *unused) {
  (void)unused;
  engine_object *self = as_engine(object);
  core_state *state = core_state_of(object);
  if (!enter(state, self)) return NULL;
  ms_error err;
  int64_t count = 0;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_engine_recorded(self->engine, &count, &err);
  PyEval_RestoreThread(gil);
  PyObject *list = NULL;
  if (status != MS_OK) {
    core_raise(state, &err);
    goto done;
  }
  if (!(list = PyList_New(0))) goto done;
  for (int64_t i = 0; i < count; i++) {
    ms_cuda_times times;
    PyObject *call = NULL;
    if (ms_cuda_engine_times(self->engine, i, &times, &err) != MS_OK)
      core_raise(state, &err);
    else
      call = times_as_tuple(&times);
    if (!call || PyList_Append(list, call)) Py_CLEAR(list);
    Py_XDECREF(call);
    if (!list) goto done;
  }
  gil = PyEval_SaveThread();
  status = ms_cuda_engine_record(self->engine, false, &err);
  PyEval_RestoreThread(gil);
  if (status != MS_OK) {
    Py_CLEAR(list);
    core_raise(state, &err);
  }
done:
  leave(self);
  return list;
}

static PyObject *get_device(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLong(as_engine(self)->device);
}

// ---- the type -----------------------------------------------------------------------------------

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void (*)(void))engine_forward, METH_VARARGS | METH_KEYWORDS,
     forward_doc},
    {"faults", engine_faults, METH_NOARGS, faults_doc},
    {"start_recording", engine_start_recording, METH_NOARGS, record_doc},
    {"stamp", engine_stamp, METH_O, stamp_doc},
    {"stop_recording", engine_stop_recording, METH_NOARGS, stop_doc},
    {0}};

static PyGetSetDef getset[] = {
    {"device", get_device, NULL, "The number of the CUDA device it computes on.", NULL}, {0}};

PyDoc_STRVAR(type_doc,
             "Engine(device, exchange=None, *, chunks=1)\n--\n\n"
             "What runs layers on one CUDA device: workspace, streams and events. For one thread "
             "at a time.\n\n"
             "Its memory grows to the largest layer seen; after that a call allocates nothing.\n\n"
             "Args:\n"
             "    device: the number of the CUDA device.\n"
             "    exchange: a moeshard._cuda.NcclExchange of this device. None: one rank.\n"
             "    chunks: pieces that tokens are cut into, so that they travel while others are "
             "computed.\n\n"
             "Raises:\n"
             "    CudaError: no such device, or a call of the CUDA runtime failed.\n"
             "    CommError: the exchange is closed.\n");

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},   {Py_tp_new, engine_new},
                              {Py_tp_dealloc, engine_dealloc}, {Py_tp_methods, methods},
                              {Py_tp_getset, getset},          {0, NULL}};

static PyType_Spec type_spec = {.name = "moeshard._cuda.Engine",
                                .basicsize = sizeof(engine_object),
                                .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                .slots = slots};

int cuda_add_engine(PyObject *module, core_state *state) {
  (void)state;
  PyTypeObject *type = core_add_type(module, &type_spec);
  Py_XDECREF((PyObject *)type); // the module keeps it
  return type ? 0 : -1;
}
