// experts.c - chapter W for Python: PackedExperts, this rank's columns of every expert.
// SPDX-License-Identifier: Apache-2.0
#include "error.h"
#include "experts_args.h"

#include <string.h>

static const tensor_where cpu = {.place = TENSOR_ON_CPU};

static PyObject *experts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  core_state *state = PyType_GetModuleState(type);
  PyObject *columns = NULL;
  ms_experts_spec spec;
  if (experts_parse_new(state, args, kwargs, NULL, &spec, &columns)) return NULL;
  experts_object *self = (experts_object *)PyType_GenericAlloc(type, 0);
  ms_error err;
  if (self && ms_experts_create(&spec, &self->experts, &err) != MS_OK) {
    core_raise(state, &err);
    Py_CLEAR(self);
  }
  if (self) self->spec = ms_experts_get_spec(self->experts);
  Py_DECREF(columns);
  return (PyObject *)self;
}

static void experts_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  ms_experts_free(((experts_object *)self)->experts);
  PyObject_Free(self);
  Py_DECREF(type);
}

PyDoc_STRVAR(
    pack_doc,
    "pack($self, /, expert, w_in, w_out, b_in=None, b_out=None, *, first=0)\n--\n\n"
    "Pack this rank's columns of one expert. The sources are read once and not kept.\n\n"
    "The sources hold hidden columns [first, first + count) of the expert, at least those of this "
    "rank: all of them\n"
    "(first = 0, count = F), or just a slice. The threads of set_num_threads share the work. Not "
    "for two calls at once\n"
    "on one expert, nor while ffn runs with it.\n\n"
    "Args:\n"
    "    expert: 0 to E-1.\n"
    "    w_in: [count, D] (gated: [2*count, D], gate rows first) float32, bfloat16 or float16, any "
    "strides.\n"
    "    w_out: [D, count], as w_in.\n"
    "    b_in: [count] (gated: [2*count]), contiguous; None if and only if made with b_in=False.\n"
    "    b_out: [D] of the dtype of b_in; None if and only if made with b_out=False.\n"
    "    first: the first hidden column that the sources hold.\n\n"
    "Raises:\n"
    "    ShapeError: a shape that does not fit, or columns of this rank that the sources lack.\n"
    "    DTypeError: a dtype that is not accepted.\n"
    "    ArgumentError: no such expert; a bias missing or unexpected; a tensor outside CPU "
    "memory.\n");

static PyObject *experts_pack(PyObject *object, PyObject *args, PyObject *kwargs) {
  experts_object *self = (experts_object *)object;
  core_state *state = core_state_of(object);
  experts_call call;
  if (experts_parse_pack(state, self->spec, &cpu, args, kwargs, &call)) return NULL;
  PyObject *result = NULL;
  core_pool *pool = core_pool_take(state);
  if (pool) {
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    ms_status status =
        ms_experts_pack(self->experts, call.expert, call.first, call.count, &call.w_in, &call.w_out,
                        call.views[EXPERTS_B_IN].data, call.views[EXPERTS_B_OUT].data, call.bias,
                        pool->threads, &err);
    PyEval_RestoreThread(gil);
    core_pool_give_back(state, pool);
    result = core_none(state, status, &err);
  }
  experts_call_close(&call);
  return result;
}

PyDoc_STRVAR(unpack_doc,
             "unpack($self, /, expert, w_in=None, w_out=None, b_in=None, b_out=None)\n--\n\n"
             "Write this rank's columns of one expert to tensors: bit for bit what was packed, "
             "when the dtypes are equal.\n"
             "int8 comes back as float32, within half a scale of what was packed.\n\n"
             "Fr is the number of columns that this rank holds of the expert. Any destination may "
             "be None.\n\n"
             "Args:\n"
             "    expert: 0 to E-1.\n"
             "    w_in: [Fr, D] (gated: [2*Fr, D], gate rows first) of self.dtype (int8: float32), "
             "contiguous.\n"
             "    w_out: [D, Fr], as w_in.\n"
             "    b_in: [Fr] (gated: [2*Fr]) float32, contiguous.\n"
             "    b_out: [D] float32, contiguous; zeros on ranks that do not hold column 0, which "
             "adds it.\n\n"
             "Raises:\n"
             "    ShapeError, DTypeError: a destination that does not fit.\n"
             "    ArgumentError: no such expert; read-only memory; a bias that these experts do "
             "not have.\n");

