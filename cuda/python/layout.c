// layout.c - chapter "layout" of moeshard_cuda.h for Python: Layout, this rank's share of each expert's slots.
// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"
#include "../../csrc/python/arrays.h"
#include "../../csrc/python/error.h"

#include <stdlib.h>

static cuda_layout_object *as_layout(PyObject *self) { return (cuda_layout_object *)self; }

PyDoc_STRVAR(
    type_doc,
    "Layout(copies, copy, device)\n--\n\n"
    "Which slots (token, choice) this rank computes, on a CUDA device: for tables that "
    "moeshard._core.Layout calls sparse.\n\n"
    "Of an expert with c copies, slot number i of a chunk, in the order of tokens, is computed by "
    "copy (e + i) mod c.\n\n"
    "Args:\n"
    "    copies: [E] integers: the copies of each expert, 0: pruned, its slots add nothing.\n"
    "    copy: [E] integers: the one that this rank is in, -1: it holds no column. This rank's row "
    "of copy_of.\n"
    "    device: the number of the CUDA device.\n\n"
    "Raises:\n"
    "    ArgumentError: a copy that there cannot be.\n"
    "    ShapeError, DTypeError: not [E] integers, of one E.\n"
    "    CudaError: no such device, or a call of the CUDA runtime failed.\n");

static PyObject *layout_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"copies", "copy", "device", NULL};
  core_state *state = PyType_GetModuleState(type);
  PyObject *tables[2] = {NULL};
  long long number;
  int32_t device, E;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOL:Layout", names, &tables[0], &tables[1],
                                   &number))
    return NULL;
  if (!core_int32(state, "device", number, &device)) return NULL;
  Py_ssize_t count = PyObject_Length(tables[0]);
  if (count < 0 || !core_int32(state, "num_experts", count, &E)) return NULL;

  cuda_layout_object *self = NULL;
  int32_t *taken[2] = {NULL};
  for (int i = 0; i < 2; i++)
    if (!(taken[i] = array_take_int32(state, tables[i], names[i], E))) goto done;
  if (!(self = (cuda_layout_object *)PyType_GenericAlloc(type, 0))) goto done;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_cuda_layout_create(E, taken[0], taken[1], device, &self->layout, &err);
  PyEval_RestoreThread(gil);
  if (status != MS_OK) {
    core_raise(state, &err);
    Py_CLEAR(self);
  }
done:
  for (int i = 0; i < 2; i++) free(taken[i]);
  return (PyObject *)self;
}

static void layout_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyThreadState *gil = PyEval_SaveThread(); // freeing device memory waits for what runs there
  ms_cuda_layout_free(as_layout(self)->layout);
  PyEval_RestoreThread(gil);
  PyObject_Free(self);
  Py_DECREF(type);
}

PyDoc_STRVAR(own_doc, "own($self, counts, /)\n--\n\n"
                      "How many slots of each expert this rank computes in a chunk.\n\n"
                      "Args:\n"
                      "    counts: [E] integers: the slots of each expert, whoever computes "
                      "them.\n\n"
                      "Returns:\n"
                      "    [E] int64.\n");

static PyObject *layout_own(PyObject *self, PyObject *counts) {
  const ms_cuda_layout *layout = as_layout(self)->layout;
  int32_t *all = array_take_int32(core_state_of(self), counts, "counts", layout->E);
  if (!all) return NULL;
  PyObject *result = array_new(NPY_INT64, 1, layout->E, 0);
  int64_t *own = result ? array_data(result) : NULL;
  for (int32_t e = 0; own && e < layout->E; e++) own[e] = ms_cuda_layout_own(layout, e, all[e]);
  free(all);
  return result;
}

static PyMethodDef methods[] = {{"own", layout_own, METH_O, own_doc}, {0}};

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},
                              {Py_tp_new, layout_new},
                              {Py_tp_dealloc, layout_dealloc},
                              {Py_tp_methods, methods},
                              {0, NULL}};

static PyType_Spec type_spec = {.name = "moeshard._cuda.Layout",
                                .basicsize = sizeof(cuda_layout_object),
                                .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                .slots = slots};

int cuda_add_layout(PyObject *module, core_state *state) {
  state->layout_type = core_add_type(module, &type_spec);
  return state->layout_type ? 0 : -1;
}
