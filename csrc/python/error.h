// error.h - from ms_status to a Python exception: the only place that raises one for a status.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PYTHON_ERROR_H
#define MS_PYTHON_ERROR_H

#include "core.h"

// The classes of the module _core, for another extension: they are made once. 0, or -1 with an exception set.
int core_adopt_errors(PyObject *core, core_state *state);

// All raise and return NULL. An exception that is already set stays: a signal arrived during the call.
PyObject *core_raise(core_state *state, const ms_error *err);
PyObject *core_fail(core_state *state, ms_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
// The same with the exception that is set now as the cause, its text after ours. Exceptions that are no fault of an
// argument (interrupts, no memory) and our own stay as they are.
PyObject *core_fail_from(core_state *state, ms_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// None, or raise.
PyObject *core_none(core_state *state, ms_status status, const ms_error *err);

// A size that must fit int32_t; false with ArgumentError set.
bool core_int32(core_state *state, const char *name, long long value, int32_t *out);

#endif