static PyObject *experts_unpack(PyObject *object, PyObject *args, PyObject *kwargs) {
  experts_object *self = (experts_object *)object;
  core_state *state = core_state_of(object);
  experts_call call;
  if (experts_parse_unpack(state, self->spec, &cpu, args, kwargs, &call)) return NULL;
  PyObject *result = NULL;
  core_pool *pool = core_pool_take(state);
  if (pool) {
    float *b_out = call.views[EXPERTS_B_OUT].data;
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    if (b_out) memset(b_out, 0, (size_t)self->spec->D * sizeof *b_out);
    ms_status status = ms_experts_unpack(self->experts, call.expert, call.views[EXPERTS_W_IN].data,
                                         call.views[EXPERTS_W_OUT].data,
                                         call.views[EXPERTS_B_IN].data, b_out, pool->threads, &err);
    PyEval_RestoreThread(gil);
    core_pool_give_back(state, pool);
    result = core_none(state, status, &err);
  }
  experts_call_close(&call);
  return result;
}

// ---- release ------------------------------------------------------------------------------------

PyDoc_STRVAR(
    release_doc,
    "release($self, expert, /)\n--\n\n"
    "Give the memory of one expert back to the system. Pack it again before it is used.\n\n"
    "Args:\n"
    "    expert: 0 to E-1.\n\n"
    "Raises:\n"
    "    ArgumentError: no such expert.\n");

static PyObject *experts_release(PyObject *self, PyObject *argument) {
  core_state *state = core_state_of(self);
  long long expert = PyLong_AsLongLong(argument);
  if (expert == -1 && PyErr_Occurred()) return NULL;
  const experts_object *experts = (const experts_object *)self;
  if (expert < 0 || expert >= experts->spec->E)
    return core_fail(state, MS_EINVAL, "expert: got %lld, expected 0 to %d", expert,
                     experts->spec->E - 1);
  ms_error err;
  ms_status status = ms_experts_release(experts->experts, (int32_t)expert, &err);
  return core_none(state, status, &err);
}

// ---- properties ---------------------------------------------------------------------------------

static PyObject *get_nbytes(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLongLong(ms_experts_bytes(((experts_object *)self)->experts));
}

// ---- the type -----------------------------------------------------------------------------------

static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))experts_pack, METH_VARARGS | METH_KEYWORDS, pack_doc},
    {"unpack", (PyCFunction)(void (*)(void))experts_unpack, METH_VARARGS | METH_KEYWORDS,
     unpack_doc},
    {"release", experts_release, METH_O, release_doc},
    {0}};

static PyGetSetDef getset[] = {
    {"nbytes", get_nbytes, NULL, "Bytes of the packed weights of this rank.", NULL},
    EXPERTS_PROPERTIES,
    {0}};

PyDoc_STRVAR(
    type_doc,
    "PackedExperts(*, columns, d_model, d_ff, dtype, activation, gated, b_in, b_out, "
    "interleaved=False)\n--\n\n"
    "This rank's columns of every expert of a layer, laid out for the kernels. Filled expert by "
    "expert with pack.\n\n"
    "Holds the packed weights and nothing else. Any number of threads may compute with it at "
    "once.\n\n"
    "Args:\n"
    "    columns: [E, 2] integers, this rank's row of the plan: it holds hidden columns [start, "
    "stop) of expert e.\n"
    "    d_model: model width D.\n"
    "    d_ff: hidden width F of a whole expert.\n"
    "    dtype: storage, 'float32', 'bfloat16', 'float16' or 'int8' (each row of w_in and w_out "
    "times a float32 scale:\n"
    "        its largest magnitude / 127; a row with a NaN or an infinity becomes NaN).\n"
    "    activation: 'identity', 'relu', 'gelu' (erf), 'gelu_tanh', 'silu' or 'clamped_swiglu'.\n"
    "    gated: y = act(x W_gate^T) * (x W_up^T); w_in then holds the gate rows, then the up "
    "rows.\n"
    "    b_in: whether the experts have an inner bias.\n"
    "    b_out: whether the experts have an output bias.\n"
    "    interleaved: the rows of what is packed alternate instead: gate 0, up 0, gate 1, ...\n\n"
    "Raises:\n"
    "    ArgumentError: a size or a column range out of bounds, or an unknown activation.\n"
    "    ShapeError: columns is not [E, 2].\n"
    "    DTypeError: an unknown dtype, or columns that are not integers.\n"
    "    MemoryError: no memory for the packed weights.\n");

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},    {Py_tp_new, experts_new},
                              {Py_tp_dealloc, experts_dealloc}, {Py_tp_methods, methods},
                              {Py_tp_getset, getset},           {0, NULL}};

static PyType_Spec spec = {.name = "moeshard._core.PackedExperts",
                           .basicsize = sizeof(experts_object),
                           .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                           .slots = slots};

int core_add_experts(PyObject *module, core_state *state) {
  state->experts_type = core_add_type(module, &spec);
  return state->experts_type ? 0 : -1;
}
