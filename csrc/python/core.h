// core.h - what the rooms of the extensions share: headers and module state; of _core: its objects, the thread pool.
//
// All state lies in the module or in its objects; nothing is global. Types are heap types, immutable and final, so
// that the type of an object always leads to the module that made it.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PYTHON_CORE_H
#define MS_PYTHON_CORE_H

// One binary for every Python from 3.11 on, except free-threaded ones, which have no stable ABI before 3.15 (PEP 803).
#include <pyconfig.h> // Py_GIL_DISABLED
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL ms_numpy_api
#ifndef MS_NUMPY_API_HERE // module.c
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <pthread.h>
#include <stdatomic.h>

#include "../moeshard.h"
#include "dlpack_abi.h"

// ---- module state -------------------------------------------------------------------------------

typedef struct
    core_pool { // worker threads in use by `users` calls, and by the state while they are the current ones
  ms_threads *threads;
  int32_t users;
} core_pool;

enum { CORE_TABLES = 8, CORE_ERRORS = MS_EINTR };

typedef struct core_state {
  PyObject *errors[CORE_ERRORS]; // by ms_status; MS_OK: MoeshardError; NULL: a builtin
  PyTypeObject *tensor_type, *experts_type, *layout_type, *batch_type,
      *exchange_type;                // NULL: the extension has none
  PyObject *dlpack, *exchange_table; // the names of the two protocols

  pthread_mutex_t
      lock;        // of what follows; held for a few instructions, never round a call of Python
  core_pool *pool; // NULL until it is needed
  int32_t threads; // its size
  struct {         // the C exchange tables of the tensor types met last
    PyTypeObject *type;
    const DLPackExchangeAPI *api;
  } tables[CORE_TABLES];
  uint32_t tables_met;
} core_state;

static inline core_state *core_state_of(PyObject *object) {
  return PyType_GetModuleState(Py_TYPE(object));
}

// What both extensions have (state.c). 0, or -1 with an exception set.
int core_state_init(core_state *state);
int core_state_traverse(core_state *state, visitproc visit, void *arg);
int core_state_clear(core_state *state);

// Each room adds its types and functions. 0, or -1 with an exception set.
int core_add_errors(PyObject *module, core_state *state);
int core_add_threads(PyObject *module, core_state *state);
int core_add_plan(PyObject *module);
int core_add_layout(PyObject *module, core_state *state);
int core_add_placement(PyObject *module);
int core_add_route(PyObject *module);
int core_add_tensor(PyObject *module, core_state *state);
int core_add_experts(PyObject *module, core_state *state);
int core_add_batch(PyObject *module, core_state *state);
int core_add_exchange(PyObject *module, core_state *state);
// Make a type of the module from its spec and add it. A new reference, or NULL with an exception set.
PyTypeObject *core_add_type(PyObject *module, PyType_Spec *spec);

// The current worker threads, not to be freed before they are given back; NULL with an exception set.
core_pool *core_pool_take(core_state *state);
void core_pool_give_back(core_state *state, core_pool *pool); // NULL is legal
void core_pool_drop(core_state *state); // the state lets go of the current ones

// ---- objects ------------------------------------------------------------------------------------

// What keeps borrowed memory of a tensor alive. Zeroed: nothing.
typedef struct tensor_hold {
  PyObject *owner;
  DLManagedTensorVersioned *managed;
  DLManagedTensor *legacy;
} tensor_hold;

typedef struct experts_object {
  PyObject_HEAD const ms_experts_spec
      *spec; // of `experts`; first, as in every engine (experts_args.h)
  ms_experts *experts;
} experts_object;

typedef struct layout_object {
  PyObject_HEAD ms_layout *layout;
  int32_t ranks, experts, rank;
} layout_object;

typedef struct exchange_object {
  PyObject_HEAD ms_exchange *exchange; // NULL once closed
  atomic_bool busy;                    // a call is running
  uint64_t turn; // changes with every call: what an earlier gather pointed to is valid no more
  const char *name;
  int32_t rank, ranks;
} exchange_object;

enum { BATCH_GATHERED = 3 };

typedef struct batch_object {
  PyObject_HEAD ms_batch *batch;
  atomic_bool busy;
  bool routed;   // hidden, out and layout are held
  bool counted;  // gather_routing has brought the routing, gather_rows is to bring the rows
  bool gathered; // by `exchange` in its `turn`, or by gather_from when that is NULL
  bool grouped;  // the last gather was
  tensor_hold hidden, out;            // from route to combine
  tensor_hold arrays[BATCH_GATHERED]; // from gather_from to combine
  PyObject *layout;                   // from route to combine, or NULL
  exchange_object *exchange;
  uint64_t turn;
  PyObject *lease; // capsule, base of the arrays that combine_choices gave out (batch.c)
} batch_object;

// Take an object for one call; false with ArgumentError set when another thread has it.
bool core_batch_enter(core_state *state, batch_object *self);
void core_batch_leave(batch_object *self);
bool core_exchange_enter(core_state *state, exchange_object *self);
void core_exchange_leave(exchange_object *self);

// What a batch has borrowed, to be dropped after it was left: dropping may run any Python code.
typedef struct batch_debts {
  tensor_hold holds[2 + BATCH_GATHERED];
  PyObject *objects[3];
} batch_debts;
void core_batch_forget_gather(batch_object *self, batch_debts *debts);
void core_batch_forget_route(batch_object *self, batch_debts *debts); // and gather
void core_batch_pay(batch_debts *debts);

#endif
