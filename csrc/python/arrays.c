// arrays.c - NumPy arrays: anything like one in, new ones out.
// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"
#include "error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

PyArrayObject *array_take(core_state *state, PyObject *like, const array_need *need) {
  // As it comes first: told a dtype, NumPy would cut a list of 0.5 to integers. From array to array it does not.
  PyArrayObject *array = NULL;
  PyObject *any = PyArray_FROM_O(like);
  if (any) array = (PyArrayObject *)PyArray_FROM_OTF(any, need->type, NPY_ARRAY_IN_ARRAY);
  Py_XDECREF(any);
  if (!array) {
    core_fail_from(state, MS_EDTYPE, "%s: expected %s [%s]", need->name,
                   need->type == NPY_DOUBLE ? "numbers" : "integers", need->dims);
    return NULL;
  }
  bool fits = PyArray_NDIM(array) == need->ndim;
  for (int32_t i = 0; fits && i < need->ndim; i++)
    fits = need->shape[i] < 0 ? PyArray_DIM(array, i) > 0 : PyArray_DIM(array, i) == need->shape[i];
  if (fits) return array;

  char got[128] = "";
  for (int i = 0, used = 0; i < PyArray_NDIM(array) && used < (int)sizeof got - 32; i++)
    used += snprintf(got + used, sizeof got - (size_t)used, "%s%lld", i ? ", " : "",
                     (long long)PyArray_DIM(array, i));
  core_fail(state, MS_ESHAPE, "%s: got [%s], expected [%s]", need->name, got, need->dims);
  Py_DECREF(array);
  return NULL;
}

int32_t *array_take_int32(core_state *state, PyObject *like, const char *name, int64_t count) {
  char dims[32];
  snprintf(dims, sizeof dims, "E=%lld", (long long)count);
  array_need need = {.name = name, .type = NPY_INT64, .ndim = 1, .shape = {count}, .dims = dims};
  PyArrayObject *array = array_take(state, like, &need);
  if (!array) return NULL;
  const int64_t *from = PyArray_DATA(array);
  int32_t *to = malloc((size_t)count * sizeof *to);
  if (!to) PyErr_NoMemory();
  for (int64_t i = 0; to && i < count; i++)
    if (!core_int32(state, name, from[i], &to[i])) {
      free(to);
      to = NULL;
    }
  Py_DECREF(array);
  return to;
}

PyObject *array_new(int type, int32_t ndim, int64_t rows, int64_t columns) {
  npy_intp shape[2] = {(npy_intp)rows, (npy_intp)columns};
  return PyArray_SimpleNew(ndim, shape, type);
}

PyObject *array_copy(int type, int32_t ndim, int64_t rows, int64_t columns, const void *data) {
  PyObject *array = array_new(type, ndim, rows, columns);
  if (!array) return NULL;
  size_t bytes = (size_t)PyArray_NBYTES((PyArrayObject *)array);
  if (bytes) memcpy(array_data(array), data, bytes);
  return array;
}
