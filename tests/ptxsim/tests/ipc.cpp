// SPDX-License-Identifier: Apache-2.0
// ipc.cpp - a parent process allocates, a child opens the memory by its IPC handle, reads and
// writes it.
#include "check.h"
#include <cstring>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

constexpr int N = 3000;

static int child(int in) {
  cudaIpcMemHandle_t handle;
  EXPECT(read(in, &handle, sizeof handle) == sizeof handle);
  int* d;
  CK(cudaIpcOpenMemHandle((void**)&d, handle, cudaIpcMemLazyEnablePeerAccess));
  std::vector<int> h(N);
  CK(cudaMemcpy(h.data(), d, N * 4, cudaMemcpyDeviceToHost));
  for (int i = 0; i < N; i++)
    EXPECT(h[i] == i * 3);
  for (int& v : h)
    v += 1;
  CK(cudaMemcpy(d, h.data(), N * 4, cudaMemcpyHostToDevice));
  EXPECT(cudaMemset(d, 0, N * 4 + 4) == cudaErrorInvalidValue); // past the end
  CK(cudaIpcCloseMemHandle(d));
  EXPECT(cudaMemset(d, 0, 4) == cudaErrorInvalidValue); // closed
  return 0;
}

int main() {
  int pipes[2];
  EXPECT(pipe(pipes) == 0);
  pid_t pid = fork(); // before the first CUDA call
  if (!pid)
    return child(pipes[0]);
  char* base;
  CK(cudaMalloc((void**)&base, 100));
  int* d;
  CK(cudaMalloc((void**)&d, N * 4));
  std::vector<int> h(N);
  for (int i = 0; i < N; i++)
    h[i] = i * 3;
  CK(cudaMemcpy(d, h.data(), N * 4, cudaMemcpyHostToDevice));
  cudaIpcMemHandle_t handle;
  CK(cudaIpcGetMemHandle(&handle, d));
  EXPECT(write(pipes[1], &handle, sizeof handle) == sizeof handle);
  int status;
  waitpid(pid, &status, 0);
  EXPECT(status == 0);
  CK(cudaMemcpy(h.data(), d, N * 4, cudaMemcpyDeviceToHost));
  for (int i = 0; i < N; i++)
    EXPECT(h[i] == i * 3 + 1);
  puts("ipc ok");
}
