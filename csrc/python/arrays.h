// arrays.h - NumPy arrays: anything like one in, new ones out.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_ARRAYS_H
#define MS_ARRAYS_H

#include "core.h"

typedef struct array_need {
  const char *name;
  int type; // NPY_INT64 or NPY_DOUBLE; only conversions that keep every value
  int32_t ndim;
  int64_t shape[3]; // -1: any, but not 0
  const char *dims; // for messages: "R, E, 2"
} array_need;

// A new reference to a contiguous array; NULL with an exception set.
PyArrayObject *array_take(core_state *state, PyObject *like, const array_need *need);

// [E] int64 numbers as int32 in memory of malloc; NULL with an exception set.
int32_t *array_take_int32(core_state *state, PyObject *like, const char *name, int64_t count);

// A column table (plan.c), borrowed from `columns`, all of it but F; copies None: one of each expert; out->copies is freed
// with free. 0, or -1 with an exception set.
int core_take_plan(core_state *state, PyObject *table, PyObject *copies, PyArrayObject **columns,
                   ms_plan *out);

// A new array with room for its elements. NULL with an exception set.
PyObject *array_new(int type, int32_t ndim, int64_t rows, int64_t columns);
// A new array with a copy of data, which may be NULL when there is no element.
PyObject *array_copy(int type, int32_t ndim, int64_t rows, int64_t columns, const void *data);

static inline void *array_data(PyObject *array) { return PyArray_DATA((PyArrayObject *)array); }

#endif
