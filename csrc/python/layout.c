// layout.c - Layout: a column table made ready for the steps of one rank (chapter P).
// SPDX-License-Identifier: Apache-2.0
#include "../layout.h"
#include "arrays.h"
#include "error.h"

#include <stdlib.h>

static layout_object *as_layout(PyObject *self) { return (layout_object *)self; }

PyDoc_STRVAR(
    type_doc,
    "Layout(columns, d_ff, copies, rank)\n--\n\n"
    "A column table made ready for the steps of one rank: who computes which slot (token, "
    "choice).\n\n"
    "The ranks that hold an expert with c copies fall into c sets, each of which holds every "
    "column "
    "once. A slot is\n"
    "computed by all ranks of one set; each set gets its share of the slots, within one. "
    "docs/layouts.md has the rule.\n\n"
    "Args:\n"
    "    columns: [R, E, 2] integers: rank r holds columns [start, stop) of expert e.\n"
    "    d_ff: hidden width F of each expert.\n"
    "    copies: [E] integers, how many ranks hold each column of an expert (0: pruned, its slots "
    "add nothing).\n"
    "    rank: this rank.\n\n"
    "Raises:\n"
    "    ArgumentError: a table that plan_check refuses, or a rank outside 0..R-1.\n"
    "    ShapeError, DTypeError: as plan_check.\n\n"
    "Example:\n"
    "    >>> Layout([[[0, 8], [0, 4]], [[0, 8], [4, 8]]], 8, [2, 1], 0).copy_of.tolist()\n"
    "    [[0, 0], [1, 0]]\n");

static PyObject *layout_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"columns", "d_ff", "copies", "rank", NULL};
  core_state *state = PyType_GetModuleState(type);
  PyObject *table = NULL, *copies = NULL;
  long long F, rank;
  int32_t me;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLOL:Layout", names, &table, &F, &copies, &rank))
    return NULL;
  if (F < 1) return core_fail(state, MS_EINVAL, "d_ff: got %lld, expected at least 1", F);
  if (!core_int32(state, "rank", rank, &me)) return NULL;
  PyArrayObject *columns = NULL;
  layout_object *self = NULL;
  ms_layout *layout = NULL;
  ms_plan plan;
  ms_error err;
  if (core_take_plan(state, table, copies, &columns, &plan)) return NULL;
  plan.F = F;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_layout_create(&plan, me, &layout, &err);
  PyEval_RestoreThread(gil);
  if (status != MS_OK) {
    core_raise(state, &err);
  } else if ((self = (layout_object *)PyType_GenericAlloc(type, 0))) {
    self->layout = layout;
    self->ranks = plan.R;
    self->experts = plan.E;
    self->rank = me;
  } else {
    ms_layout_free(layout);
  }
  free(plan.copies);
  Py_DECREF(columns);
  return (PyObject *)self;
}

static void layout_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  ms_layout_free(as_layout(self)->layout);
  PyObject_Free(self);
  Py_DECREF(type);
}

static PyObject *get_copy_of(PyObject *self, void *unused) {
  (void)unused;
  const ms_layout *l = as_layout(self)->layout;
  return array_copy(NPY_INT32, 2, l->R, l->E, l->copy);
}

static PyObject *get_sparse(PyObject *self, void *unused) {
  (void)unused;
  return PyBool_FromLong(ms_layout_is_sparse(as_layout(self)->layout));
}

static PyObject *get_rank(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(as_layout(self)->rank);
}

static PyGetSetDef getset[] = {
    {"copy_of", get_copy_of, NULL,
     "[R, E] int32: which copy of an expert a rank is in; -1: it holds no column of it.", NULL},
    {"sparse", get_sparse, NULL,
     "Whether some rank holds no column of some expert, or some expert has not exactly one copy: "
     "then rows travel only to the ranks that compute them.",
     NULL},
    {"rank", get_rank, NULL, "This rank.", NULL},
    {0}};

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},
                              {Py_tp_new, layout_new},
                              {Py_tp_dealloc, layout_dealloc},
                              {Py_tp_getset, getset},
                              {0, NULL}};

static PyType_Spec spec = {.name = "moeshard._core.Layout",
                           .basicsize = sizeof(layout_object),
                           .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                           .slots = slots};

int core_add_layout(PyObject *module, core_state *state) {
  state->layout_type = core_add_type(module, &spec);
  return state->layout_type ? 0 : -1;
}
