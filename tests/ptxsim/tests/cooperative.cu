// SPDX-License-Identifier: Apache-2.0
// cooperative.cu - blocks that wait for each other. Usage: cooperative NAME.
//   meet, graph, flag, limits   correct: must run clean
//   no-meeting, missing, plain  bugs: one block does not wait; one never comes; the launch is not
//                               cooperative
#include "check.h"
#include <string>

// All blocks add up to 2^31: the last to come turns the top bit. Nothing is reset between launches.
__device__ void meet(unsigned* word) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned add = blockIdx.x == 0 ? (1u << 31) - (gridDim.x - 1) : 1, before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(word), "r"(add)
                 : "memory");
    do
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    while (((before ^ now) >> 31) == 0);
  }
  __syncthreads();
}

enum Bug { NONE, NO_MEETING, MISSING };

// Three times, every block replaces its row by the next block's row plus one.
__global__ void rotate(int* from, int* to, unsigned* word, Bug bug) {
  bool wrong = blockIdx.x == 1;
  for (int turn = 0; turn < 3; turn++) {
    int next = (blockIdx.x + 1) % gridDim.x, t = threadIdx.x, n = blockDim.x;
    to[blockIdx.x * n + t] = from[next * n + t] + 1;
    if (bug == MISSING && wrong && turn == 1)
      return;
    if (bug != NO_MEETING || !wrong)
      meet(word);
    int* swap = from;
    from = to;
    to = swap;
  }
}

// Block 0 computes for long and stores nothing meanwhile, while the others poll, each in its way.
__global__ void flag(unsigned* word, int* out) {
  if (blockIdx.x == 0) {
    unsigned x = threadIdx.x;
    for (int i = 0; i < 100000; i++)
      x = x * 1664525u + (x >> 16);
    out[threadIdx.x] = x | 1;
    __syncthreads();
    __threadfence();
    if (threadIdx.x == 0)
      atomicExch(word, 1);
    return;
  }
  if (threadIdx.x == 0) {
    if (blockIdx.x == 1)
      while (atomicCAS(word, 0, 0) == 0)
        ;
    else
      while (*(volatile unsigned*)word == 0)
        if (blockIdx.x == 2)
          __nanosleep(100);
    __threadfence();
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = out[threadIdx.x];
}

__global__ void nothing() {}

static void limits() {
  cudaDeviceProp device;
  CK(cudaGetDeviceProperties(&device, 0));
  int sms = device.multiProcessorCount, large = 100 << 10;
  CK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, large));
  for (auto [threads, bytes] : {std::pair(1024, 0), std::pair(32, large)}) { // one block fits, by
    int fit;                                                                  // either
    CK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, nothing, threads, bytes));
    EXPECT(fit == (bytes ? 1 : device.maxThreadsPerMultiProcessor / threads));
    CK(cudaLaunchCooperativeKernel(nothing, dim3(fit * sms), dim3(threads), nullptr, bytes, nullptr));
    EXPECT(cudaLaunchCooperativeKernel(nothing, dim3(fit * sms + 1), dim3(threads), nullptr, bytes,
                                       nullptr) == cudaErrorCooperativeLaunchTooLarge);
    cudaGetLastError();
  }
  CK(cudaDeviceSynchronize());
}

int main(int argc, char** argv) {
  std::string name = argc > 1 ? argv[1] : "";
  const int blocks = 12, threads = 64;
  int *from, *to, host[blocks * threads];
  unsigned* word;
  CK(cudaMalloc(&from, sizeof host));
  CK(cudaMalloc(&to, sizeof host));
  CK(cudaMalloc(&word, 4));
  CK(cudaMemset(from, 0, sizeof host));
  CK(cudaMemset(word, 0, 4));
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  CK(cudaDeviceSynchronize());
  Bug bug = name == "no-meeting" ? NO_MEETING : name == "missing" ? MISSING : NONE;
  void *args[] = {&from, &to, &word, &bug}, *back[] = {&to, &from, &word, &bug};
  auto launch = [&](void** with) {
    CK(cudaLaunchCooperativeKernel(rotate, dim3(blocks), dim3(threads), with, 0, stream));
  };
  if (name == "limits") {
    limits();
  } else if (name == "flag") {
    flag<<<4, threads, 0, stream>>>(word, to); // PTXSIM_RESIDENT=4: all at once
    CK(cudaStreamSynchronize(stream));
    CK(cudaMemcpy(host, to, sizeof host, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 4 * threads; i++)
      EXPECT(host[i] & 1 && host[i] == host[i % threads]);
  } else if (name == "plain") {
    rotate<<<blocks, threads, 0, stream>>>(from, to, word, bug);
    CK(cudaStreamSynchronize(stream));
  } else if (name == "graph") {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch(args);
    launch(back);
    CK(cudaStreamEndCapture(stream, &graph));
    CK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 3; i++)
      CK(cudaGraphLaunch(exec, stream));
    CK(cudaStreamSynchronize(stream));
    CK(cudaMemcpy(host, from, sizeof host, cudaMemcpyDeviceToHost));
    for (int x : host)
      EXPECT(x == 3 * 6);
  } else {
    launch(args);
    launch(back);
    CK(cudaStreamSynchronize(stream));
    CK(cudaMemcpy(host, from, sizeof host, cudaMemcpyDeviceToHost));
    for (int x : host)
      EXPECT(x == 6);
  }
  puts("ok");
}
