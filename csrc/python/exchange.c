// exchange.c - Exchange: chapter X and steps 2 and 5 for Python.
//
// Every call gives the exchange a new turn. A batch remembers the turn in which it was gathered: once that is over,
// its rows may have been overwritten, moved or unmapped, and batch.c refuses to touch them.
//
// SPDX-License-Identifier: Apache-2.0
#include "error.h"

static exchange_object *as_exchange(PyObject *self) { return (exchange_object *)self; }

bool core_exchange_enter(core_state *state, exchange_object *self) {
  if (!atomic_exchange(&self->busy, true)) return true;
  core_fail(state, MS_EINVAL, "exchange is in use by another thread");
  return false;
}

void core_exchange_leave(exchange_object *self) { atomic_store(&self->busy, false); }

static bool enter_open(core_state *state, exchange_object *self) {
  if (!core_exchange_enter(state, self)) return false;
  if (self->exchange) return true;
  core_fail(state, MS_ECOMM, "the exchange is closed");
  core_exchange_leave(self);
  return false;
}

// Waits look here about every 50 ms, without the GIL: has a signal come (Ctrl-C) whose handler raises?
// The exception stays set in this thread, and core_raise finds it.
static int poll_signals(void *unused) {
  (void)unused;
  PyGILState_STATE gil = PyGILState_Ensure();
  int stop = PyErr_CheckSignals();
  PyGILState_Release(gil);
  return stop;
}

// ---- the calls ----------------------------------------------------------------------------------

// Take a batch that is routed, and this exchange. False with an exception set and nothing taken.
static bool enter_both(core_state *state, exchange_object *self, PyObject *batch,
                       const char *step) {
  if (!Py_IS_TYPE(batch, state->batch_type)) {
    PyErr_Format(PyExc_TypeError, "batch: expected moeshard._core.Batch, got %R", Py_TYPE(batch));
    return false;
  }
  batch_object *b = (batch_object *)batch;
  if (!core_batch_enter(state, b)) return false;
  if (!b->routed)
    core_fail(state, MS_EINVAL, "%s: the batch holds no tokens, call route first", step);
  else if (enter_open(state, self))
    return true;
  core_batch_leave(b);
  return false;
}

static void leave_both(exchange_object *self, batch_object *batch) {
  core_exchange_leave(self);
  core_batch_leave(batch);
}

PyDoc_STRVAR(
    gather_doc,
    "gather($self, batch, /)\n--\n\n"
    "Step 2: every rank's tokens and choices. Collective; opens a call, which combine (or refuse) "
    "closes.\n\n"
    "Args:\n"
    "    batch: a Batch that was routed; ranks may hold different numbers of tokens, also none.\n\n"
    "Raises:\n"
    "    RankMismatch: ranks disagree about layer, dtype, D, K or E; the same message on all of "
    "them.\n"
    "    PeerError: another rank refused, and says why.\n"
    "    RankLost, CommTimeout: another rank died, or did not arrive in time.\n"
    "    ArgumentError: nothing routed; the last call is still open; in use by another thread.\n"
    "    MemoryError: no room, for example in /dev/shm.\n"
    "    CommError: closed or broken.\n");

static PyObject *exchange_gather(PyObject *object, PyObject *batch) {
  exchange_object *self = as_exchange(object);
  core_state *state = core_state_of(object);
  if (!enter_both(state, self, batch, "gather")) return NULL;
  batch_object *b = (batch_object *)batch;
  batch_debts debts = {0};
  core_batch_forget_gather(b, &debts);
  b->grouped = false;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_gather(b->batch, self->exchange, &err);
  PyEval_RestoreThread(gil);
  self->turn++;
  if (status == MS_OK) {
    b->gathered = true;
    b->exchange = (exchange_object *)Py_NewRef(object);
    b->turn = self->turn;
  }
  leave_both(self, b);
  core_batch_pay(&debts);
  return core_none(state, status, &err);
}

PyDoc_STRVAR(combine_doc, "combine($self, batch, /)\n--\n\n"
                          "Step 5: out = the sum of the choices, then of the ranks, always in the "
                          "same order. Collective.\n\n"
                          "Closes the call: the batch lets go of hidden_states and out, also when "
                          "it fails. Without an out nothing is\n"
                          "summed.\n\n"
                          "Args:\n"
                          "    batch: the Batch that this exchange gathered last, after ffn.\n\n"
                          "Raises:\n"
                          "    RankMismatch: out was given on some ranks only.\n"
                          "    PeerError, RankLost, CommTimeout, CommError: as gather.\n"
                          "    ArgumentError: another batch than the gathered one, or ffn has not "
                          "run; in use by another thread.\n");

