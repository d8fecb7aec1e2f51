// routing_args.c - the tensors of one forward pass, checked against each other, for every engine.
// SPDX-License-Identifier: Apache-2.0
#include "routing_args.h"
#include "error.h"

static bool overlap(const tensor_view *a, const tensor_view *b) {
  uintptr_t from_a = (uintptr_t)a->data, from_b = (uintptr_t)b->data;
  return from_a < from_b + (uintptr_t)tensor_view_bytes(b) &&
         from_b < from_a + (uintptr_t)tensor_view_bytes(a);
}

int routing_take(core_state *state, PyObject *const tensors[4], const tensor_where *where,
                 routing_views *v) {
  tensor_need hidden = {.name = "hidden_states",
                        .dtypes = TENSOR_FLOATS,
                        .ndim = 2,
                        .shape = {-1, -1},
                        .dims = "TD",
                        .where = *where};
  if (tensor_view_take(state, tensors[0], &hidden, &v->hidden)) return -1;
  int64_t T = v->hidden.shape[0], D = v->hidden.shape[1];
  tensor_need index = {.name = "top_k_index",
                       .dtypes = TENSOR_INTEGERS,
                       .ndim = 2,
                       .shape = {T, -1},
                       .dims = "TK",
                       .where = *where};
  if (tensor_view_take(state, tensors[1], &index, &v->index)) return -1;
  int64_t K = v->index.shape[1];
  tensor_need weights = {.name = "top_k_weights",
                         .dtypes = TENSOR_FLOATS,
                         .ndim = 2,
                         .shape = {T, K},
                         .dims = "TK",
                         .where = *where};
  if (tensor_view_take(state, tensors[2], &weights, &v->weights)) return -1;
  if (K > MS_MAX_CHOICES) {
    core_fail(state, MS_ESHAPE, "top_k_index: got K=%lld choices, expected 0 to %d", (long long)K,
              MS_MAX_CHOICES);
    return -1;
  }
  if (tensors[3] == Py_None) return 0;
  tensor_need out = {.name = "out",
                     .dtypes = 1u << v->hidden.type,
                     .ndim = 2,
                     .shape = {T, D},
                     .dims = "TD",
                     .write = true,
                     .where = *where};
  if (tensor_view_take(state, tensors[3], &out, &v->out)) return -1;
  if (!overlap(&v->hidden, &v->out)) return 0;
  core_fail(state, MS_EINVAL,
            "out: got memory that overlaps hidden_states, expected a tensor of its own");
  return -1;
}

void routing_close(routing_views *v) {
  tensor_view_close(&v->hidden);
  tensor_view_close(&v->index);
  tensor_view_close(&v->weights);
  tensor_view_close(&v->out);
}
