// tensor.c - Tensor: memory of our own, for results, that any tensor library can take over without a copy; tensor_info.
//
// The memory is counted by itself, not by the Python object: whoever took it over may let it go from any thread,
// without the GIL, and after the interpreter has ended.
//
// SPDX-License-Identifier: Apache-2.0
#include "tensor_view.h"
#include "error.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 };

typedef struct block {
  _Atomic int64_t users; // the Tensor and every export
  void *data;            // [bytes] aligned
  ms_dtype type;
  int64_t bytes;
  int32_t ndim;
  int64_t shape[TENSOR_MAX_DIMS], strides[TENSOR_MAX_DIMS]; // in elements, for DLPack
  Py_ssize_t byte_strides[TENSOR_MAX_DIMS];                 // for the buffer protocol
} block;

_Static_assert(sizeof(Py_ssize_t) == sizeof(int64_t), "one shape serves both protocols");

typedef struct tensor_object {
  PyObject_HEAD block *block;
} tensor_object;

// ---- the block ----------------------------------------------------------------------------------

static void block_drop(block *b) {
  if (!b || atomic_fetch_sub(&b->users, 1) > 1) return;
  free(b->data);
  free(b);
}

// NULL: no memory, or a size that no memory has.
static block *block_create(ms_dtype type, int32_t ndim, const int64_t *shape) {
  block *b = calloc(1, sizeof *b);
  if (!b) return NULL;
  *b = (block){.users = 1, .type = type, .ndim = ndim};
  int64_t count = 1, room = 0;
  bool empty = false;
  for (int32_t i = 0; i < ndim; i++) empty |= shape[i] == 0;
  for (int32_t i = ndim - 1; i >= 0; i--) {
    b->shape[i] = shape[i];
    b->strides[i] = count;
    b->byte_strides[i] = (Py_ssize_t)(count * ms_dtype_size(type));
    if (!empty && __builtin_mul_overflow(count, shape[i], &count)) goto failed;
  }
  if (empty) count = 0;
  if (__builtin_mul_overflow(count, ms_dtype_size(type), &b->bytes)) goto failed;
  if (__builtin_add_overflow(b->bytes, ALIGNMENT, &room)) goto failed;
  b->data = aligned_alloc(ALIGNMENT, (size_t)(room / ALIGNMENT * ALIGNMENT));
  if (b->data) return b;
failed:
  block_drop(b);
  return NULL;
}

static DLDataType dlpack_dtype(ms_dtype type) {
  return (DLDataType){type == MS_BF16 ? DL_BFLOAT : DL_FLOAT, (uint8_t)(8 * ms_dtype_size(type)),
                      1};
}

static DLTensor dlpack_fields(block *b) {
  return (DLTensor){.data = b->data,
                    .device = {DL_CPU, 0},
                    .ndim = b->ndim,
                    .dtype = dlpack_dtype(b->type),
                    .shape = b->shape,
                    .strides = b->strides};
}

void tensor_object_view(PyObject *tensor, tensor_view *out) {
  block *b = ((tensor_object *)tensor)->block;
  out->data = b->data;
  out->device = (DLDevice){DL_CPU, 0};
  out->dtype = dlpack_dtype(b->type);
  out->ndim = b->ndim;
  memcpy(out->shape, b->shape, sizeof b->shape);
  memcpy(out->strides, b->strides, sizeof b->strides);
}

// ---- exports ------------------------------------------------------------------------------------

static void versioned_delete(DLManagedTensorVersioned *managed) {
  block_drop(managed->manager_ctx);
  free(managed);
}

static void legacy_delete(DLManagedTensor *managed) {
  block_drop(managed->manager_ctx);
  free(managed);
}

// A capsule that nobody took still owns its tensor.
static void capsule_delete(PyObject *capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    managed->deleter(managed);
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
    managed->deleter(managed);
  }
}

// Takes one use of b over, also when it fails.
static PyObject *versioned_capsule(block *b, uint64_t flags) {
  DLManagedTensorVersioned *managed = malloc(sizeof *managed);
  if (!managed) {
    block_drop(b);
    return PyErr_NoMemory();
  }
  *managed = (DLManagedTensorVersioned){.version = {DLPACK_MAJOR, DLPACK_MINOR},
                                        .manager_ctx = b,
                                        .deleter = versioned_delete,
                                        .flags = flags,
                                        .dl_tensor = dlpack_fields(b)};
  PyObject *capsule = PyCapsule_New(managed, "dltensor_versioned", capsule_delete);
  if (!capsule) versioned_delete(managed);
  return capsule;
}

static PyObject *legacy_capsule(block *b) {
  DLManagedTensor *managed = malloc(sizeof *managed);
  if (!managed) {
    block_drop(b);
    return PyErr_NoMemory();
  }
  *managed =
      (DLManagedTensor){.dl_tensor = dlpack_fields(b), .manager_ctx = b, .deleter = legacy_delete};
  PyObject *capsule = PyCapsule_New(managed, "dltensor", capsule_delete);
  if (!capsule) legacy_delete(managed);
  return capsule;
}

