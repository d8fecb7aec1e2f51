// SPDX-License-Identifier: Apache-2.0
// check.h - error handling of the test programs: exit code 1 is a wrong answer, 2 a reported error.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

#define CK(call)                                                                                   \
  do {                                                                                             \
    cudaError_t err_ = (call);                                                                     \
    if (err_) {                                                                                    \
      printf("CUDA error: %s: %s\n", #call, cudaGetErrorString(err_));                             \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
#define NK(call)                                                                                   \
  do {                                                                                             \
    ncclResult_t err_ = (call);                                                                    \
    if (err_) {                                                                                    \
      printf("NCCL error: %s: %s\n", #call, ncclGetErrorString(err_));                             \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
#define EXPECT(condition)                                                                          \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      printf("FAIL line %d: %s\n", __LINE__, #condition);                                          \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
