// nccl_library.c - find NCCL at run time: one list of functions, one order of places, one error that names them all.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "nccl_library.h"

#include <dlfcn.h>
#include <limits.h> // INT_MIN
#include <stdio.h>
#include <stdlib.h> // getenv
#include <string.h>

enum {
  OLDEST = 21800
}; // 2.18, of torch 2.1: the first that finishes and aborts non-blocking communicators well

static const char soname[] = "libnccl.so.2";

static const struct {
  const char *name;
  size_t at;
} symbols[] = {
    {"ncclGetVersion", offsetof(nccl_library, get_version)},
    {"ncclGetUniqueId", offsetof(nccl_library, get_unique_id)},
    {"ncclGetErrorString", offsetof(nccl_library, get_error_string)},
    {"ncclGetLastError", offsetof(nccl_library, get_last_error)},
    {"ncclCommInitRankConfig", offsetof(nccl_library, comm_init_rank_config)},
    {"ncclCommGetAsyncError", offsetof(nccl_library, comm_get_async_error)},
    {"ncclCommFinalize", offsetof(nccl_library, comm_finalize)},
    {"ncclCommDestroy", offsetof(nccl_library, comm_destroy)},
    {"ncclCommAbort", offsetof(nccl_library, comm_abort)},
    {"ncclAllGather", offsetof(nccl_library, all_gather)},
    {"ncclReduceScatter", offsetof(nccl_library, reduce_scatter)},
    {"ncclAllReduce", offsetof(nccl_library, all_reduce)},
};

nccl_config nccl_config_non_blocking(void) {
  return (nccl_config){
      .size = sizeof(nccl_config),
      .magic = 0xcafebeef,
      .version = OLDEST,
      .blocking = 0,
      .cga_cluster_size = INT_MIN, // INT_MIN and NULL: not said
      .min_ctas = INT_MIN,
      .max_ctas = INT_MIN,
      .net_name = NULL,
      .split_share = INT_MIN,
  };
}

typedef struct attempts { // what was tried, for the error
  char text[384];
  size_t used;
} attempts;

static void *try_open(const char *file, attempts *tried) {
  void *handle = dlopen(file, RTLD_NOW);
  if (handle) return handle;
  const char *why = dlerror(); // begins with the file's name
  int more = snprintf(tried->text + tried->used, sizeof tried->text - tried->used, "%s%s",
                      tried->used ? "; " : "", why ? why : file);
  tried->used += (size_t)more;
  if (tried->used >= sizeof tried->text) tried->used = sizeof tried->text - 1; // cut
  return NULL;
}

static ms_status find(const char *const *search, void **handle, ms_error *err) {
  attempts tried = {{0}, 0};
  const char *named = getenv("MOESHARD_NCCL");
  if (named && *named) { // who names a file means that file
    if ((*handle = try_open(named, &tried))) return MS_OK;
    return ms_fail(err, MS_ECOMM, "MOESHARD_NCCL=%s cannot be loaded: %s", named, tried.text);
  }
  if ((*handle = dlopen(soname, RTLD_NOW | RTLD_NOLOAD))) return MS_OK;
  for (; search && *search; search++)
    if ((*handle = try_open(*search, &tried))) return MS_OK;
  if ((*handle = try_open(soname, &tried))) return MS_OK;
  return ms_fail(err, MS_ECOMM,
                 "NCCL not found: install torch with CUDA or nvidia-nccl-cu13, or set "
                 "MOESHARD_NCCL=.../%s. Tried: %s",
                 soname, tried.text);
}

ms_status nccl_library_load(const char *const *search, nccl_library *out, ms_error *err) {
  memset(out, 0, sizeof *out);
  void *handle = NULL;
  MS_TRY(find(search, &handle, err));
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
    void *symbol = dlsym(handle, symbols[i].name);
    if (!symbol)
      return ms_fail(err, MS_ECOMM, "the NCCL that was loaded has no %s: %s", symbols[i].name,
                     dlerror());
    memcpy((char *)out + symbols[i].at, &symbol,
           sizeof symbol); // ISO C has no cast from object to function pointer
  }
  int result = out->get_version(&out->version);
  if (result != NCCL_SUCCESS)
    return ms_fail(err, MS_ECOMM, "ncclGetVersion: %s", out->get_error_string(result));
  if (out->version < OLDEST) {
    int v = out->version,
        minor = v / 100 % 100; // numbers below 2.9 were made otherwise: 2804 is 2.8.4
    return ms_fail(err, MS_ECOMM,
                   "NCCL %d.%d is too old: 2.18 or newer is needed (ncclGetVersion said %d)",
                   v < 10000 ? v / 1000 : v / 10000, v < 10000 ? v / 100 % 10 : minor, v);
  }
  return MS_OK;
}
