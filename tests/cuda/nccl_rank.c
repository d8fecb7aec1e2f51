// nccl_rank.c - one rank of a group over cuda/exchange/nccl.c, without Python: nccl_rank RANK RANKS FILE DEED TIMEOUT.
// Rank 0 leaves the unique id in FILE, as a launcher would. DEED is what happens after all have met:
//   work    collectives whose results are checked, on two streams, and in a graph
//   die     the last rank is gone before the second collective
//   stall   the last rank comes no more, but lives
//   absent  the last rank never meets the others
// Prints "STATUS: message" of the first call that fails, or "0: done". tests/cuda/test_nccl.py runs it.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "../../cuda/exchange/nccl.h"

#include <cuda_runtime_api.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COUNT = 1000 };
static ms_error err;

static void leave(ms_status status) {
  printf("%d: %s\n", (int)status, status == MS_OK ? "done" : err.msg);
  fflush(stdout);
  _exit(0);
}

static void must(ms_status status) {
  if (status != MS_OK) leave(status);
}

static void cuda(cudaError_t error) {
  if (error != cudaSuccess)
    leave(ms_fail(&err, MS_ECOMM, "the test's own call: %s", cudaGetErrorString(error)));
}

static void expect(float got, float wanted, const char *what) {
  if (got != wanted) leave(ms_fail(&err, MS_ERANGE, "%s: got %g, expected %g", what, got, wanted));
}

static void share_id(int rank, const char *file, char id[MS_NCCL_ID_BYTES]) {
  FILE *f = NULL;
  if (rank == 0) {
    char unready[512];
    snprintf(unready, sizeof unready, "%s.unready", file);
    must(ms_nccl_unique_id(NULL, id, &err));
    if (!(f = fopen(unready, "w")) || fwrite(id, MS_NCCL_ID_BYTES, 1, f) != 1 || fclose(f) ||
        rename(unready, file))
      _exit(3);
  } else {
    while (!(f = fopen(file, "r"))) usleep(1000);
    if (fread(id, MS_NCCL_ID_BYTES, 1, f) != 1) _exit(3);
    fclose(f);
  }
}

// Each rank's floats on all ranks, then their sum over the ranks back: rank r gets R * (its own floats).
static void work(ms_cuda_exchange *x, cudaStream_t stream, float *own, float *all, float *sum) {
  must(x->all_gather(x, own, all, COUNT * (int64_t)sizeof(float), stream, &err));
  must(x->reduce_scatter(x, all, sum, COUNT, stream, &err));
}

static void check_sum(ms_cuda_exchange *x, cudaStream_t stream, const float *sum) {
  float host[COUNT];
  cuda(cudaMemcpyAsync(host, sum, sizeof host, cudaMemcpyDeviceToHost, stream));
  cuda(cudaStreamSynchronize(stream));
  for (int i = 0; i < COUNT; i++)
    expect(host[i], (float)(x->R * (1000 * x->rank + i)), "the sum over the ranks");
}

int main(int argc, char **argv) {
  if (argc != 6) return 2;
  int rank = atoi(argv[1]), R = atoi(argv[2]);
  const char *deed = argv[4];
  bool last = rank == R - 1;
  char id[MS_NCCL_ID_BYTES];
  share_id(rank, argv[3], id);
  if (last && !strcmp(deed, "absent")) return 0;

  ms_cuda_exchange *x = NULL;
  must(ms_cuda_exchange_nccl(NULL, id, rank, R, rank, atof(argv[5]), NULL, NULL, &x, &err));
  cuda(cudaSetDevice(rank));
  cudaStream_t stream, side;
  cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cuda(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
  float host[COUNT], *own, *all, *sum;
  for (int i = 0; i < COUNT; i++) host[i] = (float)(1000 * rank + i);
  cuda(cudaMalloc((void **)&own, sizeof host));
  cuda(cudaMalloc((void **)&all, (size_t)R * sizeof host));
  cuda(cudaMalloc((void **)&sum, sizeof host));
  cuda(cudaMemcpy(own, host, sizeof host, cudaMemcpyHostToDevice));
  work(x, stream, own, all, sum);
  check_sum(x, stream, sum);

  if (last && !strcmp(deed, "die")) raise(SIGKILL);
  if (last && !strcmp(deed, "stall")) pause();
  if (strcmp(deed, "work") != 0) {
    work(x, stream, own, all, sum);
    cudaStreamSynchronize(stream);  // comes back, whatever it says: nothing may hang
    for (int i = 0; i < 100; i++) { // the watchdog looks ten times a second
      must(x->check(x, &err));
      usleep(100000);
    }
    leave(MS_OK);
  }

  float *side_all, *side_sum; // two streams at once share no memory
  cuda(cudaMalloc((void **)&side_all, (size_t)R * sizeof host));
  cuda(cudaMalloc((void **)&side_sum, sizeof host));
  for (int i = 0; i < 5; i++) { // far ahead of the device
    work(x, stream, own, all, sum);
    work(x, side, own, side_all, side_sum);
  }
  check_sum(x, stream, sum);
  check_sum(x, side, side_sum);
  must(x->check(x, &err));

  cudaGraph_t graph;
  cudaGraphExec_t ready;
  cuda(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
  work(x, side, own, all, sum);
  usleep(250000); // the watchdog looks in the middle of a capture
  cuda(cudaStreamEndCapture(side, &graph));
  cuda(cudaGraphInstantiate(&ready, graph, 0));
  cuda(cudaMemsetAsync(sum, 0, sizeof host, side));
  for (int i = 0; i < 2; i++) cuda(cudaGraphLaunch(ready, side));
  check_sum(x, side, sum);
  must(x->check(x, &err));
  x->free(x);
  leave(MS_OK);
}
