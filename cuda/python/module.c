// module.c - the _cuda extension: its state, and what is in it. A room a file:
//
//   experts.c   PackedExperts: this rank's columns on a device
//   layout.c    Layout: this rank's share of each expert's slots
//   exchange.c  NcclExchange: how devices reach each other
//   engine.c    Engine: a layer on the caller's stream
//
// Errors, tensors and arrays are files of csrc/python, linked into both extensions.
//
// SPDX-License-Identifier: Apache-2.0
#define MS_NUMPY_API_HERE
#include "cuda.h"
#include "../../csrc/python/error.h"

#include <cuda_runtime_api.h> // cudaGetDeviceCount(), cudaRuntimeGetVersion(), cudaDeviceGetAttribute()

PyDoc_STRVAR(device_count_doc,
             "device_count($module, /)\n--\n\n"
             "The number of CUDA devices that this process may use, at least 1.\n\n"
             "Raises:\n"
             "    CudaError: there is no device, or no driver that fits the CUDA runtime.\n");

static PyObject *device_count(PyObject *module, PyObject *unused) {
  (void)unused;
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess)
    return core_fail(PyModule_GetState(module), MS_ECUDA, "cudaGetDeviceCount: %s (%d)",
                     cudaGetErrorString(error), (int)error);
  return PyLong_FromLong(count);
}

PyDoc_STRVAR(device_capability_doc,
             "device_capability($module, device, /)\n--\n\n"
             "The compute capability of a CUDA device: (9, 0) for an H100.\n\n"
             "Raises:\n"
             "    CudaError: there is no such device.\n");

static PyObject *device_capability(PyObject *module, PyObject *number) {
  core_state *state = PyModule_GetState(module);
  long long asked = PyLong_AsLongLong(number);
  if (asked == -1 && PyErr_Occurred()) return NULL;
  int32_t device;
  if (!core_int32(state, "device", asked, &device)) return NULL;
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess)
    return core_fail(state, MS_ECUDA, "cudaDeviceGetAttribute: device %d: %s (%d)", device,
                     cudaGetErrorString(error), (int)error);
  return Py_BuildValue("(ii)", major, minor);
}

PyDoc_STRVAR(runtime_version_doc, "runtime_version($module, /)\n--\n\n"
                                  "The version of the CUDA runtime in use: 13000 is 13.0.\n");

static PyObject *runtime_version(PyObject *module, PyObject *unused) {
  (void)unused;
  int version = 0;
  cudaError_t error = cudaRuntimeGetVersion(&version);
  if (error != cudaSuccess)
    return core_fail(PyModule_GetState(module), MS_ECUDA, "cudaRuntimeGetVersion: %s (%d)",
                     cudaGetErrorString(error), (int)error);
  return PyLong_FromLong(version);
}

static PyMethodDef functions[] = {
    {"device_count", device_count, METH_NOARGS, device_count_doc},
    {"device_capability", device_capability, METH_O, device_capability_doc},
    {"runtime_version", runtime_version, METH_NOARGS, runtime_version_doc},
    {0}};

// The exception classes are those of _core: `except moeshard.RankLost` means both engines.
static int adopt_errors(core_state *state) {
  PyObject *core = PyImport_ImportModule("moeshard._core");
  int result = core ? core_adopt_errors(core, state) : -1;
  Py_XDECREF(core);
  return result;
}

static int module_exec(PyObject *module) {
  core_state *state = PyModule_GetState(module);
  if (PyArray_ImportNumPyAPI() < 0) return -1;
  if (core_state_init(state)) return -1;
  if (adopt_errors(state)) return -1;
  if (cuda_add_experts(module, state)) return -1;
  if (cuda_add_layout(module, state)) return -1;
  if (cuda_add_exchange(module, state)) return -1;
  if (cuda_add_engine(module, state)) return -1;
  if (PyModule_AddFunctions(module, functions)) return -1;
  return PyModule_AddStringConstant(module, "__version__", MS_VERSION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
  return core_state_traverse(PyModule_GetState(module), visit, arg);
}

static int module_clear(PyObject *module) { return core_state_clear(PyModule_GetState(module)); }

static void module_free(void *module) {
  core_state *state = PyModule_GetState(module);
  core_state_clear(state);
  pthread_mutex_destroy(&state->lock);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec},
#ifdef Py_GIL_DISABLED
                                          {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                          {0, NULL}};

PyDoc_STRVAR(module_doc,
             "The CUDA engine of moeshard: one class per chapter of cuda/moeshard_cuda.h.\n\n"
             "A forward pass of a layer is one call, engine.forward(experts, hidden_states, "
             "top_k_index, top_k_weights, out),\n"
             "enqueued on the stream that the tensors' library works on.\n\n"
             "Tensors are any CUDA tensors with DLPack (torch, CuPy, JAX ...) and are not copied. "
             "Dims: T tokens of this\n"
             "rank, D model width, F hidden width of an expert, E experts, K choices a token.\n");

static PyModuleDef module_def = {.m_base = PyModuleDef_HEAD_INIT,
                                 .m_name = "moeshard._cuda",
                                 .m_doc = module_doc,
                                 .m_size = sizeof(core_state),
                                 .m_slots = module_slots,
                                 .m_traverse = module_traverse,
                                 .m_clear = module_clear,
                                 .m_free = module_free};

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&module_def); }
