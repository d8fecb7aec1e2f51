// SPDX-License-Identifier: Apache-2.0
// nccl_more.cpp - ranks that learn RANK and WORLD_SIZE from the environment, as torchrun sets them.
// Usage: nccl_more IDFILE MODE. Modes: nonblocking (init with blocking = 0, one AllReduce) and
// abort (rank 0 aborts while the others wait in an AllReduce; they must get an error well before
// the timeout).
#include "../src/nccl_abi.h"
#include "check.h"
#include <chrono>
#include <cstring>
#include <string>
#include <unistd.h>

static double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

static ncclUniqueId meet(const std::string& file, int rank) {
  ncclUniqueId id;
  std::string tmp = file + ".tmp";
  if (rank == 0) {
    NK(ncclGetUniqueId(&id));
    FILE* f = fopen(tmp.c_str(), "w");
    fwrite(&id, sizeof id, 1, f);
    fclose(f);
    rename(tmp.c_str(), file.c_str());
    return id;
  }
  FILE* f;
  while (!(f = fopen(file.c_str(), "r")))
    usleep(1000);
  EXPECT(fread(&id, sizeof id, 1, f) == 1);
  fclose(f);
  return id;
}

int main(int argc, char** argv) {
  EXPECT(argc == 3 && getenv("RANK") && getenv("WORLD_SIZE"));
  int rank = atoi(getenv("RANK")), ranks = atoi(getenv("WORLD_SIZE"));
  std::string mode = argv[2];
  CK(cudaSetDevice(rank));
  ncclUniqueId id = meet(argv[1], rank);
  ncclComm_t comm;
  ncclConfig_t config;
  config.blocking = 0;
  if (rank == 1)
    usleep(200000); // so that rank 0 sees ncclInProgress
  ncclResult_t r = ncclCommInitRankConfig(&comm, ranks, id, rank, &config);
  EXPECT(r == ncclSuccess || r == ncclInProgress);
  if (rank == 0)
    EXPECT(r == ncclInProgress);
  double start = now();
  while (ncclCommGetAsyncError(comm, &r) == ncclSuccess && r == ncclInProgress &&
         now() - start < 20)
    usleep(1000);
  EXPECT(r == ncclSuccess);

  float *d, h = rank + 1;
  CK(cudaMalloc((void**)&d, 4));
  CK(cudaMemcpy(d, &h, 4, cudaMemcpyHostToDevice));
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  if (mode == "abort" && rank == 0) {
    usleep(300000);
    NK(ncclCommAbort(comm));
    usleep(500000); // stay alive: the error must come from the abort
    return 0;
  }
  NK(ncclAllReduce(d, d, 1, ncclFloat32, ncclSum, comm, stream));
  start = now();
  cudaError_t e = cudaStreamSynchronize(stream);
  if (mode == "abort") {
    ncclCommGetAsyncError(comm, &r);
    EXPECT(e != cudaSuccess && r == ncclRemoteError && now() - start < 5);
    puts("abort ok");
    return 0;
  }
  CK(e);
  CK(cudaMemcpy(&h, d, 4, cudaMemcpyDeviceToHost));
  EXPECT(h == ranks * (ranks + 1) / 2);
  NK(ncclCommDestroy(comm));
  puts("nonblocking ok");
}
