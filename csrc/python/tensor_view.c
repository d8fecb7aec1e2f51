// tensor_view.c - any tensor as a pointer, a shape and a dtype, checked, without a copy.
//
// Four ways in, tried in this order:
//   NumPy arrays         their C API
//   our own Tensor       its fields
//   a C exchange table   type.__dlpack_c_exchange_api__, DLPack 1.3 (torch)
//   a capsule            tensor.__dlpack__(max_version=...), any DLPack library
// The table does no autograd check: whoever calls with torch tensors has done that.
//
// SPDX-License-Identifier: Apache-2.0
#include "tensor_view.h"
#include "error.h"

#include <stdio.h>
#include <string.h>

// ---- what is kept alive -------------------------------------------------------------------------

// Deleters are foreign code, which may run Python's and lose an exception that is on its way out.
void tensor_hold_release(tensor_hold *hold) {
  tensor_hold held = *hold;
  *hold = (tensor_hold){0};
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  if (held.managed && held.managed->deleter) held.managed->deleter(held.managed);
  if (held.legacy && held.legacy->deleter) held.legacy->deleter(held.legacy);
  Py_XDECREF(held.owner);
  PyErr_Restore(type, value, traceback);
}

void tensor_view_close(tensor_view *view) { tensor_hold_release(&view->hold); }

// ---- names for messages -------------------------------------------------------------------------

void tensor_dtype_name(DLDataType dtype, char text[TENSOR_DTYPE_TEXT]) {
  static const char *const sized[] = {"int", "uint", "float", "handle", "bfloat", "complex"};
  static const char *const named[] = {
      "bool",           "float8_e3m4",     "float8_e4m3",   "float8_e4m3b11fnuz",
      "float8_e4m3fn",  "float8_e4m3fnuz", "float8_e5m2",   "float8_e5m2fnuz",
      "float8_e8m0fnu", "float6_e2m3fn",   "float6_e3m2fn", "float4_e2m1fn"};
  enum { SIZED = sizeof sized / sizeof *sized, NAMED = sizeof named / sizeof *named };
  int code = dtype.code, used;
  if (code < SIZED)
    used = snprintf(text, TENSOR_DTYPE_TEXT, "%s%d", sized[code], dtype.bits);
  else if (code < SIZED + NAMED)
    used = snprintf(text, TENSOR_DTYPE_TEXT, "%s", named[code - SIZED]);
  else
    used = snprintf(text, TENSOR_DTYPE_TEXT, "DLPack dtype %d of %d bits", code, dtype.bits);
  if (dtype.lanes != 1)
    snprintf(text + used, (size_t)(TENSOR_DTYPE_TEXT - used), "x%d", dtype.lanes);
}

enum { LIST_TEXT = 192 };

// "[6, 8]"; what does not fit ends in "...".
static void list(const int64_t *values, int32_t count, char text[LIST_TEXT]) {
  enum { ROOM = LIST_TEXT - 32 }; // for one more number and the end
  int used = snprintf(text, LIST_TEXT, "["), i = 0;
  for (; i < count && used < ROOM; i++)
    used += snprintf(text + used, (size_t)(LIST_TEXT - used), "%s%lld", i ? ", " : "",
                     (long long)values[i]);
  snprintf(text + used, (size_t)(LIST_TEXT - used), i < count ? ", ...]" : "]");
}

// "[T=6, K]": letters alone where any size will do.
static void list_needed(const tensor_need *need, char text[LIST_TEXT]) {
  int used = snprintf(text, LIST_TEXT, "[");
  for (int32_t i = 0; i < need->ndim; i++) {
    used += snprintf(text + used, (size_t)(LIST_TEXT - used), "%s%c", i ? ", " : "", need->dims[i]);
    if (need->shape[i] >= 0)
      used += snprintf(text + used, (size_t)(LIST_TEXT - used), "=%lld", (long long)need->shape[i]);
  }
  snprintf(text + used, (size_t)(LIST_TEXT - used), "]");
}

// "float32, bfloat16 or float16"
static void list_dtypes(unsigned dtypes, char text[LIST_TEXT]) {
  int used = 0;
  text[0] = 0;
  for (ms_dtype d = MS_F32; d <= MS_I8; d++) {
    if (!(dtypes & 1u << d)) continue;
    bool first = !(dtypes & ((1u << d) - 1)), last = !(dtypes & ~0u << d << 1);
    used += snprintf(text + used, (size_t)(LIST_TEXT - used), "%s%s",
                     first  ? ""
                     : last ? " or "
                            : ", ",
                     ms_dtype_name(d));
  }
}

