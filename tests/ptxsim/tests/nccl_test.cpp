// SPDX-License-Identifier: Apache-2.0
// nccl_test.cpp - several processes, one rank each, meeting through a file (as torchrun's store
// would). Usage: nccl_test RANK NRANKS IDFILE MODE ; MODE ok | count | order | early | split | die
#include "../src/nccl_abi.h"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <unistd.h>
#include <vector>
#define CK(x)                                                                                      \
  do {                                                                                             \
    cudaError_t e_ = (x);                                                                          \
    if (e_) {                                                                                      \
      printf("rank %d CUDA error %s: %s\n", rank, #x, cudaGetErrorString(e_));                     \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
#define NK(x)                                                                                      \
  do {                                                                                             \
    ncclResult_t e_ = (x);                                                                         \
    if (e_) {                                                                                      \
      printf("rank %d NCCL error %s: %s\n", rank, #x, ncclGetErrorString(e_));                     \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
#define EXPECT(c)                                                                                  \
  do {                                                                                             \
    if (!(c)) {                                                                                    \
      printf("rank %d FAIL line %d: %s\n", rank, __LINE__, #c);                                    \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
#include <string>
int main(int argc, char** argv) {
  int rank = atoi(argv[1]), n = atoi(argv[2]);
  std::string file = argv[3], mode = argc > 4 ? argv[4] : "ok";
  ncclUniqueId id;
  CK(cudaSetDevice(rank));
  if (rank == 0) {
    NK(ncclGetUniqueId(&id));
    FILE* f = fopen((file + ".tmp").c_str(), "w");
    fwrite(&id, sizeof id, 1, f);
    fclose(f);
    rename((file + ".tmp").c_str(), file.c_str());
  } else {
    FILE* f;
    while (!(f = fopen(file.c_str(), "r")))
      usleep(1000);
    if (fread(&id, sizeof id, 1, f) != 1)
      return 9;
    fclose(f);
  }
  ncclComm_t c;
  NK(ncclCommInitRank(&c, n, id, rank));
  cudaStream_t s, s2;
  CK(cudaStreamCreate(&s));
  CK(cudaStreamCreateWithFlags(&s2, cudaStreamNonBlocking));
  cudaEvent_t ev;
  CK(cudaEventCreate(&ev));
  const int N = 1000;
  std::vector<float> h(N * n), r(N * n);
  float *a, *b;
  CK(cudaMalloc(&a, N * n * 4));
  CK(cudaMalloc(&b, N * n * 4));
  for (int i = 0; i < N * n; i++)
    h[i] = rank * 10000 + i;
  CK(cudaMemcpy(a, h.data(), N * n * 4, cudaMemcpyHostToDevice));
  if (mode == "die" && rank == 1)
    _exit(0);
  for (int it = 0; it < 5; it++) {
    NK(ncclAllGather(a, b, mode == "count" && rank == 1 ? N / 2 : N, ncclFloat32, c, s));
    CK(cudaMemcpyAsync(r.data(), b, N * n * 4, cudaMemcpyDeviceToHost, s));
    CK(cudaStreamSynchronize(s));
    for (int k = 0; k < n; k++)
      for (int i = 0; i < N; i++)
        EXPECT(r[k * N + i] == k * 10000 + i);
  }
  if (mode == "order" && rank == 1) {
    NK(ncclReduceScatter(a, b, N, ncclFloat32, ncclSum, c, s));
    NK(ncclAllReduce(a, b, N, ncclFloat32, ncclSum, c, s));
  } else {
    NK(ncclAllReduce(a, b, N, ncclFloat32, ncclSum, c, s));
    if (mode == "order")
      NK(ncclReduceScatter(a, b, N, ncclFloat32, ncclSum, c, s));
  }
  CK(cudaMemcpyAsync(r.data(), b, N * 4, cudaMemcpyDeviceToHost, s));
  CK(cudaStreamSynchronize(s));
  if (mode == "ok")
    for (int i = 0; i < N; i++)
      EXPECT(r[i] == 10000.f * n * (n - 1) / 2 + (float)n * i);
  NK(ncclReduceScatter(a, b, N, ncclFloat32, ncclSum, c, s));
  CK(cudaEventRecord(ev, s));
  if (mode != "early")
    CK(cudaStreamWaitEvent(s2, ev, 0));
  CK(cudaMemcpyAsync(r.data(), b, N * 4, cudaMemcpyDeviceToHost, s2));
  CK(cudaStreamSynchronize(s2));
  for (int i = 0; i < N; i++)
    EXPECT(r[i] == 10000.f * n * (n - 1) / 2 + (float)n * (rank * N + i));
  CK(cudaStreamSynchronize(s));
  NK(ncclGroupStart());
  for (int p = 0; p < n; p++) {
    NK(ncclSend(a + p * 100, 100, ncclFloat32, p, c, s));
    NK(ncclRecv(b + p * 100, 100, ncclFloat32, p, c, s));
  }
  NK(ncclGroupEnd());
  CK(cudaMemcpyAsync(r.data(), b, n * 400, cudaMemcpyDeviceToHost, s));
  CK(cudaStreamSynchronize(s));
  for (int p = 0; p < n; p++)
    for (int i = 0; i < 100; i++)
      EXPECT(r[p * 100 + i] == p * 10000 + rank * 100 + i);
  NK(ncclAlltoAll(a, b, 100, ncclFloat32, c, s));
  NK(ncclBroadcast(a, a, 10, ncclFloat32, n - 1, c, s));
  CK(cudaMemcpyAsync(r.data(), b, n * 400, cudaMemcpyDeviceToHost, s));
  CK(cudaStreamSynchronize(s));
  for (int p = 0; p < n; p++)
    for (int i = 0; i < 100; i++)
      EXPECT(r[p * 100 + i] == p * 10000 + rank * 100 + i);
  CK(cudaMemcpy(r.data(), a, 40, cudaMemcpyDeviceToHost));
  for (int i = 0; i < 10; i++)
    EXPECT(r[i] == (n - 1) * 10000 + i);
  ncclComm_t c2;
  NK(ncclCommSplit(c, rank % 2, rank, &c2, nullptr));
  int n2, r2;
  NK(ncclCommCount(c2, &n2));
  NK(ncclCommUserRank(c2, &r2));
  EXPECT(r2 == rank / 2);
  cudaGraph_t g;
  cudaGraphExec_t ge;
  CK(cudaStreamBeginCapture(s2, cudaStreamCaptureModeThreadLocal));
  NK(ncclAllReduce(b, b, 1, ncclFloat32, ncclMax, c, s2));
  CK(cudaStreamEndCapture(s2, &g));
  CK(cudaGraphInstantiate(&ge, g, 0));
  CK(cudaGraphLaunch(ge, s2));
  CK(cudaGraphLaunch(ge, s2));
  CK(cudaStreamSynchronize(s2));
  CK(cudaMemcpy(r.data(), b, 4, cudaMemcpyDeviceToHost));
  EXPECT(r[0] == (n - 1) * 100);
  NK(ncclCommDestroy(c2));
  NK(ncclCommDestroy(c));
  if (rank == 0)
    printf("nccl ok, %d ranks\n", n);
  return 0;
}
