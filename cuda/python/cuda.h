// cuda.h - what the rooms of the _cuda extension share. State, errors and tensors are those of _core (csrc/python),
// linked in; here are this extension's own objects.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PYTHON_CUDA_H
#define MS_PYTHON_CUDA_H

#include "../../csrc/python/core.h"
#include "../moeshard_cuda.h"

typedef struct cuda_experts_object {
  PyObject_HEAD const ms_experts_spec
      *spec; // of `experts`; first, as in every engine (experts_args.h)
  ms_cuda_experts *experts;
} cuda_experts_object;

typedef struct cuda_layout_object {
  PyObject_HEAD ms_cuda_layout *layout;
} cuda_layout_object;

typedef struct cuda_exchange_object {
  PyObject_HEAD ms_cuda_exchange *exchange; // NULL once closed
} cuda_exchange_object;

// Each room adds its types and functions. 0, or -1 with an exception set.
int cuda_add_experts(PyObject *module, core_state *state);
int cuda_add_layout(PyObject *module, core_state *state);
int cuda_add_exchange(PyObject *module, core_state *state);
int cuda_add_engine(PyObject *module, core_state *state);

#endif
