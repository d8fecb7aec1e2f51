// error.c - the exception classes, and which status raises which.
// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

typedef struct error_class {
  ms_status status;
  ms_status parent;   // the status whose class is the base; MS_OK: MoeshardError
  PyObject **builtin; // a second base, or NULL
  const char *name, *doc;
} error_class;

// Parents first. They live in `moeshard`, where users find them, and are pickled by that name.
static const error_class classes[] = {
    {MS_OK, MS_OK, &PyExc_Exception, "moeshard.MoeshardError", "Base of all errors of moeshard."},
    {MS_EINVAL, MS_OK, &PyExc_ValueError, "moeshard.ArgumentError",
     "An argument cannot be used. The message names it, what it was and what is accepted."},
    {MS_ESHAPE, MS_OK, &PyExc_ValueError, "moeshard.ShapeError",
     "A shape does not fit the others. The message names both."},
    {MS_EDTYPE, MS_OK, &PyExc_TypeError, "moeshard.DTypeError",
     "A dtype, or something that is no tensor, is not accepted. The message names what is."},
    {MS_ERANGE, MS_OK, &PyExc_ValueError, "moeshard.RangeError",
     "An expert index is out of range, or a routing weight not finite. The message says which."},
    {MS_ECOMM, MS_OK, &PyExc_RuntimeError, "moeshard.CommError",
     "The exchange between ranks could not be set up, is closed or is broken."},
    {MS_ELOST, MS_ECOMM, NULL, "moeshard.RankLost",
     "Another rank died or left. The group cannot be used again."},
    {MS_ETIMEOUT, MS_ECOMM, NULL, "moeshard.CommTimeout",
     "Another rank did not arrive in time. The group cannot be used again."},
    {MS_EMISMATCH, MS_ECOMM, NULL, "moeshard.RankMismatch",
     "Ranks disagree about a call: the same message on all of them. They stand before the next "
     "call."},
    {MS_EPEER, MS_ECOMM, NULL, "moeshard.PeerError",
     "Another rank failed in this call and says why. All ranks stand before the next call."},
    {MS_ECUDA, MS_OK, &PyExc_RuntimeError, "moeshard.CudaError",
     "A call of the CUDA runtime failed. The message names the call and what it returned."},
};

int core_add_errors(PyObject *module, core_state *state) {
  for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
    const error_class *c = &classes[i];
    PyObject *parent = c->status == MS_OK ? NULL : state->errors[c->parent];
    PyObject *bases = !parent      ? Py_BuildValue("(O)", *c->builtin)
                      : c->builtin ? Py_BuildValue("(OO)", parent, *c->builtin)
                                   : Py_BuildValue("(O)", parent);
    if (!bases) return -1;
    state->errors[c->status] = PyErr_NewExceptionWithDoc(c->name, c->doc, bases, NULL);
    Py_DECREF(bases);
    const char *name = c->name + sizeof "moeshard." - 1;
    if (!state->errors[c->status] || PyModule_AddObjectRef(module, name, state->errors[c->status]))
      return -1;
  }
  return 0;
}

int core_adopt_errors(PyObject *core, core_state *state) {
  for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
    const char *name = classes[i].name + sizeof "moeshard." - 1;
    state->errors[classes[i].status] = PyObject_GetAttrString(core, name);
    if (!state->errors[classes[i].status]) return -1;
  }
  return 0;
}

PyObject *core_raise(core_state *state, const ms_error *err) {
  if (PyErr_Occurred()) return NULL;
  if (err->code == MS_EINTR) { // the poll that asked for it leaves its exception: never without one
    PyErr_SetNone(PyExc_KeyboardInterrupt);
    return NULL;
  }
  // A message may come from another rank and may be cut inside a character.
  PyObject *text = PyUnicode_DecodeUTF8(err->msg, (Py_ssize_t)strlen(err->msg), "replace");
  if (!text) return NULL;
  PyObject *class = state->errors[err->code];
  PyErr_SetObject(class ? class : PyExc_MemoryError, text);
  Py_DECREF(text);
  return NULL;
}

PyObject *core_fail(core_state *state, ms_status status, const char *format, ...) {
  ms_error err = {.code = status};
  va_list args;
  va_start(args, format);
  vsnprintf(err.msg, sizeof err.msg, format, args);
  va_end(args);
  return core_raise(state, &err);
}

static bool blames_argument(core_state *state) {
  return PyErr_ExceptionMatches(PyExc_Exception) && !PyErr_ExceptionMatches(PyExc_MemoryError) &&
         !PyErr_ExceptionMatches(state->errors[MS_OK]);
}

PyObject *core_fail_from(core_state *state, ms_status status, const char *format, ...) {
  if (!blames_argument(state)) return NULL;
  PyObject *type = NULL, *cause = NULL, *traceback = NULL, *text = NULL;
  PyErr_Fetch(&type, &cause, &traceback);
  PyErr_NormalizeException(&type, &cause, &traceback);
  if (traceback) PyException_SetTraceback(cause, traceback);
  ms_error err = {.code = status};
  va_list args;
  va_start(args, format);
  int used = vsnprintf(err.msg, sizeof err.msg, format, args);
  va_end(args);
  text = PyObject_Str(cause);
  const char *said = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
  PyErr_Clear(); // an exception that cannot be shown is still the cause
  if (said && used >= 0 && used < (int)sizeof err.msg)
    snprintf(err.msg + used, sizeof err.msg - (size_t)used, ": %s", said);
  core_raise(state, &err);
  Py_XDECREF(text);
  Py_XDECREF(type);
  Py_XDECREF(traceback);

  PyObject *value = NULL;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  PyException_SetCause(value, cause); // takes the reference
  PyErr_Restore(type, value, traceback);
  return NULL;
}

PyObject *core_none(core_state *state, ms_status status, const ms_error *err) {
  if (status != MS_OK) return core_raise(state, err);
  if (PyErr_Occurred()) return NULL; // a signal handler raised while the last rank arrived
  Py_RETURN_NONE;
}

bool core_int32(core_state *state, const char *name, long long value, int32_t *out) {
  if (value < INT32_MIN || value > INT32_MAX) {
    core_fail(state, MS_EINVAL, "%s: got %lld, expected less than 2^31", name, value);
    return false;
  }
  *out = (int32_t)value;
  return true;
}
