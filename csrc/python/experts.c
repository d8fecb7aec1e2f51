// experts.c - chapter W for Python: PackedExperts, this rank's columns of every expert.
// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"
#include "error.h"
#include "tensor_view.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

static const char *const activations[MS_ACTIVATION_COUNT] = {[MS_IDENTITY] = "identity",
                                                             [MS_RELU] = "relu",
                                                             [MS_GELU] = "gelu",
                                                             [MS_GELU_TANH] = "gelu_tanh",
                                                             [MS_SILU] = "silu"};

static const ms_experts_spec *spec_of(PyObject *self) {
  return ms_experts_get_spec(((experts_object *)self)->experts);
}

static bool parse_activation(core_state *state, const char *text, ms_activation *out) {
  char known[128];
  int used = 0;
  for (*out = MS_IDENTITY; *out < MS_ACTIVATION_COUNT; ++*out) {
    if (strcmp(text, activations[*out]) == 0) return true;
    used += snprintf(known + used, sizeof known - (size_t)used, "%s%s", used ? ", " : "",
                     activations[*out]);
  }
  core_fail(state, MS_EINVAL, "activation: got '%s', expected one of %s", text, known);
  return false;
}

// ---- construction -------------------------------------------------------------------------------

static PyObject *experts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"columns", "d_model", "d_ff",  "dtype", "activation",
                          "gated",   "b_in",    "b_out", NULL};
  core_state *state = PyType_GetModuleState(type);
  PyObject *table = NULL;
  PyArrayObject *columns = NULL;
  experts_object *self = NULL;
  const char *dtype = NULL, *activation = NULL;
  long long D = LLONG_MIN, F = LLONG_MIN;
  int gated = -1, b_in = -1, b_out = -1;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OLLssppp:PackedExperts", names, &table, &D, &F,
                                   &dtype, &activation, &gated, &b_in, &b_out))
    return NULL;
  // The format above cannot say "keyword-only and required".
  const bool missing[] = {!table,      D == LLONG_MIN, F == LLONG_MIN, !dtype,
                          !activation, gated < 0,      b_in < 0,       b_out < 0};
  for (size_t i = 0; i < sizeof missing; i++)
    if (missing[i])
      return PyErr_Format(PyExc_TypeError, "PackedExperts() missing required argument '%s'",
                          names[i]);
  ms_experts_spec spec = {.D = D, .F = F, .gated = gated, .has_b_in = b_in, .has_b_out = b_out};
  if (!tensor_dtype_parse(state, dtype, TENSOR_STORAGE, &spec.storage)) return NULL;
  if (!parse_activation(state, activation, &spec.activation)) return NULL;
  array_need need = {
      .name = "columns", .type = NPY_INT64, .ndim = 2, .shape = {-1, 2}, .dims = "E, 2"};
  if (!(columns = array_take(state, table, &need))) return NULL;
  if (!core_int32(state, "num_experts", PyArray_DIM(columns, 0), &spec.E)) goto failed;
  spec.columns = PyArray_DATA(columns);
  if (!(self = (experts_object *)PyType_GenericAlloc(type, 0))) goto failed;
  ms_error err;
  if (ms_experts_create(&spec, &self->experts, &err) != MS_OK) {
    core_raise(state, &err);
    goto failed;
  }
  Py_DECREF(columns);
  return (PyObject *)self;
failed:
  Py_DECREF(columns);
  Py_XDECREF((PyObject *)self);
  return NULL;
}

static void experts_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  ms_experts_free(((experts_object *)self)->experts);
  PyObject_Free(self);
  Py_DECREF(type);
}

// ---- pack ---------------------------------------------------------------------------------------

enum { W_IN, W_OUT, B_IN, B_OUT, PARTS };

static void close_views(tensor_view views[PARTS]) {
  for (int i = 0; i < PARTS; i++) tensor_view_close(&views[i]);
}

static ms_matrix matrix_of(const tensor_view *view) {
  return (ms_matrix){.data = view->data,
                     .dtype = view->type,
                     .rows = view->shape[0],
                     .cols = view->shape[1],
                     .row_stride = view->strides[0],
                     .col_stride = view->strides[1]};
}