static block *block_copy(const block *from) {
  block *to = block_create(from->type, from->ndim, from->shape);
  if (!to)
    PyErr_NoMemory();
  else if (from->bytes)
    memcpy(to->data, from->data, (size_t)from->bytes);
  return to;
}

PyDoc_STRVAR(
    dlpack_doc,
    "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
    "Export the memory as a DLPack capsule, without a copy. For from_dlpack of any library.\n\n"
    "Args:\n"
    "    stream: None, there are no streams in CPU memory.\n"
    "    max_version: the newest DLPack the consumer knows, (major, minor). None: an unversioned "
    "capsule.\n"
    "    dl_device: None or (1, 0), the CPU.\n"
    "    copy: True: a copy of the memory. None or False: the memory itself.\n\n"
    "Returns:\n"
    "    A capsule named 'dltensor_versioned' (DLPack 1.3), or 'dltensor' for consumers older than "
    "DLPack 1.0.\n\n"
    "Raises:\n"
    "    BufferError: a stream, or a device other than the CPU.\n");

static PyObject *tensor_dlpack(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
  int major = 0, minor = 0, type = DL_CPU, id = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &version,
                                   &device, &copy))
    return NULL;
  if (version != Py_None &&
      !PyArg_Parse(version, "(ii);max_version: expected (major, minor)", &major, &minor))
    return NULL;
  if (device != Py_None && !PyArg_Parse(device, "(ii);dl_device: expected (type, id)", &type, &id))
    return NULL;
  if (stream != Py_None) {
    PyErr_SetString(PyExc_BufferError, "stream: expected None, the tensor is in CPU memory");
    return NULL;
  }
  if (type != DL_CPU || id != 0) {
    PyErr_Format(PyExc_BufferError, "dl_device: got (%d, %d), expected (1, 0), the CPU", type, id);
    return NULL;
  }
  int copied = copy == Py_None ? 0 : PyObject_IsTrue(copy);
  if (copied < 0) return NULL;
  block *b = ((tensor_object *)self)->block;
  if (copied)
    b = block_copy(b);
  else
    atomic_fetch_add(&b->users, 1);
  if (!b) return NULL;
  return major >= DLPACK_MAJOR ? versioned_capsule(b, copied ? DL_IS_COPIED : 0)
                               : legacy_capsule(b);
}

PyDoc_STRVAR(dlpack_device_doc, "__dlpack_device__($self, /)\n--\n\n"
                                "Where the memory is: (1, 0), the CPU.");

static PyObject *tensor_dlpack_device(PyObject *self, PyObject *unused) {
  (void)self, (void)unused;
  return Py_BuildValue("(ii)", DL_CPU, 0);
}

static int tensor_getbuffer(PyObject *self, Py_buffer *view, int flags) {
  block *b = ((tensor_object *)self)->block;
  view->obj = NULL;
  if (b->type == MS_BF16) {
    PyErr_SetString(PyExc_BufferError,
                    "bfloat16 has no buffer format: use DLPack, for example torch.from_dlpack");
    return -1;
  }
  *view = (Py_buffer){
      .buf = b->data,
      .obj = Py_NewRef(self),
      .len = (Py_ssize_t)b->bytes,
      .itemsize = (Py_ssize_t)ms_dtype_size(b->type),
      .ndim = b->ndim,
      .format = flags & PyBUF_FORMAT ? (b->type == MS_F16 ? "e" : "f") : NULL,
      .shape = flags & PyBUF_ND ? (Py_ssize_t *)b->shape : NULL,
      .strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? b->byte_strides : NULL,
  };
  return 0;
}

// ---- the type -----------------------------------------------------------------------------------

static int take_shape(core_state *state, PyObject *tuple, int64_t shape[TENSOR_MAX_DIMS]) {
  Py_ssize_t ndim = PyTuple_Size(tuple);
  if (ndim > TENSOR_MAX_DIMS) {
    core_fail(state, MS_ESHAPE, "shape: got %zd dimensions, expected at most %d", ndim,
              TENSOR_MAX_DIMS);
    return -1;
  }
  for (Py_ssize_t i = 0; i < ndim; i++) {
    shape[i] = PyNumber_AsSsize_t(PyTuple_GetItem(tuple, i), PyExc_OverflowError);
    if (shape[i] == -1 && PyErr_Occurred()) return -1;
    if (shape[i] < 0) {
      core_fail(state, MS_ESHAPE, "shape[%zd]: got %lld, expected at least 0", i,
                (long long)shape[i]);
      return -1;
    }
  }
  return (int)ndim;
}

