// state.c - the module state that the extensions _core and _cuda have alike: made, visited, dropped.
// SPDX-License-Identifier: Apache-2.0
#include "core.h"

int core_state_init(core_state *state) {
  pthread_mutex_init(&state->lock, NULL);
  if (!(state->dlpack = PyUnicode_InternFromString("__dlpack__"))) return -1;
  if (!(state->exchange_table = PyUnicode_InternFromString("__dlpack_c_exchange_api__"))) return -1;
  return 0;
}

int core_state_traverse(core_state *state, visitproc visit, void *arg) {
  for (int i = 0; i < CORE_ERRORS; i++) Py_VISIT(state->errors[i]);
  for (int i = 0; i < CORE_TABLES; i++) Py_VISIT(state->tables[i].type);
  Py_VISIT(state->tensor_type);
  Py_VISIT(state->experts_type);
  Py_VISIT(state->layout_type);
  Py_VISIT(state->batch_type);
  Py_VISIT(state->exchange_type);
  return 0;
}

int core_state_clear(core_state *state) {
  for (int i = 0; i < CORE_ERRORS; i++) Py_CLEAR(state->errors[i]);
  for (int i = 0; i < CORE_TABLES; i++) Py_CLEAR(state->tables[i].type);
  Py_CLEAR(state->tensor_type);
  Py_CLEAR(state->experts_type);
  Py_CLEAR(state->layout_type);
  Py_CLEAR(state->batch_type);
  Py_CLEAR(state->exchange_type);
  Py_CLEAR(state->dlpack);
  Py_CLEAR(state->exchange_table);
  return 0;
}

PyTypeObject *core_add_type(PyObject *module, PyType_Spec *spec) {
  PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
  if (type && PyModule_AddType(module, type)) Py_CLEAR(type);
  return type;
}
