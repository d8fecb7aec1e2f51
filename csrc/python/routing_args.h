// routing_args.h - the tensors of one forward pass, checked against each other, for every engine.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_ROUTING_ARGS_H
#define MS_ROUTING_ARGS_H

#include "tensor_view.h"

typedef struct routing_views {             // zeroed: nothing is open
  tensor_view hidden, index, weights, out; // [T, D], [T, K], [T, K], [T, D]
} routing_views;

// Open and check hidden_states, top_k_index, top_k_weights and out (None: not given), all of them `where` says.
// 0, or -1 with an exception set; views are to be closed in both cases.
int routing_take(core_state *state, PyObject *const tensors[4], const tensor_where *where,
                 routing_views *v);
void routing_close(routing_views *v);

#endif