// ---- the ways in --------------------------------------------------------------------------------

static int64_t element_bytes(DLDataType dtype) {
  return ((int64_t)dtype.bits * dtype.lanes + 7) / 8;
}

static int64_t elements(const tensor_view *view) {
  int64_t count = 1;
  for (int32_t i = 0; i < view->ndim; i++) {
    if (view->shape[i] == 0) return 0;
    // Only strides of zero can make this too large; the exact number is of no interest then.
    if (__builtin_mul_overflow(count, view->shape[i], &count)) count = INT64_MAX;
  }
  return count;
}

int64_t tensor_view_bytes(const tensor_view *view) {
  return elements(view) * element_bytes(view->dtype);
}

// Row-major without gaps. Strides of dimensions of size 1, and of tensors without elements, count for nothing.
static bool is_contiguous(const tensor_view *view) {
  if (elements(view) == 0) return true;
  int64_t expected = 1;
  for (int32_t i = view->ndim - 1; i >= 0; i--) {
    if (view->shape[i] == 1) continue;
    if (view->strides[i] != expected) return false;
    expected *= view->shape[i];
  }
  return true;
}

// Empty tensors may come with NULL, which would read as "no tensor" further on.
static void finish(tensor_view *view) {
  static _Alignas(64) char nothing[64];
  if (!view->data && elements(view) == 0) view->data = nothing;
  view->contiguous = is_contiguous(view);
}

static int check_dims(core_state *state, const char *name, int32_t ndim) {
  if (ndim >= 0 && ndim <= TENSOR_MAX_DIMS) return 0;
  core_fail(state, MS_ESHAPE, "%s: got %d dimensions, expected at most %d", name, ndim,
            TENSOR_MAX_DIMS);
  return -1;
}

static int take_fields(core_state *state, const DLTensor *t, const char *name, tensor_view *out) {
  if (check_dims(state, name, t->ndim)) return -1;
  out->data = t->data ? (char *)t->data + t->byte_offset : NULL;
  out->device = t->device;
  out->dtype = t->dtype;
  out->ndim = t->ndim;
  int64_t stride = 1;
  for (int32_t i = t->ndim - 1; i >= 0; i--) {
    out->shape[i] = t->shape[i];
    out->strides[i] = t->strides ? t->strides[i] : stride;
    if (!t->strides) stride *= t->shape[i];
  }
  finish(out);
  return 0;
}

static int take_managed(core_state *state, DLManagedTensorVersioned *managed, const char *name,
                        bool write, tensor_view *out) {
  out->hold.managed = managed;
  if (managed->version.major != DLPACK_MAJOR) {
    core_fail(state, MS_EINVAL, "%s: got a tensor of DLPack %u, expected DLPack %d", name,
              managed->version.major, DLPACK_MAJOR);
    return -1;
  }
  if (write && managed->flags & DL_IS_COPIED) {
    core_fail(state, MS_EINVAL,
              "%s: its library shares a copy only, expected the memory itself, to write to", name);
    return -1;
  }
  out->read_only = managed->flags & DL_READ_ONLY;
  return take_fields(state, &managed->dl_tensor, name, out);
}

// ml_dtypes adds bfloat16 to NumPy as a dtype of its own, known by its name only.
static bool is_numpy_bfloat16(PyArrayObject *array) {
  if (!PyTypeNum_ISUSERDEF(PyArray_TYPE(array)) || PyArray_ITEMSIZE(array) != 2) return false;
  PyObject *name = PyObject_GetAttrString((PyObject *)PyArray_DESCR(array), "name");
  bool same =
      name && PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
  Py_XDECREF(name);
  PyErr_Clear();
  return same;
}

// The type code, or -1.
static int numpy_code(PyArrayObject *array) {
  int number = PyArray_TYPE(array);
  if (!PyArray_ISNOTSWAPPED(array)) return -1;
  if (PyTypeNum_ISBOOL(number)) return DL_BOOL;
  if (PyTypeNum_ISSIGNED(number)) return DL_INT;
  if (PyTypeNum_ISUNSIGNED(number)) return DL_UINT;
  if (PyTypeNum_ISFLOAT(number)) return DL_FLOAT;
  if (PyTypeNum_ISCOMPLEX(number)) return DL_COMPLEX;
  return is_numpy_bfloat16(array) ? DL_BFLOAT : -1;
}

