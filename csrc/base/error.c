// error.c - filling the caller's ms_error; names of dtypes.
// SPDX-License-Identifier: Apache-2.0
#include "../moeshard.h"

#include <stdarg.h>
#include <stdio.h>

ms_status ms_fail(ms_error *err, ms_status code, const char *format, ...) {
  if (err) {
    va_list args;
    va_start(args, format);
    vsnprintf(err->msg, sizeof err->msg, format, args);
    va_end(args);
    err->code = code;
  }
  return code;
}

int64_t ms_dtype_size(ms_dtype dtype) {
  switch (dtype) {
  case MS_F32:
  case MS_I32:
    return 4;
  case MS_BF16:
  case MS_F16:
    return 2;
  case MS_I64:
    return 8;
  case MS_I8:
    return 1;
  }
  return 0;
}

const char *ms_dtype_name(ms_dtype dtype) {
  switch (dtype) {
  case MS_F32:
    return "float32";
  case MS_BF16:
    return "bfloat16";
  case MS_F16:
    return "float16";
  case MS_I32:
    return "int32";
  case MS_I64:
    return "int64";
  case MS_I8:
    return "int8";
  }
  return "unknown";
}
