// experts.c - chapter "experts" of moeshard_cuda.h for Python: PackedExperts, this rank's columns on a device.
// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"
#include "../../csrc/python/arrays.h"
#include "../../csrc/python/error.h"
#include "../../csrc/python/experts_args.h"

static PyObject *experts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  core_state *state = PyType_GetModuleState(type);
  PyObject *columns = NULL;
  ms_experts_spec spec;
  int32_t device;
  if (experts_parse_new(state, args, kwargs, &device, &spec, &columns)) return NULL;
  cuda_experts_object *self = (cuda_experts_object *)PyType_GenericAlloc(type, 0);
  if (self) {
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    ms_status status = ms_cuda_experts_create(&spec, device, &self->experts, &err);
    PyEval_RestoreThread(gil);
    if (status == MS_OK) {
      self->spec = &self->experts->spec;
    } else {
      core_raise(state, &err);
      Py_CLEAR(self);
    }
  }
  Py_DECREF(columns);
  return (PyObject *)self;
}

static void experts_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyThreadState *gil = PyEval_SaveThread(); // freeing device memory waits for what runs there
  ms_cuda_experts_free(((cuda_experts_object *)self)->experts);
  PyEval_RestoreThread(gil);
  PyObject_Free(self);
  Py_DECREF(type);
}

// The work goes to the stream on which the library of the first tensor works, so that it is in order with what made
// the tensors, and with what frees them.
static int where_of(core_state *state, const ms_cuda_experts *experts, PyObject *args,
                    tensor_where *out) {
  *out = (tensor_where){.place = TENSOR_ON_EITHER, .device = experts->device};
  for (Py_ssize_t i = 1; i < PyTuple_Size(args); i++) {
    PyObject *tensor = PyTuple_GetItem(args, i);
    if (tensor != Py_None) return tensor_stream(state, tensor, out->device, &out->stream);
  }
  return 0;
}

PyDoc_STRVAR(
    pack_doc,
    "pack($self, /, expert, w_in, w_out, b_in=None, b_out=None, *, first=0)\n--\n\n"
    "Copy this rank's columns of one expert to the device. The sources are read once and not "
    "kept.\n\n"
    "As moeshard._core.PackedExperts.pack, but the sources may also be on this device. Returns "
    "when they have been read.\n\n"
    "Raises:\n"
    "    ShapeError: a shape that does not fit, or columns of this rank that the sources lack.\n"
    "    DTypeError: a dtype that is not accepted.\n"
    "    ArgumentError: no such expert; a bias missing or unexpected; a tensor elsewhere.\n"
    "    CudaError: a call of the CUDA runtime failed.\n");

static PyObject *experts_pack(PyObject *object, PyObject *args, PyObject *kwargs) {
  cuda_experts_object *self = (cuda_experts_object *)object;
  core_state *state = core_state_of(object);
  tensor_where where;
  if (where_of(state, self->experts, args, &where)) return NULL;
  experts_call call;
  if (experts_parse_pack(state, self->spec, &where, args, kwargs, &call)) return NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_experts_pack(
      self->experts, call.expert, call.first, call.count, &call.w_in, &call.w_out,
      call.views[EXPERTS_B_IN].data, call.views[EXPERTS_B_OUT].data, call.bias, where.stream, &err);
  PyEval_RestoreThread(gil);
  PyObject *result = core_none(state, status, &err);
  experts_call_close(&call);
  return result;
}

PyDoc_STRVAR(unpack_doc,
             "unpack($self, /, expert, w_in=None, w_out=None, b_in=None, b_out=None)\n--\n\n"
             "Write this rank's columns of one expert to tensors in CPU memory or on this "
             "device.\n\n"
             "As moeshard._core.PackedExperts.unpack. Returns when they are written.\n\n"
             "Raises:\n"
             "    ShapeError, DTypeError: a destination that does not fit.\n"
             "    ArgumentError: no such expert; read-only memory; a bias that these experts do "
             "not have.\n"
             "    CudaError: a call of the CUDA runtime failed.\n");

