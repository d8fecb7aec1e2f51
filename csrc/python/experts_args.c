// experts_args.c - what PackedExperts of every engine have alike: their arguments, checked, and most properties.
// SPDX-License-Identifier: Apache-2.0
#include "experts_args.h"
#include "arrays.h"
#include "error.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

static const char *const activations[MS_ACTIVATION_COUNT] = {
    [MS_IDENTITY] = "identity",   [MS_RELU] = "relu", [MS_GELU] = "gelu",
    [MS_GELU_TANH] = "gelu_tanh", [MS_SILU] = "silu", [MS_CLAMPED_SWIGLU] = "clamped_swiglu"};

static const ms_experts_spec *spec_of(PyObject *self) { return ((experts_head *)self)->spec; }

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

int experts_parse_new(core_state *state, PyObject *args, PyObject *kwargs, int32_t *device,
                      ms_experts_spec *spec, PyObject **columns) {
  static char *names[] = {"columns", "d_model", "d_ff",   "dtype",       "activation", "gated",
                          "b_in",    "b_out",   "device", "interleaved", NULL};
  static char *host_names[] = {"columns", "d_model", "d_ff",  "dtype",       "activation",
                               "gated",   "b_in",    "b_out", "interleaved", NULL};
  PyObject *table = NULL;
  const char *dtype = NULL, *activation = NULL;
  long long D = LLONG_MIN, F = LLONG_MIN, number = device ? LLONG_MIN : 0;
  int gated = -1, b_in = -1, b_out = -1, interleaved = 0;
  int parsed = device ? PyArg_ParseTupleAndKeywords(args, kwargs, "|$OLLsspppLp:PackedExperts",
                                                    names, &table, &D, &F, &dtype, &activation,
                                                    &gated, &b_in, &b_out, &number, &interleaved)
                      : PyArg_ParseTupleAndKeywords(args, kwargs, "|$OLLsspppp:PackedExperts",
                                                    host_names, &table, &D, &F, &dtype, &activation,
                                                    &gated, &b_in, &b_out, &interleaved);
  if (!parsed) return -1;
  // The format above cannot say "keyword-only and required".
  const bool missing[] = {!table,   D == LLONG_MIN, F == LLONG_MIN,
                          !dtype,   !activation,    gated < 0,
                          b_in < 0, b_out < 0,      number == LLONG_MIN};
  for (size_t i = 0; i < sizeof missing; i++)
    if (missing[i]) {
      PyErr_Format(PyExc_TypeError, "PackedExperts() missing required argument '%s'", names[i]);
      return -1;
    }
  *spec = (ms_experts_spec){.D = D,
                            .F = F,
                            .gated = gated,
                            .interleaved = interleaved,
                            .has_b_in = b_in,
                            .has_b_out = b_out};
  if (!tensor_dtype_parse(state, dtype, device ? TENSOR_FLOATS : TENSOR_STORAGE, &spec->storage))
    return -1;
  if (!parse_activation(state, activation, &spec->activation)) return -1;
  if (device && !core_int32(state, "device", number, device)) return -1;
  array_need need = {
      .name = "columns", .type = NPY_INT64, .ndim = 2, .shape = {-1, 2}, .dims = "E, 2"};
  PyArrayObject *array = array_take(state, table, &need);
  if (!array) return -1;
  *columns = (PyObject *)array;
  spec->columns = PyArray_DATA(array);
  if (core_int32(state, "num_experts", PyArray_DIM(array, 0), &spec->E)) return 0;
  Py_CLEAR(*columns);
  return -1;
}

// ---- pack ---------------------------------------------------------------------------------------

