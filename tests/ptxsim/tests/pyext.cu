// SPDX-License-Identifier: Apache-2.0
// pyext.cu - a CPython extension, built by nvcc as a user would, that takes DLPack CUDA tensors.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdint>
#include <cuda_bf16.h>
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor t;
  void* ctx;
  void (*deleter)(DLManagedTensor*);
};
__global__ void axpy(const __nv_bfloat16* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    y[i] += a * __bfloat162float(x[i]);
}
static DLManagedTensor* take(PyObject* o) {
  PyObject* c = PyObject_CallMethod(o, "__dlpack__", nullptr);
  if (!c)
    return nullptr;
  auto* m = (DLManagedTensor*)PyCapsule_GetPointer(c, "dltensor");
  if (m)
    PyCapsule_SetName(c, "used_dltensor");
  Py_DECREF(c);
  return m;
}
static PyObject* run(PyObject*, PyObject* args) {
  PyObject *x, *y;
  double a;
  if (!PyArg_ParseTuple(args, "OOd", &x, &y, &a))
    return nullptr;
  DLManagedTensor *X = take(x), *Y = take(y);
  if (!X || !Y)
    return nullptr;
  if (X->t.device_type != 2) {
    PyErr_SetString(PyExc_ValueError, "not a CUDA tensor");
    return nullptr;
  }
  int n = (int)X->t.shape[0];
  axpy<<<(n + 63) / 64, 64>>>((const __nv_bfloat16*)X->t.data, (float*)Y->t.data, (float)a, n);
  cudaError_t e = cudaGetLastError();
  X->deleter(X);
  Y->deleter(Y);
  if (e) {
    PyErr_SetString(PyExc_RuntimeError, cudaGetErrorString(e));
    return nullptr;
  }
  Py_RETURN_NONE;
}
static PyMethodDef methods[] = {{"axpy", run, METH_VARARGS, ""}, {}};
static PyModuleDef mod = {PyModuleDef_HEAD_INIT, "pyext", "", -1, methods};
PyMODINIT_FUNC PyInit_pyext() {
  return PyModule_Create(&mod);
}