static int open_numpy(core_state *state, PyArrayObject *array, const char *name, tensor_view *out) {
  if (check_dims(state, name, PyArray_NDIM(array))) return -1;
  int code = numpy_code(array);
  int64_t size = PyArray_ITEMSIZE(array);
  if (code < 0) {
    PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
    const char *said = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    if (said)
      core_fail(state, MS_EDTYPE,
                "%s: got NumPy dtype %s, expected numbers in the byte order of this machine", name,
                said);
    Py_XDECREF(text);
    return -1;
  }
  out->dtype = (DLDataType){(uint8_t)code, (uint8_t)(8 * size), 1};
  out->ndim = PyArray_NDIM(array);
  for (int32_t i = 0; i < out->ndim; i++) {
    int64_t stride = PyArray_STRIDE(array, i);
    if (stride % size && PyArray_DIM(array, i) > 1) {
      core_fail(
          state, MS_EINVAL,
          "%s: its elements lie %lld bytes apart, expected a multiple of their %lld bytes: copy it",
          name, (long long)stride, (long long)size);
      return -1;
    }
    out->shape[i] = PyArray_DIM(array, i);
    out->strides[i] = stride / size;
  }
  out->data = PyArray_DATA(array);
  out->device = (DLDevice){DL_CPU, 0};
  out->read_only = !PyArray_ISWRITEABLE(array);
  finish(out);
  return 0;
}

// The exchange table of a tensor type, or NULL. -1 with an exception set, else 0.
static int find_table(core_state *state, PyTypeObject *type, const DLPackExchangeAPI **out) {
  *out = NULL;
  pthread_mutex_lock(&state->lock);
  for (int i = 0; i < CORE_TABLES && !*out; i++)
    if (state->tables[i].type == type) *out = state->tables[i].api;
  pthread_mutex_unlock(&state->lock);
  if (*out) return 0;

  PyObject *capsule = PyObject_GetAttr((PyObject *)type, state->exchange_table);
  if (!capsule) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
  }
  const DLPackExchangeAPIHeader *table = NULL;
  if (PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_DECREF(capsule);
  while (table && table->version.major != DLPACK_MAJOR) table = table->prev_api;
  if (!table) return 0;

  *out = (const DLPackExchangeAPI *)table;
  Py_INCREF((PyObject *)type);
  pthread_mutex_lock(&state->lock);
  uint32_t at = state->tables_met++ % CORE_TABLES;
  PyTypeObject *forgotten = state->tables[at].type;
  state->tables[at].type = type;
  state->tables[at].api = *out;
  pthread_mutex_unlock(&state->lock);
  Py_XDECREF((PyObject *)forgotten);
  return 0;
}

// To write, the managed form: only that one says whether the memory is read-only or a copy.
static int open_table(core_state *state, PyObject *tensor, const DLPackExchangeAPI *api,
                      const char *name, bool write, tensor_view *out) {
  if (!write && api->dltensor_from_py_object_no_sync) {
    DLTensor fields;
    if (api->dltensor_from_py_object_no_sync(tensor, &fields) == 0)
      return take_fields(state, &fields, name, out);
  } else {
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_from_py_object_no_sync(tensor, &managed) == 0)
      return take_managed(state, managed, name, write, out);
  }
  core_fail_from(state, MS_EINVAL, "%s: its library cannot share it", name);
  return -1;
}

// tensor.__dlpack__(max_version=(1, 3)); libraries older than DLPack 1.0 do not know the argument.
static PyObject *ask_for_capsule(core_state *state, PyObject *tensor, void *stream) {
  PyObject *method = NULL, *none = NULL, *only_stream = NULL, *all = NULL, *capsule = NULL;
  if (!(method = PyObject_GetAttr(tensor, state->dlpack))) goto done;
  if (!(none = PyTuple_New(0))) goto done;
  if (stream) {
    only_stream = Py_BuildValue("{sK}", "stream", (unsigned long long)(uintptr_t)stream);
    all = Py_BuildValue("{s(ii)sK}", "max_version", DLPACK_MAJOR, DLPACK_MINOR, "stream",
                        (unsigned long long)(uintptr_t)stream);
  } else {
    only_stream = PyDict_New();
    all = Py_BuildValue("{s(ii)}", "max_version", DLPACK_MAJOR, DLPACK_MINOR);
  }
  if (!only_stream || !all) goto done;
  capsule = PyObject_Call(method, none, all);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = PyObject_Call(method, none, only_stream);
  }