void experts_call_close(experts_call *call) {
  for (int i = 0; i < EXPERTS_PARTS; i++) tensor_view_close(&call->views[i]);
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
static int take_sources(core_state *state, const ms_experts_spec *spec, const tensor_where *where,
                        experts_call *call) {
  PyObject *const *tensors = call->tensors;
  tensor_view *views = call->views;
  int64_t halves = spec->gated ? 2 : 1;
  tensor_need w_in = {.name = "w_in",
                      .dtypes = TENSOR_FLOATS,
                      .ndim = 2,
                      .shape = {-1, spec->D},
                      .dims = "FD",
                      .strided = true,
                      .where = *where};
  tensor_need w_out = {.name = "w_out",
                       .dtypes = TENSOR_FLOATS,
                       .ndim = 2,
                       .shape = {spec->D, -1},
                       .dims = "DF",
                       .strided = true,
                       .where = *where};
  if (tensor_view_take(state, tensors[EXPERTS_W_IN], &w_in, &views[EXPERTS_W_IN])) return -1;
  if (tensor_view_take(state, tensors[EXPERTS_W_OUT], &w_out, &views[EXPERTS_W_OUT])) return -1;
  tensor_need b_in = {.name = "b_in",
                      .dtypes = TENSOR_FLOATS,
                      .ndim = 1,
                      .shape = {halves * views[EXPERTS_W_OUT].shape[1]},
                      .dims = "F",
                      .where = *where};
  tensor_need b_out = {.name = "b_out",
                       .dtypes = TENSOR_FLOATS,
                       .ndim = 1,
                       .shape = {spec->D},
                       .dims = "D",
                       .where = *where};
  if (tensors[EXPERTS_B_IN] != Py_None &&
      tensor_view_take(state, tensors[EXPERTS_B_IN], &b_in, &views[EXPERTS_B_IN]))
    return -1;
  if (tensors[EXPERTS_B_OUT] != Py_None) {
    if (tensors[EXPERTS_B_IN] != Py_None) b_out.dtypes = 1u << views[EXPERTS_B_IN].type;
    if (tensor_view_take(state, tensors[EXPERTS_B_OUT], &b_out, &views[EXPERTS_B_OUT])) return -1;
  }
  return 0;
}

int experts_parse_pack(core_state *state, const ms_experts_spec *spec, const tensor_where *where,
                       PyObject *args, PyObject *kwargs, experts_call *out) {
  static char *names[] = {"expert", "w_in", "w_out", "b_in", "b_out", "first", NULL};
  *out = (experts_call){.tensors = {NULL, NULL, Py_None, Py_None}};
  PyObject **tensors = out->tensors;
  long long expert, first = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LOO|OO$L:pack", names, &expert,
                                   &tensors[EXPERTS_W_IN], &tensors[EXPERTS_W_OUT],
                                   &tensors[EXPERTS_B_IN], &tensors[EXPERTS_B_OUT], &first))
    return -1;
  if (!core_int32(state, "expert", expert, &out->expert)) return -1;
  if (first < 0 || first > spec->F) {
    core_fail(state, MS_EINVAL, "first: got %lld, expected 0 to d_ff=%lld", first,
              (long long)spec->F);
    return -1;
  }
  if (take_sources(state, spec, where, out)) {
    experts_call_close(out);
    return -1;
  }
  const tensor_view *b_in = &out->views[EXPERTS_B_IN], *b_out = &out->views[EXPERTS_B_OUT];
  out->first = first;
  out->count = out->views[EXPERTS_W_OUT].shape[1];
  out->w_in = matrix_of(&out->views[EXPERTS_W_IN]);
  out->w_out = matrix_of(&out->views[EXPERTS_W_OUT]);
  out->bias = b_in->data ? b_in->type : b_out->data ? b_out->type : MS_F32;
  return 0;
}

// ---- unpack -------------------------------------------------------------------------------------

