// module.c - the _core extension: its state, and what is in it. A room a file:
//
//   error.c       exceptions              plan.c      chapter P: plan_shard ...
//   threads.c     threads, isa            experts.c   chapter W: PackedExperts
//   tensor.c      Tensor, tensor_info     batch.c     steps 1, 3, 4: Batch
//   tensor_view.c any tensor in           exchange.c  chapter X, steps 2, 5: Exchange
//   arrays.c      NumPy arrays in, out    layout.c      Layout
//   state.c       module state            dlpack_abi.h  DLPack's structs
//   experts_args.c, routing_args.c        arguments that all engines have alike
//   placement.c   chapter L: place ...    route.c     step 1: route_top1
//
// All but the right column, threads.c and this file is also linked into _cuda (cuda/python).
//
// SPDX-License-Identifier: Apache-2.0
#define MS_NUMPY_API_HERE
#include "core.h"

// setup.py takes it from pyproject.toml; a syntax check of this file alone has none.
#ifndef MS_VERSION
#define MS_VERSION "unknown"
#endif

static int module_exec(PyObject *module) {
  core_state *state = PyModule_GetState(module);
  if (PyArray_ImportNumPyAPI() < 0) return -1;
  if (core_state_init(state)) return -1;
  if (core_add_errors(module, state)) return -1;
  if (core_add_threads(module, state)) return -1;
  if (core_add_plan(module)) return -1;
  if (core_add_layout(module, state)) return -1;
  if (core_add_placement(module)) return -1;
  if (core_add_tensor(module, state)) return -1;
  if (core_add_experts(module, state)) return -1;
  if (core_add_route(module)) return -1;
  if (core_add_batch(module, state)) return -1;
  if (core_add_exchange(module, state)) return -1;
  return PyModule_AddStringConstant(module, "__version__", MS_VERSION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
  return core_state_traverse(PyModule_GetState(module), visit, arg);
}

static int module_clear(PyObject *module) { return core_state_clear(PyModule_GetState(module)); }

static void module_free(void *module) {
  core_state *state = PyModule_GetState(module);
  module_clear(module);
  core_pool_drop(state);
  pthread_mutex_destroy(&state->lock);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_GIL_DISABLED
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL}};

PyDoc_STRVAR(module_doc,
             "The C core of moeshard: one class or function per chapter of csrc/moeshard.h.\n\n"
             "One forward pass of a layer is five calls:\n\n"
             "    batch.route(hidden_states, top_k_index, top_k_weights, num_experts, out)\n"
             "    exchange.gather(batch)\n"
             "    batch.group()\n"
             "    batch.ffn(experts)\n"
             "    exchange.combine(batch)\n\n"
             "Tensors are any CPU tensors with DLPack (torch, NumPy ...) and are not copied. Dims: "
             "T tokens of this\n"
             "rank, N of all ranks, D model width, F hidden width of an expert, E experts, K "
             "choices a token, R ranks.\n");

static PyModuleDef module_def = {.m_base = PyModuleDef_HEAD_INIT,
                                 .m_name = "moeshard._core",
                                 .m_doc = module_doc,
                                 .m_size = sizeof(core_state),
                                 .m_slots = module_slots,
                                 .m_traverse = module_traverse,
                                 .m_clear = module_clear,
                                 .m_free = module_free};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_def); }
