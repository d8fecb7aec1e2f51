// tensor_view.h - any tensor as a pointer, a shape and a dtype, checked, without a copy.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_TENSOR_VIEW_H
#define MS_TENSOR_VIEW_H

#include "core.h"

enum { TENSOR_MAX_DIMS = 32 };

typedef struct tensor_view {
  void *data; // first element; never NULL, not even when there is none
  DLDevice device;
  DLDataType dtype;
  ms_dtype type; // the same for the core: set by tensor_view_take
  int32_t ndim;
  int64_t shape[TENSOR_MAX_DIMS], strides[TENSOR_MAX_DIMS]; // in elements
  bool contiguous, read_only;
  tensor_hold hold; // keeps data alive
} tensor_view;

// Read a tensor: NumPy by its C API, ours directly, others by the C exchange table of their type, else by capsule.
//   name   the argument, for messages
//   write  it will be written: the producer is asked whether it may be
//   stream CUDA stream on which it will be read or written: producers of capsules order their work before it. NULL:
//          the legacy default stream, or no stream at all
// 0, or -1 with an exception set and nothing held. Data is not touched and may be on any device.
int tensor_view_open(core_state *state, PyObject *tensor, const char *name, bool write,
                     void *stream, tensor_view *out);

// The stream on which the library of `tensor` works now on CUDA device `device`. Libraries without an exchange table
// do not say: NULL then, the legacy default stream, with which their capsules are in order.
// 0, or -1 with an exception set.
int tensor_stream(core_state *state, PyObject *tensor, int32_t device, void **stream);

enum { // dtypes accepted, as bits
  TENSOR_FLOATS = 1 << MS_F32 | 1 << MS_BF16 | 1 << MS_F16,
  TENSOR_INTEGERS = 1 << MS_I32 | 1 << MS_I64,
  TENSOR_STORAGE = TENSOR_FLOATS | 1 << MS_I8 // of packed weights
};

typedef enum tensor_place { TENSOR_ON_CPU = 0, TENSOR_ON_CUDA, TENSOR_ON_EITHER } tensor_place;

typedef struct tensor_where { // zeroed: CPU memory
  tensor_place place;
  int32_t device; // number of the CUDA device
  void *stream;   // on it, see tensor_view_open
} tensor_where;

typedef struct tensor_need {
  const char *name;
  unsigned dtypes;
  int32_t ndim;        // 1 or 2
  int64_t shape[2];    // -1: any
  const char *dims;    // their letters, "TD", for messages
  bool strided, write; // any strides will do; contiguous otherwise
  tensor_where where;
} tensor_need;

// Refuse what is not needed, not in the memory that is needed, or not aligned to its elements: -1 with an exception set, and the view
// still open. Runs no foreign code.
int tensor_view_check(core_state *state, const tensor_need *need, tensor_view *view);
// Open and check; closed if it fails.
int tensor_view_take(core_state *state, PyObject *tensor, const tensor_need *need,
                     tensor_view *out);

int64_t tensor_view_bytes(const tensor_view *view); // of a contiguous one
// "float32", "bfloat16", "uint8" ...
enum { TENSOR_DTYPE_TEXT = 40 };
void tensor_dtype_name(DLDataType dtype, char text[TENSOR_DTYPE_TEXT]);

// "float32" ...: one of `dtypes`; false with DTypeError set.
bool tensor_dtype_parse(core_state *state, const char *text, unsigned dtypes, ms_dtype *out);

// Let go of the memory. Legal on a zeroed hold, and twice. May run any Python code.
void tensor_hold_release(tensor_hold *hold);
void tensor_view_close(tensor_view *view);

// tensor.c: the memory of our own Tensor; `hold` is left alone.
void tensor_object_view(PyObject *tensor, tensor_view *out);

#endif