static int take_destinations(core_state *state, const ms_experts_spec *spec,
                             const tensor_where *where, experts_call *call) {
  unsigned weights = 1u << (spec->storage == MS_I8 ? MS_F32 : spec->storage);
  const int64_t *c = spec->columns + 2 * (int64_t)call->expert;
  int64_t width = c[1] - c[0], rows = spec->gated ? 2 * width : width;
  const tensor_need needs[EXPERTS_PARTS] = {{.name = "w_in",
                                             .dtypes = weights,
                                             .ndim = 2,
                                             .shape = {rows, spec->D},
                                             .dims = "FD",
                                             .write = true,
                                             .where = *where},
                                            {.name = "w_out",
                                             .dtypes = weights,
                                             .ndim = 2,
                                             .shape = {spec->D, width},
                                             .dims = "DF",
                                             .write = true,
                                             .where = *where},
                                            {.name = "b_in",
                                             .dtypes = 1u << MS_F32,
                                             .ndim = 1,
                                             .shape = {rows},
                                             .dims = "F",
                                             .write = true,
                                             .where = *where},
                                            {.name = "b_out",
                                             .dtypes = 1u << MS_F32,
                                             .ndim = 1,
                                             .shape = {spec->D},
                                             .dims = "D",
                                             .write = true,
                                             .where = *where}};
  const bool exists[EXPERTS_PARTS] = {true, true, spec->has_b_in, spec->has_b_out};
  for (int i = 0; i < EXPERTS_PARTS; i++) {
    if (call->tensors[i] == Py_None) continue;
    if (!exists[i]) {
      core_fail(state, MS_EINVAL, "%s: unexpected, these experts were made without one",
                needs[i].name);
      return -1;
    }
    if (tensor_view_take(state, call->tensors[i], &needs[i], &call->views[i])) return -1;
  }
  return 0;
}

int experts_parse_unpack(core_state *state, const ms_experts_spec *spec, const tensor_where *where,
                         PyObject *args, PyObject *kwargs, experts_call *out) {
  static char *names[] = {"expert", "w_in", "w_out", "b_in", "b_out", NULL};
  *out = (experts_call){.tensors = {Py_None, Py_None, Py_None, Py_None}};
  PyObject **tensors = out->tensors;
  long long expert;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|OOOO:unpack", names, &expert,
                                   &tensors[EXPERTS_W_IN], &tensors[EXPERTS_W_OUT],
                                   &tensors[EXPERTS_B_IN], &tensors[EXPERTS_B_OUT]))
    return -1;
  if (expert < 0 || expert >= spec->E) {
    core_fail(state, MS_EINVAL, "expert: got %lld, expected 0 to %d", expert, spec->E - 1);
    return -1;
  }
  out->expert = (int32_t)expert;
  if (take_destinations(state, spec, where, out) == 0) return 0;
  experts_call_close(out);
  return -1;
}

// ---- properties ---------------------------------------------------------------------------------

PyObject *experts_get_columns(PyObject *self, void *closure) {
  (void)closure;
  return array_copy(NPY_INT64, 2, spec_of(self)->E, 2, spec_of(self)->columns);
}

PyObject *experts_get_num_experts(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLong(spec_of(self)->E);
}

PyObject *experts_get_d_model(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(spec_of(self)->D);
}

PyObject *experts_get_d_ff(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(spec_of(self)->F);
}

PyObject *experts_get_dtype(PyObject *self, void *closure) {
  (void)closure;
  return PyUnicode_FromString(ms_dtype_name(spec_of(self)->storage));
}

PyObject *experts_get_activation(PyObject *self, void *closure) {
  (void)closure;
  return PyUnicode_FromString(activations[spec_of(self)->activation]);
}

PyObject *experts_get_gated(PyObject *self, void *closure) {
  (void)closure;
  return PyBool_FromLong(spec_of(self)->gated);
}

PyObject *experts_get_has_b_in(PyObject *self, void *closure) {
  (void)closure;
  return PyBool_FromLong(spec_of(self)->has_b_in);
}

PyObject *experts_get_has_b_out(PyObject *self, void *closure) {
  (void)closure;
  return PyBool_FromLong(spec_of(self)->has_b_out);
}