static PyObject *experts_unpack(PyObject *object, PyObject *args, PyObject *kwargs) {
  cuda_experts_object *self = (cuda_experts_object *)object;
  core_state *state = core_state_of(object);
  tensor_where where;
  if (where_of(state, self->experts, args, &where)) return NULL;
  experts_call call;
  if (experts_parse_unpack(state, self->spec, &where, args, kwargs, &call)) return NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_experts_unpack(
      self->experts, call.expert, call.views[EXPERTS_W_IN].data, call.views[EXPERTS_W_OUT].data,
      call.views[EXPERTS_B_IN].data, call.views[EXPERTS_B_OUT].data, where.stream, &err);
  PyEval_RestoreThread(gil);
  PyObject *result = core_none(state, status, &err);
  experts_call_close(&call);
  return result;
}

PyDoc_STRVAR(seen_doc,
             "seen($self, /, *, forget=False)\n--\n\n"
             "The slots that came in so far, over all ranks: [E+1] int64, those of each expert, "
             "then all of them.\n\n"
             "Counted on the device; replays of a captured graph count too, calls with a fault do "
             "not. Waits for the device.\n\n"
             "Args:\n"
             "    forget: begin anew.\n\n"
             "Raises:\n"
             "    CudaError: a call of the CUDA runtime failed.\n");

static PyObject *experts_seen(PyObject *object, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"forget", NULL};
  int forget = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$p:seen", names, &forget)) return NULL;
  cuda_experts_object *self = (cuda_experts_object *)object;
  PyObject *array = array_new(NPY_INT64, 1, (int64_t)self->spec->E + 1, 0);
  if (!array) return NULL;
  int64_t *seen = array_data(array);
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_experts_seen(self->experts, seen, forget, &err);
  PyEval_RestoreThread(gil);
  if (status == MS_OK) return array;
  Py_DECREF(array);
  return core_raise(core_state_of(object), &err);
}

static PyObject *get_nbytes(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(((cuda_experts_object *)self)->experts->bytes);
}

static PyObject *get_device(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLong(((cuda_experts_object *)self)->experts->device);
}

static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))experts_pack, METH_VARARGS | METH_KEYWORDS, pack_doc},
    {"unpack", (PyCFunction)(void (*)(void))experts_unpack, METH_VARARGS | METH_KEYWORDS,
     unpack_doc},
    {"seen", (PyCFunction)(void (*)(void))experts_seen, METH_VARARGS | METH_KEYWORDS, seen_doc},
    {0}};

static PyGetSetDef getset[] = {
    {"nbytes", get_nbytes, NULL, "Bytes of device memory that the weights of this rank take.",
     NULL},
    {"device", get_device, NULL, "The number of the CUDA device they are on.", NULL},
    EXPERTS_PROPERTIES,
    {0}};

PyDoc_STRVAR(
    type_doc,
    "PackedExperts(*, columns, d_model, d_ff, dtype, activation, gated, b_in, b_out, device)\n--"
    "\n\n"
    "This rank's columns of every expert of a layer on a CUDA device. Filled expert by expert with "
    "pack.\n\n"
    "As moeshard._core.PackedExperts, with one argument more.\n\n"
    "Args:\n"
    "    device: the number of the CUDA device.\n\n"
    "Raises:\n"
    "    ArgumentError, ShapeError, DTypeError: as moeshard._core.PackedExperts.\n"
    "    CudaError: no such device, or a call of the CUDA runtime failed.\n"
    "    MemoryError: no device memory for the weights.\n");

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},    {Py_tp_new, experts_new},
                              {Py_tp_dealloc, experts_dealloc}, {Py_tp_methods, methods},
                              {Py_tp_getset, getset},           {0, NULL}};

static PyType_Spec type_spec = {.name = "moeshard._cuda.PackedExperts",
                                .basicsize = sizeof(cuda_experts_object),
                                .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                .slots = slots};

int cuda_add_experts(PyObject *module, core_state *state) {
  state->experts_type = core_add_type(module, &type_spec);
  return state->experts_type ? 0 : -1;
}
