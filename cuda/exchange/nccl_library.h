// nccl_library.h - NCCL as this project uses it: our own list of its functions, filled in from a library that is found
// at run time. NVIDIA's nccl.h is not needed to build; where it is installed, tests/cuda/test_nccl.py compares.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_NCCL_LIBRARY_H
#define MS_NCCL_LIBRARY_H

#include "../moeshard_cuda.h"
#include "nccl.h"

typedef struct ncclComm *nccl_comm;

typedef struct nccl_id { // travels by value in ncclCommInitRankConfig
  char bytes[MS_NCCL_ID_BYTES];
} nccl_id;

enum {
  NCCL_SUCCESS = 0,
  NCCL_REMOTE_ERROR = 6,
  NCCL_IN_PROGRESS = 7,
  NCCL_TIMEOUT = 8
}; // of ncclResult_t
enum { NCCL_UINT8 = 1, NCCL_FLOAT32 = 7 }; // of ncclDataType_t
enum { NCCL_SUM = 0 };                     // of ncclRedOp_t

// ncclConfig_t as of 2.18. Newer libraries read `size` and `version` and take their defaults for what came later.
typedef struct nccl_config {
  size_t size;
  unsigned int magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char *net_name;
  int split_share;
} nccl_config;
nccl_config nccl_config_non_blocking(void);

typedef struct nccl_library {
  int version; // 22809 is 2.28.9
  int (*get_version)(int *version);
  int (*get_unique_id)(nccl_id *id);
  const char *(*get_error_string)(int result);
  const char *(*get_last_error)(nccl_comm comm);
  int (*comm_init_rank_config)(nccl_comm *comm, int ranks, nccl_id id, int rank,
                               nccl_config *config);
  int (*comm_get_async_error)(nccl_comm comm, int *result);
  int (*comm_finalize)(nccl_comm comm);
  int (*comm_destroy)(nccl_comm comm);
  int (*comm_abort)(nccl_comm comm);
  int (*all_gather)(const void *send, void *receive, size_t count, int dtype, nccl_comm comm,
                    void *stream);
  int (*reduce_scatter)(const void *send, void *receive, size_t count, int dtype, int op,
                        nccl_comm comm, void *stream);
  int (*all_reduce)(const void *send, void *receive, size_t count, int dtype, int op,
                    nccl_comm comm, void *stream);
} nccl_library;

// Find NCCL, in this order: the file that MOESHARD_NCCL names (and no other); the copy that is in the process already
// (torch's: two would fight over the devices); the files of `search`, a list that ends with NULL (NULL: none); the
// system's. It is never unloaded: NCCL has threads of its own.
// Cost: a dlopen, milliseconds the first time. Errors: MS_ECOMM with all that was tried and why it did not do, with
// the function that is missing, or with the version if it is below 2.18.
ms_status nccl_library_load(const char *const *search, nccl_library *out, ms_error *err);

#endif