static PyObject *exchange_combine(PyObject *object, PyObject *batch) {
  exchange_object *self = as_exchange(object);
  core_state *state = core_state_of(object);
  core_pool *pool = core_pool_take(state);
  if (!pool) return NULL;
  PyObject *result = NULL;
  batch_debts debts = {0};
  if (!enter_both(state, self, batch, "combine")) goto done;
  batch_object *b = (batch_object *)batch;
  if (b->gathered && b->exchange == self && b->turn == self->turn) {
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    ms_status status = ms_combine(b->batch, self->exchange, pool->threads, &err);
    PyEval_RestoreThread(gil);
    self->turn++;
    core_batch_forget_route(b, &debts);
    result = core_none(state, status, &err);
  } else {
    core_fail(state, MS_EINVAL, "combine: not the batch that this exchange gathered last");
  }
  leave_both(self, b);
done:
  core_pool_give_back(state, pool);
  core_batch_pay(&debts);
  return result;
}

PyDoc_STRVAR(
    refuse_doc,
    "refuse($self, message, /)\n--\n\n"
    "In place of the gather (or combine) that the other ranks are in: tell them that this rank "
    "cannot take part.\n\n"
    "They raise PeerError with 'rank r: message'; afterwards all stand before the next call.\n\n"
    "Args:\n"
    "    message: why; cut after about 500 bytes.\n\n"
    "Raises:\n"
    "    RankLost, CommTimeout, CommError: as gather.\n");

static PyObject *exchange_refuse(PyObject *object, PyObject *message) {
  exchange_object *self = as_exchange(object);
  core_state *state = core_state_of(object);
  if (!PyUnicode_Check(message))
    return PyErr_Format(PyExc_TypeError, "message: expected str, got %R", Py_TYPE(message));
  // Peers are waiting: text that UTF-8 cannot carry must not keep the refusal from them.
  PyObject *bytes = PyUnicode_AsEncodedString(message, "utf-8", "replace");
  if (!bytes) return NULL;
  PyObject *result = NULL;
  if (enter_open(state, self)) {
    const char *text = PyBytes_AsString(bytes);
    ms_error err;
    PyThreadState *gil = PyEval_SaveThread();
    ms_status status = ms_exchange_refuse(self->exchange, text, &err);
    PyEval_RestoreThread(gil);
    self->turn++;
    core_exchange_leave(self);
    result = core_none(state, status, &err);
  }
  Py_DECREF(bytes);
  return result;
}

PyDoc_STRVAR(close_doc,
             "close($self, /)\n--\n\n"
             "Leave the other ranks: in their next call they raise RankLost. Legal twice.\n\n"
             "Raises:\n"
             "    ArgumentError: in use by another thread.\n");

static PyObject *exchange_close(PyObject *object, PyObject *unused) {
  (void)unused;
  exchange_object *self = as_exchange(object);
  if (!core_exchange_enter(core_state_of(object), self)) return NULL;
  ms_exchange *exchange = self->exchange;
  self->exchange = NULL;
  self->turn++;
  PyThreadState *gil = PyEval_SaveThread();
  ms_exchange_free(exchange);
  PyEval_RestoreThread(gil);
  core_exchange_leave(self);
  Py_RETURN_NONE;
}

static void exchange_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  ms_exchange_free(as_exchange(self)->exchange);
  PyObject_Free(self);
  Py_DECREF(type);
}

// ---- the type -----------------------------------------------------------------------------------

static PyObject *get_rank(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(as_exchange(self)->rank);
}

static PyObject *get_ranks(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromLong(as_exchange(self)->ranks);
}

static PyObject *get_name(PyObject *self, void *unused) {
  (void)unused;
  return PyUnicode_FromString(as_exchange(self)->name);
}

static PyMethodDef methods[] = {{"gather", exchange_gather, METH_O, gather_doc},
                                {"combine", exchange_combine, METH_O, combine_doc},
                                {"refuse", exchange_refuse, METH_O, refuse_doc},
                                {"close", exchange_close, METH_NOARGS, close_doc},
                                {0}};

