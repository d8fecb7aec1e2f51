// experts_args.h - what PackedExperts of every engine have alike: their arguments, checked, and most properties.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_EXPERTS_ARGS_H
#define MS_EXPERTS_ARGS_H

#include "tensor_view.h"

// Every engine's object begins so.
typedef struct experts_head {
  PyObject_HEAD const ms_experts_spec *spec;
} experts_head;

// The arguments of a constructor, the same in every engine but for `device`.
//   device   NULL: there is no such argument
//   columns  out: what spec->columns points into, a new reference
// 0, or -1 with an exception set.
int experts_parse_new(core_state *state, PyObject *args, PyObject *kwargs, int32_t *device,
                      ms_experts_spec *spec, PyObject **columns);

enum { EXPERTS_W_IN, EXPERTS_W_OUT, EXPERTS_B_IN, EXPERTS_B_OUT, EXPERTS_PARTS };

typedef struct experts_call { // pack: sources; unpack: destinations
  int32_t expert;
  int64_t first, count;             // pack: hidden columns [first, first + count)
  ms_matrix w_in, w_out;            // pack
  ms_dtype bias;                    // pack
  PyObject *tensors[EXPERTS_PARTS]; // borrowed from the arguments; None: not given
  tensor_view views[EXPERTS_PARTS]; // data NULL: not given
} experts_call;

// Parse and check; `where` the tensors must be. 0 with views to close, or -1 with an exception set and none.
int experts_parse_pack(core_state *state, const ms_experts_spec *spec, const tensor_where *where,
                       PyObject *args, PyObject *kwargs, experts_call *out);
int experts_parse_unpack(core_state *state, const ms_experts_spec *spec, const tensor_where *where,
                         PyObject *args, PyObject *kwargs, experts_call *out);
void experts_call_close(experts_call *call);

PyObject *experts_get_columns(PyObject *self, void *closure);
PyObject *experts_get_num_experts(PyObject *self, void *closure);
PyObject *experts_get_d_model(PyObject *self, void *closure);
PyObject *experts_get_d_ff(PyObject *self, void *closure);
PyObject *experts_get_dtype(PyObject *self, void *closure);
PyObject *experts_get_activation(PyObject *self, void *closure);
PyObject *experts_get_gated(PyObject *self, void *closure);
PyObject *experts_get_has_b_in(PyObject *self, void *closure);
PyObject *experts_get_has_b_out(PyObject *self, void *closure);

// Their entries in a type's table.
// clang-format off
#define EXPERTS_PROPERTIES \
    {"columns", experts_get_columns, NULL, "[E, 2] int64, a copy: the hidden columns of each expert that are held here.", NULL}, \
    {"num_experts", experts_get_num_experts, NULL, "Number of experts E.", NULL}, \
    {"d_model", experts_get_d_model, NULL, "Model width D.", NULL}, \
    {"d_ff", experts_get_d_ff, NULL, "Hidden width F of a whole expert.", NULL}, \
    {"dtype", experts_get_dtype, NULL, "Storage of the packed weights: 'float32', 'bfloat16' or 'float16'.", NULL}, \
    {"activation", experts_get_activation, NULL, "'identity', 'relu', 'gelu', 'gelu_tanh', 'silu' or 'clamped_swiglu'.", NULL}, \
    {"gated", experts_get_gated, NULL, "Whether w_in holds gate rows, then up rows.", NULL}, \
    {"has_b_in", experts_get_has_b_in, NULL, "Whether there is an inner bias.", NULL}, \
    {"has_b_out", experts_get_has_b_out, NULL, "Whether there is an output bias.", NULL}
// clang-format on

#endif