done:
  Py_XDECREF(all);
  Py_XDECREF(only_stream);
  Py_XDECREF(none);
  Py_XDECREF(method);
  return capsule;
}

// The capsule is renamed before its tensor is ours: from then on it deletes nothing.
static int take_capsule(core_state *state, PyObject *capsule, const char *name, bool write,
                        tensor_view *out) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned")) return -1;
    return take_managed(state, managed, name, write, out);
  }
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    DLManagedTensor *legacy = PyCapsule_GetPointer(capsule, "dltensor");
    if (PyCapsule_SetName(capsule, "used_dltensor")) return -1;
    out->hold.legacy = legacy;
    return take_fields(state, &legacy->dl_tensor, name, out);
  }
  core_fail(state, MS_EINVAL,
            "%s: its __dlpack__ returned something else than an unused DLPack capsule", name);
  return -1;
}

static int open_capsule(core_state *state, PyObject *tensor, const char *name, bool write,
                        void *stream, tensor_view *out) {
  if (!PyObject_HasAttr((PyObject *)Py_TYPE(tensor), state->dlpack)) {
    PyObject *type = PyType_GetName(Py_TYPE(tensor));
    const char *said = type ? PyUnicode_AsUTF8AndSize(type, NULL) : NULL;
    if (said)
      core_fail(state, MS_EDTYPE,
                "%s: got %s, expected a tensor: torch, NumPy or any other with __dlpack__", name,
                said);
    Py_XDECREF(type);
    return -1;
  }
  PyObject *capsule = ask_for_capsule(state, tensor, stream);
  if (!capsule) {
    core_fail_from(state, MS_EINVAL, "%s: its library cannot share it", name);
    return -1;
  }
  int result = take_capsule(state, capsule, name, write, out);
  Py_DECREF(capsule);
  return result;
}

int tensor_view_open(core_state *state, PyObject *tensor, const char *name, bool write,
                     void *stream, tensor_view *out) {
  *out = (tensor_view){0};
  const DLPackExchangeAPI *api = NULL;
  int result = -1;
  if (PyArray_Check(tensor)) {
    result = open_numpy(state, (PyArrayObject *)tensor, name, out);
  } else if (Py_IS_TYPE(tensor, state->tensor_type)) {
    tensor_object_view(tensor, out);
    finish(out);
    result = 0;
  } else if (find_table(state, Py_TYPE(tensor), &api) == 0) {
    result = api ? open_table(state, tensor, api, name, write, out)
                 : open_capsule(state, tensor, name, write, stream, out);
  }
  if (result)
    tensor_view_close(out);
  else if (!out->hold.managed && !out->hold.legacy)
    out->hold.owner = Py_NewRef(tensor);
  return result;
}

int tensor_stream(core_state *state, PyObject *tensor, int32_t device, void **stream) {
  const DLPackExchangeAPI *api = NULL;
  *stream = NULL;
  if (PyArray_Check(tensor)) return 0;
  if (find_table(state, Py_TYPE(tensor), &api)) return -1;
  return api && api->current_work_stream ? api->current_work_stream(DL_CUDA, device, stream) : 0;
}

// ---- what is needed -----------------------------------------------------------------------------

static bool core_dtype(DLDataType dtype, ms_dtype *out) {
  static const DLDataType known[] = {[MS_F32] = {DL_FLOAT, 32, 1},
                                     [MS_BF16] = {DL_BFLOAT, 16, 1},
                                     [MS_F16] = {DL_FLOAT, 16, 1},
                                     [MS_I32] = {DL_INT, 32, 1},
                                     [MS_I64] = {DL_INT, 64, 1}};
  for (*out = MS_F32; *out <= MS_I64; ++*out)
    if (memcmp(&dtype, &known[*out], sizeof dtype) == 0) return true;
  return false;
}