// The widths of w_out and w_in say how many columns the sources hold; the core compares them with each other and with
// the columns of this rank. Biases come to it as bare pointers, so their lengths are checked here.
static int take_sources(core_state *state, const ms_experts_spec *spec,
                        PyObject *const tensors[PARTS], tensor_view views[PARTS]) {
  int64_t halves = spec->gated ? 2 : 1;
  tensor_need w_in = {.name = "w_in",
                      .dtypes = TENSOR_FLOATS,
                      .ndim = 2,
                      .shape = {-1, spec->D},
                      .dims = "FD",
                      .strided = true};
  tensor_need w_out = {.name = "w_out",
                       .dtypes = TENSOR_FLOATS,
                       .ndim = 2,
                       .shape = {spec->D, -1},
                       .dims = "DF",
                       .strided = true};
  if (tensor_view_take(state, tensors[W_IN], &w_in, &views[W_IN])) return -1;
  if (tensor_view_take(state, tensors[W_OUT], &w_out, &views[W_OUT])) return -1;
  tensor_need b_in = {.name = "b_in",
                      .dtypes = TENSOR_FLOATS,
                      .ndim = 1,
                      .shape = {halves * views[W_OUT].shape[1]},
                      .dims = "F"};
  tensor_need b_out = {
      .name = "b_out", .dtypes = TENSOR_FLOATS, .ndim = 1, .shape = {spec->D}, .dims = "D"};
  if (tensors[B_IN] != Py_None && tensor_view_take(state, tensors[B_IN], &b_in, &views[B_IN]))
    return -1;
  if (tensors[B_OUT] != Py_None) {
    if (tensors[B_IN] != Py_None) b_out.dtypes = 1u << views[B_IN].type;
    if (tensor_view_take(state, tensors[B_OUT], &b_out, &views[B_OUT])) return -1;
  }
  return 0;
}

PyDoc_STRVAR(
    pack_doc,
    "pack($self, /, expert, w_in, w_out, b_in=None, b_out=None, *, first=0)\n--\n\n"
    "Pack this rank's columns of one expert. The sources are read once and not kept.\n\n"
    "The sources hold hidden columns [first, first + count) of the expert, at least those of this "
    "rank: all of them\n"
    "(first = 0, count = F), or just a slice. Not for two threads on one expert, nor while ffn "
    "runs with it.\n\n"
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

static PyObject *experts_pack(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"expert", "w_in", "w_out", "b_in", "b_out", "first", NULL};
  core_state *state = core_state_of(self);
  const ms_experts_spec *spec = spec_of(self);
  PyObject *tensors[PARTS] = {NULL, NULL, Py_None, Py_None};
  long long expert, first = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LOO|OO$L:pack", names, &expert, &tensors[W_IN],
                                   &tensors[W_OUT], &tensors[B_IN], &tensors[B_OUT], &first))
    return NULL;
  int32_t e;
  if (!core_int32(state, "expert", expert, &e)) return NULL;
  if (first < 0 || first > spec->F)
    return core_fail(state, MS_EINVAL, "first: got %lld, expected 0 to d_ff=%lld", first,
                     (long long)spec->F);
  tensor_view views[PARTS] = {{0}};
  PyObject *result = NULL;
  if (take_sources(state, spec, tensors, views)) goto done;
  int64_t count = views[W_OUT].shape[1];
  ms_matrix w_in = matrix_of(&views[W_IN]), w_out = matrix_of(&views[W_OUT]);
  ms_dtype bias = views[B_IN].data    ? views[B_IN].type
                  : views[B_OUT].data ? views[B_OUT].type
                                      : MS_F32;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_experts_pack(((experts_object *)self)->experts, e, first, count, &w_in,
                                     &w_out, views[B_IN].data, views[B_OUT].data, bias, &err);
  PyEval_RestoreThread(gil);
  result = core_none(state, status, &err);
done:
  close_views(views);
  return result;
}

// ---- unpack -------------------------------------------------------------------------------------

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

static int take_destinations(core_state *state, const ms_experts *experts, int32_t e,
                             PyObject *const tensors[PARTS], tensor_view views[PARTS]) {
  const ms_experts_spec *spec = ms_experts_get_spec(experts);
  unsigned weights = 1u << ms_experts_unpacked(experts);
  const int64_t *c = spec->columns + 2 * (int64_t)e;
  int64_t width = c[1] - c[0], rows = spec->gated ? 2 * width : width;
  const tensor_need needs[PARTS] = {{.name = "w_in",
                                     .dtypes = weights,
                                     .ndim = 2,
                                     .shape = {rows, spec->D},
                                     .dims = "FD",
                                     .write = true},
                                    {.name = "w_out",
                                     .dtypes = weights,
                                     .ndim = 2,
                                     .shape = {spec->D, width},
                                     .dims = "DF",
                                     .write = true},
                                    {.name = "b_in",
                                     .dtypes = 1u << MS_F32,
                                     .ndim = 1,
                                     .shape = {rows},
                                     .dims = "F",
                                     .write = true},
                                    {.name = "b_out",
                                     .dtypes = 1u << MS_F32,
                                     .ndim = 1,
                                     .shape = {spec->D},
                                     .dims = "D",
                                     .write = true}};
  const bool exists[PARTS] = {true, true, spec->has_b_in, spec->has_b_out};
  for (int i = 0; i < PARTS; i++) {
    if (tensors[i] == Py_None) continue;
    if (!exists[i]) {
      core_fail(state, MS_EINVAL, "%s: unexpected, these experts were made without one",
                needs[i].name);
      return -1;
    }
    if (tensor_view_take(state, tensors[i], &needs[i], &views[i])) return -1;
  }
  return 0;
}

