// route.c - step 1, the half of a router that follows its softmax: route_top1.
// SPDX-License-Identifier: Apache-2.0
#include "error.h"
#include "tensor_view.h"

PyDoc_STRVAR(
    top1_doc,
    "route_top1($module, probabilities, sequence, capacity, mask, best, /)\n--\n\n"
    "What a Switch router makes of its probabilities: each token's best expert, if that has "
    "room.\n\n"
    "The first of equal experts is the best; a NaN is larger than all else, as in torch.\n\n"
    "Args:\n"
    "    probabilities: [T, E] float32, bfloat16 or float16, contiguous, in CPU memory.\n"
    "    sequence: tokens of a sequence, which divides T.\n"
    "    capacity: an expert has room for the first so many tokens of a sequence.\n"
    "    mask: [T, E] int64, written: 1 for the expert of a token that has room, 0 else.\n"
    "    best: [T] of the dtype of probabilities, written: the largest, room or not.\n\n"
    "Raises:\n"
    "    ShapeError, DTypeError: a shape or dtype that does not fit.\n"
    "    ArgumentError: a tensor that is not contiguous, not in CPU memory or read-only.\n\n"
    "Example:\n"
    "    >>> import numpy as np\n"
    "    >>> mask, best = np.empty((3, 2), int), np.empty(3, np.float32)\n"
    "    >>> route_top1(np.float32([[.9, .1], [.5, .5], [.2, .8]]), 3, 1, mask, best)\n"
    "    >>> mask.tolist()\n"
    "    [[1, 0], [0, 0], [0, 1]]\n");

static PyObject *route_top1(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *tensors[3] = {NULL, NULL, NULL}, *result = NULL;
  long long sequence, capacity;
  if (!PyArg_ParseTuple(args, "OLLOO:route_top1", &tensors[0], &sequence, &capacity, &tensors[1],
                        &tensors[2]))
    return NULL;
  tensor_view probability = {0}, mask = {0}, best = {0};
  tensor_need need = {
      .name = "probabilities", .dtypes = TENSOR_FLOATS, .ndim = 2, .shape = {-1, -1}, .dims = "TE"};
  if (tensor_view_take(state, tensors[0], &need, &probability)) goto done;
  int64_t T = probability.shape[0];
  int32_t E;
  if (!core_int32(state, "num_experts", probability.shape[1], &E)) goto done;
  need = (tensor_need){.name = "mask",
                       .dtypes = 1u << MS_I64,
                       .ndim = 2,
                       .shape = {T, E},
                       .dims = "TE",
                       .write = true};
  if (tensor_view_take(state, tensors[1], &need, &mask)) goto done;
  need = (tensor_need){.name = "best",
                       .dtypes = 1u << probability.type,
                       .ndim = 1,
                       .shape = {T},
                       .dims = "T",
                       .write = true};
  if (tensor_view_take(state, tensors[2], &need, &best)) goto done;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_route_top1(probability.data, probability.type, T, E, sequence, capacity,
                                   mask.data, best.data, &err);
  PyEval_RestoreThread(gil);
  result = core_none(state, status, &err);
done:
  tensor_view_close(&probability);
  tensor_view_close(&mask);
  tensor_view_close(&best);
  return result;
}

static PyMethodDef functions[] = {{"route_top1", route_top1, METH_VARARGS, top1_doc}, {0}};

int core_add_route(PyObject *module) { return PyModule_AddFunctions(module, functions); }