static PyGetSetDef getset[] = {
    {"rank", get_rank, NULL, "This rank, 0 to R-1.", NULL},
    {"ranks", get_ranks, NULL, "Number of ranks R.", NULL},
    {"name", get_name, NULL, "What carries the rows: 'one' or 'shm'.", NULL},
    {0}};

PyDoc_STRVAR(
    type_doc,
    "How ranks reach each other. Made by exchange_one and exchange_shm.\n\n"
    "For one thread at a time: a call that finds it in use by another raises ArgumentError.\n");

static PyType_Slot slots[] = {{Py_tp_doc, (void *)type_doc},
                              {Py_tp_dealloc, exchange_dealloc},
                              {Py_tp_methods, methods},
                              {Py_tp_getset, getset},
                              {0, NULL}};

static PyType_Spec spec = {.name = "moeshard._core.Exchange",
                           .basicsize = sizeof(exchange_object),
                           .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
                                    Py_TPFLAGS_DISALLOW_INSTANTIATION,
                           .slots = slots};

// ---- making one ---------------------------------------------------------------------------------

// The exchange as an object, which owns it; freed if there is none. `status` and `err` are of its creation.
static PyObject *finish(core_state *state, ms_status status, const ms_error *err,
                        ms_exchange *exchange, const char *name) {
  if (status != MS_OK) return core_raise(state, err);
  exchange_object *self =
      PyErr_Occurred() ? NULL : (exchange_object *)PyType_GenericAlloc(state->exchange_type, 0);
  if (!self) {
    ms_exchange_free(exchange);
    return NULL;
  }
  self->exchange = exchange;
  self->name = name;
  self->rank = ms_exchange_rank(exchange);
  self->ranks = ms_exchange_ranks(exchange);
  return (PyObject *)self;
}

PyDoc_STRVAR(one_doc, "exchange_one($module, /)\n--\n\n"
                      "The exchange of one rank: nothing travels and nothing is copied.\n");

static PyObject *exchange_one(PyObject *module, PyObject *unused) {
  (void)unused;
  ms_exchange *exchange = NULL;
  ms_error err;
  ms_status status = ms_exchange_one(&exchange, &err);
  return finish(PyModule_GetState(module), status, &err, exchange, "one");
}

PyDoc_STRVAR(
    shm_doc,
    "exchange_shm($module, /, name, rank, ranks, timeout)\n--\n\n"
    "Ranks of one host, through shared memory. Collective: returns when all ranks are there.\n\n"
    "The files /dev/shm/moeshard-<name>-<rank> (mode 0600) are gone again when it returns, also "
    "when it fails.\n\n"
    "Args:\n"
    "    name: the group's random name, letters, digits and '-', the same on all ranks, used "
    "once.\n"
    "    rank: this rank, 0 to ranks-1.\n"
    "    ranks: number of ranks R, 1 to 1024.\n"
    "    timeout: seconds that a wait for another rank may take, here and in every later call.\n\n"
    "Raises:\n"
    "    ArgumentError: a name, rank, number of ranks or timeout that cannot be.\n"
    "    CommTimeout: names the ranks that did not come.\n"
    "    CommError: the name is in use, or /dev/shm cannot be used.\n"
    "    MemoryError: no room in /dev/shm.\n");

static PyObject *exchange_shm(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"name", "rank", "ranks", "timeout", NULL};
  core_state *state = PyModule_GetState(module);
  const char *name = NULL;
  long long rank, ranks;
  double timeout;
  int32_t me, R;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sLLd:exchange_shm", names, &name, &rank, &ranks,
                                   &timeout))
    return NULL;
  if (!core_int32(state, "rank", rank, &me) || !core_int32(state, "ranks", ranks, &R)) return NULL;
  ms_exchange *exchange = NULL;
  ms_error err;
  PyThreadState *gil = PyEval_SaveThread();
  ms_status status = ms_exchange_shm(name, me, R, timeout, poll_signals, NULL, &exchange, &err);
  PyEval_RestoreThread(gil);
  return finish(state, status, &err, exchange, "shm");
}

static PyMethodDef functions[] = {{"exchange_one", exchange_one, METH_NOARGS, one_doc},
                                  {"exchange_shm", (PyCFunction)(void (*)(void))exchange_shm,
                                   METH_VARARGS | METH_KEYWORDS, shm_doc},
                                  {0}};

int core_add_exchange(PyObject *module, core_state *state) {
  state->exchange_type = core_add_type(module, &spec);
  return state->exchange_type ? PyModule_AddFunctions(module, functions) : -1;
}