static PyObject *experts_unpack(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"expert", "w_in", "w_out", "b_in", "b_out", NULL};
  core_state *state = core_state_of(self);
  const ms_experts *experts = ((experts_object *)self)->experts;
  const ms_experts_spec *spec = spec_of(self);
  PyObject *tensors[PARTS] = {Py_None, Py_None, Py_None, Py_None};
  long long expert;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|OOOO:unpack", names, &expert, &tensors[W_IN],
                                   &tensors[W_OUT], &tensors[B_IN], &tensors[B_OUT]))
    return NULL;
  if (expert < 0 || expert >= spec->E)
    return core_fail(state, MS_EINVAL, "expert: got %lld, expected 0 to %d", expert, spec->E - 1);
  tensor_view views[PARTS] = {{0}};
  PyObject *result = NULL;
  if (take_destinations(state, experts, (int32_t)expert, tensors, views)) goto done;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  if (views[B_OUT].data) memset(views[B_OUT].data, 0, (size_t)spec->D * sizeof(float));
  ms_status status =
      ms_experts_unpack(experts, (int32_t)expert, views[W_IN].data, views[W_OUT].data,
                        views[B_IN].data, views[B_OUT].data, &err);
  PyEval_RestoreThread(gil);
  result = core_none(state, status, &err);
done:
  close_views(views);
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
  if (expert < 0 || expert >= spec_of(self)->E)
    return core_fail(state, MS_EINVAL, "expert: got %lld, expected 0 to %d", expert,
                     spec_of(self)->E - 1);
  ms_error err;
  ms_status status = ms_experts_release(((experts_object *)self)->experts, (int32_t)expert, &err);
  return core_none(state, status, &err);
}

// ---- properties ---------------------------------------------------------------------------------

static PyObject *get_nbytes(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLongLong(ms_experts_bytes(((experts_object *)self)->experts));
}

static PyObject *get_columns(PyObject *self, void *unused) {
  (void)unused;
  return array_copy(NPY_INT64, 2, spec_of(self)->E, 2, spec_of(self)->columns);
}

static PyObject *get_num_experts(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(spec_of(self)->E);
}

static PyObject *get_d_model(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLongLong(spec_of(self)->D);
}

static PyObject *get_d_ff(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLongLong(spec_of(self)->F);
}

static PyObject *get_dtype(PyObject *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(ms_dtype_name(spec_of(self)->storage));
}

static PyObject *get_activation(PyObject *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(activations[spec_of(self)->activation]);
}

static PyObject *get_gated(PyObject *self, void *unused) {
  (void)unused;
  return PyBool_FromLong(spec_of(self)->gated);
}

static PyObject *get_has_b_in(PyObject *self, void *unused) {
  (void)unused;
  return PyBool_FromLong(spec_of(self)->has_b_in);
}

static PyObject *get_has_b_out(PyObject *self, void *unused) {
  (void)unused;
  return PyBool_FromLong(spec_of(self)->has_b_out);
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
    {"columns", get_columns, NULL,
     "[E, 2] int64, a copy: the hidden columns of each expert that are held here.", NULL},
    {"num_experts", get_num_experts, NULL, "Number of experts E.", NULL},
    {"d_model", get_d_model, NULL, "Model width D.", NULL},
    {"d_ff", get_d_ff, NULL, "Hidden width F of a whole expert.", NULL},
    {"dtype", get_dtype, NULL,
     "Storage of the packed weights: 'float32', 'bfloat16', 'float16' or 'int8'.", NULL},
    {"activation", get_activation, NULL, "'identity', 'relu', 'gelu', 'gelu_tanh' or 'silu'.",
     NULL},
    {"gated", get_gated, NULL, "Whether w_in holds gate rows, then up rows.", NULL},
    {"has_b_in", get_has_b_in, NULL, "Whether there is an inner bias.", NULL},
    {"has_b_out", get_has_b_out, NULL, "Whether there is an output bias.", NULL},
    {0}};

PyDoc_STRVAR(
    type_doc,
    "PackedExperts(*, columns, d_model, d_ff, dtype, activation, gated, b_in, b_out)\n--\n\n"
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
    "    activation: 'identity', 'relu', 'gelu' (erf), 'gelu_tanh' or 'silu'.\n"
    "    gated: y = act(x W_gate^T) * (x W_up^T); w_in then holds the gate rows, then the up "
    "rows.\n"
    "    b_in: whether the experts have an inner bias.\n"
    "    b_out: whether the experts have an output bias.\n\n"
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