bool tensor_dtype_parse(core_state *state, const char *text, unsigned dtypes, ms_dtype *out) {
  for (*out = MS_F32; *out <= MS_I8; ++*out)
    if (dtypes & 1u << *out && strcmp(text, ms_dtype_name(*out)) == 0) return true;
  char expected[LIST_TEXT];
  list_dtypes(dtypes, expected);
  core_fail(state, MS_EDTYPE, "dtype: got '%s', expected %s", text, expected);
  return false;
}

static bool shape_fits(const tensor_view *view, const tensor_need *need) {
  if (view->ndim != need->ndim) return false;
  for (int32_t i = 0; i < need->ndim; i++)
    if (need->shape[i] >= 0 && view->shape[i] != need->shape[i]) return false;
  return true;
}

static bool on_cpu(const tensor_view *view) {
  int32_t type = view->device.device_type;
  return type == DL_CPU || type == DL_CUDA_HOST || type == DL_ROCM_HOST;
}

static bool on_cuda(const tensor_view *view) {
  int32_t type = view->device.device_type;
  return type == DL_CUDA || type == DL_CUDA_MANAGED;
}

static bool is_where(const tensor_view *view, const tensor_where *where) {
  if (where->place != TENSOR_ON_CUDA && on_cpu(view)) return true;
  return where->place != TENSOR_ON_CPU && on_cuda(view) && view->device.device_id == where->device;
}

static PyObject *fail_where(core_state *state, const tensor_need *need, const tensor_view *view) {
  enum { PLACE_TEXT = 64 };
  char got[PLACE_TEXT], expected[PLACE_TEXT];
  if (on_cpu(view))
    snprintf(got, sizeof got, "a tensor in CPU memory");
  else if (on_cuda(view))
    snprintf(got, sizeof got, "a tensor on CUDA device %d", view->device.device_id);
  else
    snprintf(got, sizeof got, "DLPack device type %d, id %d", view->device.device_type,
             view->device.device_id);
  if (need->where.place == TENSOR_ON_CPU)
    snprintf(expected, sizeof expected, "CPU memory");
  else
    snprintf(expected, sizeof expected, "%sCUDA device %d",
             need->where.place == TENSOR_ON_EITHER ? "CPU memory or " : "", need->where.device);
  return core_fail(state, MS_EINVAL, "%s: got %s, expected %s", need->name, got, expected);
}

int tensor_view_check(core_state *state, const tensor_need *need, tensor_view *view) {
  char got[LIST_TEXT], expected[LIST_TEXT];
  const char *name = need->name;
  if (!is_where(view, &need->where)) {
    fail_where(state, need, view);
  } else if (!core_dtype(view->dtype, &view->type) || !(need->dtypes & 1u << view->type)) {
    tensor_dtype_name(view->dtype, got);
    list_dtypes(need->dtypes, expected);
    core_fail(state, MS_EDTYPE, "%s: got %s, expected %s", name, got, expected);
  } else if (!shape_fits(view, need)) {
    list(view->shape, view->ndim, got);
    list_needed(need, expected);
    core_fail(state, MS_ESHAPE, "%s: got %s, expected %s", name, got, expected);
  } else if (!need->strided && !view->contiguous) {
    list(view->shape, view->ndim, got);
    list(view->strides, view->ndim, expected);
    core_fail(state, MS_EINVAL,
              "%s: got %s with strides %s, expected a contiguous tensor: call .contiguous() or "
              "numpy.ascontiguousarray()",
              name, got, expected);
  } else if (need->write && view->read_only) {
    core_fail(state, MS_EINVAL, "%s: got read-only memory, expected memory to write to", name);
  } else if ((uintptr_t)view->data % (uintptr_t)element_bytes(view->dtype)) {
    core_fail(state, MS_EINVAL,
              "%s: got an address that is no multiple of its %d-byte elements, expected one that "
              "is: copy it",
              name, (int)element_bytes(view->dtype));
  } else {
    return 0;
  }
  return -1;
}

int tensor_view_take(core_state *state, PyObject *tensor, const tensor_need *need,
                     tensor_view *out) {
  if (tensor_view_open(state, tensor, need->name, need->write, need->where.stream, out)) return -1;
  if (tensor_view_check(state, need, out) == 0) return 0;
  tensor_view_close(out);
  return -1;
}