static PyObject *tensor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"shape", "dtype", NULL};
  core_state *state = PyType_GetModuleState(type);
  PyObject *tuple = NULL;
  const char *dtype = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!s:Tensor", names, &PyTuple_Type, &tuple,
                                   &dtype))
    return NULL;
  int64_t shape[TENSOR_MAX_DIMS];
  ms_dtype element;
  if (!tensor_dtype_parse(state, dtype, TENSOR_FLOATS, &element)) return NULL;
  int ndim = take_shape(state, tuple, shape);
  if (ndim < 0) return NULL;
  tensor_object *self = (tensor_object *)PyType_GenericAlloc(type, 0);
  if (!self) return NULL;
  self->block = block_create(element, ndim, shape);
  if (self->block) return (PyObject *)self;
  Py_DECREF(self);
  return core_fail(state, MS_ENOMEM, "shape: no memory for a %s tensor of this size", dtype);
}

static void tensor_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  block_drop(((tensor_object *)self)->block);
  PyObject_Free(self);
  Py_DECREF(type);
}

static PyObject *shape_tuple(const int64_t *shape, int32_t ndim) {
  PyObject *tuple = PyTuple_New(ndim);
  for (int32_t i = 0; tuple && i < ndim; i++) {
    PyObject *size = PyLong_FromLongLong(shape[i]);
    if (!size || PyTuple_SetItem(tuple, i, size)) Py_CLEAR(tuple);
  }
  return tuple;
}

static PyObject *tensor_shape(PyObject *self, void *unused) {
  (void)unused;
  const block *b = ((tensor_object *)self)->block;
  return shape_tuple(b->shape, b->ndim);
}

static PyObject *tensor_dtype(PyObject *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(ms_dtype_name(((tensor_object *)self)->block->type));
}

static PyMethodDef tensor_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
     dlpack_doc},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, dlpack_device_doc},
    {0}};

static PyGetSetDef tensor_getset[] = {
    {"shape", tensor_shape, NULL, "Its sizes, a tuple of int.", NULL},
    {"dtype", tensor_dtype, NULL, "'float32', 'bfloat16' or 'float16'.", NULL},
    {0}};

PyDoc_STRVAR(tensor_doc,
             "Tensor(shape, dtype)\n--\n\n"
             "Memory of our own, 64-byte aligned, row-major, on the CPU; its contents are "
             "undefined at first.\n\n"
             "Any library with from_dlpack takes it over without a copy; float32 and float16 also "
             "have the buffer\n"
             "protocol (numpy.asarray). The memory lives as long as the last of its users.\n\n"
             "Args:\n"
             "    shape: a tuple of sizes, at most 32, each at least 0.\n"
             "    dtype: 'float32', 'bfloat16' or 'float16'.\n\n"
             "Raises:\n"
             "    ShapeError: a negative size, or too many dimensions.\n"
             "    DTypeError: another dtype.\n"
             "    MemoryError: more than this machine has.\n");

static PyType_Slot tensor_slots[] = {{Py_tp_doc, (void *)tensor_doc},
                                     {Py_tp_new, tensor_new},
                                     {Py_tp_dealloc, tensor_dealloc},
                                     {Py_tp_methods, tensor_methods},
                                     {Py_tp_getset, tensor_getset},
                                     {Py_bf_getbuffer, tensor_getbuffer},
                                     {0, NULL}};

static PyType_Spec tensor_spec = {.name = "moeshard._core.Tensor",
                                  .basicsize = sizeof(tensor_object),
                                  .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                  .slots = tensor_slots};

// ---- tensor_info --------------------------------------------------------------------------------

PyDoc_STRVAR(
    info_doc,
    "tensor_info($module, tensor, /)\n--\n\n"
    "What a tensor of any DLPack library is. Its data is not touched and may be on any device.\n\n"
    "Args:\n"
    "    tensor: any tensor with __dlpack__ (torch, NumPy, JAX ...).\n\n"
    "Returns:\n"
    "    (shape, dtype name, (DLPack device type, device id), whether it is row-major without "
    "gaps).\n\n"
    "Raises:\n"
    "    DTypeError: not a tensor, or a NumPy dtype that DLPack does not know.\n"
    "    ArgumentError: its library cannot share it (it requires grad, is sparse, has no memory "
    "...).\n\n"
    "Example:\n"
    "    >>> import numpy\n"
    "    >>> tensor_info(numpy.zeros((2, 3), numpy.float16))\n"
    "    ((2, 3), 'float16', (1, 0), True)\n");

static PyObject *tensor_info(PyObject *module, PyObject *tensor) {
  tensor_view view;
  if (tensor_view_open(PyModule_GetState(module), tensor, "tensor", false, NULL, &view))
    return NULL;
  char dtype[TENSOR_DTYPE_TEXT];
  tensor_dtype_name(view.dtype, dtype);
  PyObject *result = NULL, *shape = shape_tuple(view.shape, view.ndim);
  if (shape)
    result = Py_BuildValue("(Ns(ii)O)", shape, dtype, view.device.device_type,
                           view.device.device_id, view.contiguous ? Py_True : Py_False);
  tensor_view_close(&view);
  return result;
}

static PyMethodDef functions[] = {{"tensor_info", tensor_info, METH_O, info_doc}, {0}};

int core_add_tensor(PyObject *module, core_state *state) {
  state->tensor_type = core_add_type(module, &tensor_spec);
  return state->tensor_type ? PyModule_AddFunctions(module, functions) : -1;
}
