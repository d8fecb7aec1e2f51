// SPDX-License-Identifier: Apache-2.0
// races.cu - races on global memory inside a launch and between streams. Usage: races NAME. Without
// a suffix the program is correct and must run clean; NAME-bug plants the bug.
#include "check.h"
#include <cooperative_groups.h>
#include <cstring>
#include <string>

namespace cg = cooperative_groups;

// Each block writes one row; with the bug, two blocks share a row.
__global__ void rows(int* out, bool bug) {
  int row = bug ? blockIdx.x / 2 : blockIdx.x;
  out[row * blockDim.x + threadIdx.x] = blockIdx.x;
}

// Both blocks write the same value: an error only at PTXSIM_GLOBAL_RACE=2.
__global__ void sameValue(int* out) {
  out[threadIdx.x] = 7;
}

// One block reads what another writes.
__global__ void readOther(int* data, int* out, bool bug) {
  int n = blockDim.x, me = blockIdx.x * n + threadIdx.x;
  data[me] = me;
  __syncthreads();
  out[me] = data[bug ? (me + n) % (gridDim.x * n) : blockIdx.x * n + (threadIdx.x + 1) % n];
}

// Threads of one block exchange values through global memory.
__global__ void exchange(int* data, int* out, bool bug) {
  int t = threadIdx.x;
  data[t] = t;
  if (!bug)
    __syncthreads();
  out[t] = data[blockDim.x - 1 - t];
}

// The last block to finish adds up what all wrote: threadFenceReduction of the CUDA samples.
__global__ void ticket(int* partial, unsigned* count, int* sum, bool bug) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    if (!bug)
      __threadfence();
    last = atomicAdd(count, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int s = 0;
    for (int b = 0; b < gridDim.x; b++)
      s += partial[b];
    *sum = s;
  }
}

// The same with all threads writing, a barrier, and one acq_rel atomic.
__global__ void ticketAcqRel(int* partial, unsigned* count, int* sum, bool bug) {
  __shared__ bool last;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (!bug)
    __syncthreads();
  if (threadIdx.x == 0) {
    unsigned old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(old)
                 : "l"(count)
                 : "memory");
    last = old == gridDim.x - 1;
  }
  __syncthreads();
  if (last) {
    int s = 0;
    for (int b = 0; b < gridDim.x; b++)
      s += partial[b * blockDim.x + threadIdx.x];
    atomicAdd(sum, s);
  }
}

__global__ void gridSync(int* data, int* out, bool bug) {
  int n = gridDim.x * blockDim.x, me = blockIdx.x * blockDim.x + threadIdx.x;
  data[me] = me;
  if (!bug)
    cg::this_grid().sync();
  out[me] = data[(me + blockDim.x) % n];
}

__global__ void bytes(unsigned short* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

__global__ void add(int* data, int v) {
  data[threadIdx.x] += v;
}

// Producer and consumer in two streams. PTXSIM_LAUNCH=eager makes the order right by luck, even
// with the bug.
static void streams(int* d, bool bug) {
  cudaStream_t a, b;
  cudaEvent_t ready;
  CK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
  CK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
  CK(cudaEventCreate(&ready));
  CK(cudaMemsetAsync(d, 0, 128, a));
  add<<<1, 32, 0, a>>>(d, 1);
  CK(cudaEventRecord(ready, a));
  if (!bug)
    CK(cudaStreamWaitEvent(b, ready, 0));
  add<<<1, 32, 0, b>>>(d, 2);
  CK(cudaStreamSynchronize(b));
  CK(cudaStreamSynchronize(a));
  add<<<1, 32, 0, a>>>(d, 3); // ordered by the host
}

// A copy to the host in one stream while the next kernel of another overwrites its source.
static void copyOut(int* d, bool bug) {
  cudaStream_t a, b;
  cudaEvent_t copied;
  int* host;
  CK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
  CK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
  CK(cudaEventCreate(&copied));
  CK(cudaMallocHost(&host, 128));
  CK(cudaMemcpyAsync(host, d, 128, cudaMemcpyDeviceToHost, a));
  CK(cudaEventRecord(copied, a));
  if (!bug)
    CK(cudaStreamWaitEvent(b, copied, 0));
  add<<<1, 32, 0, b>>>(d, 1);
}

// Fork and join inside a captured graph.
static void graph(int* d, bool bug) {
  cudaStream_t a, b;
  cudaEvent_t forked, joined;
  cudaGraph_t g;
  cudaGraphExec_t exec;
  CK(cudaStreamCreate(&a));
  CK(cudaStreamCreate(&b));
  CK(cudaEventCreate(&forked));
  CK(cudaEventCreate(&joined));
  CK(cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal));
  CK(cudaEventRecord(forked, a));
  CK(cudaStreamWaitEvent(b, forked, 0));
  add<<<1, 32, 0, a>>>(d, 1);
  add<<<1, 32, 0, b>>>(bug ? d : d + 32, 1);
  CK(cudaEventRecord(joined, b));
  CK(cudaStreamWaitEvent(a, joined, 0));
  add<<<1, 64, 0, a>>>(d, 1);
  CK(cudaStreamEndCapture(a, &g));
  CK(cudaGraphInstantiate(&exec, g, 0));
  CK(cudaGraphLaunch(exec, a));
  CK(cudaGraphLaunch(exec, a));
}

int main(int argc, char** argv) {
  std::string name = argc > 1 ? argv[1] : "";
  bool bug = name.size() > 4 && name.substr(name.size() - 4) == "-bug";
  if (bug)
    name.resize(name.size() - 4);
  int *d, *out, *sum;
  unsigned* count;
  CK(cudaMalloc(&d, 8192));
  CK(cudaMalloc(&out, 8192));
  CK(cudaMalloc(&sum, 4));
  CK(cudaMalloc(&count, 4));
  CK(cudaMemset(d, 0, 8192));
  CK(cudaMemset(sum, 0, 4));
  CK(cudaMemset(count, 0, 4));
  CK(cudaDeviceSynchronize());
  int want = -1;
  if (name == "rows")
    rows<<<8, 64>>>(d, bug);
  else if (name == "same-value")
    sameValue<<<4, 64>>>(d);
  else if (name == "read-other")
    readOther<<<4, 64>>>(d, out, bug);
  else if (name == "exchange")
    exchange<<<1, 128>>>(d, out, bug);
  else if (name == "ticket")
    ticket<<<10, 32>>>(d, count, sum, bug), want = 55;
  else if (name == "ticket-acq-rel")
    ticketAcqRel<<<6, 96>>>(d, count, sum, bug), want = 6 * 96;
  else if (name == "grid-sync") {
    void* args[] = {&d, &out, &bug};
    CK(cudaLaunchCooperativeKernel((void*)gridSync, dim3(6), dim3(64), args, 0, nullptr));
  } else if (name == "bytes")
    bytes<<<3, 33>>>((unsigned short*)d);
  else if (name == "streams")
    streams(d, bug);
  else if (name == "copy-out")
    copyOut(d, bug);
  else if (name == "graph")
    graph(d, bug);
  else
    return 3;
  CK(cudaGetLastError());
  CK(cudaDeviceSynchronize());
  if (want >= 0) {
    int got;
    CK(cudaMemcpy(&got, sum, 4, cudaMemcpyDeviceToHost));
    EXPECT(got == want);
  }
  puts("ok");
}
