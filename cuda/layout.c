// layout.c - which slots of each expert this rank computes, on the device.
// SPDX-License-Identifier: Apache-2.0
#include "moeshard_cuda.h"
#include "status.h"

#include <stdlib.h>

static ms_status fill(ms_cuda_layout *l, const int32_t *copies, const int32_t *copy, ms_error *err) {
  for (int32_t e = 0; e < l->E; e++) {
    int32_t c = copies[e];
    if (c < 0 || c > MS_MAX_RANKS || copy[e] < -1 || copy[e] >= c)
      return ms_fail(err, MS_EINVAL, "layout: copy %d of the %d of expert %d, expected at most %d copies and -1 to %d",
                     copy[e], c, e, MS_MAX_RANKS, c - 1);
    l->host[e] = copy[e] < 0 ? (ms_cuda_turns){MS_CUDA_NO_TURN, 1} : (ms_cuda_turns){(copy[e] - e % c + c) % c, c};
  }
  size_t bytes = (size_t)l->E * sizeof *l->host;
  int before;
  MS_TRY(ms_cuda_enter(l->device, &before, err));
  ms_status status = ms_cuda_status(cudaMalloc((void **)&l->turns, bytes), "cudaMalloc", err);
  if (status == MS_OK)
    status = ms_cuda_status(cudaMemcpy(l->turns, l->host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy", err);
  if (status == MS_OK) // other streams do not wait for the legacy default stream
    status = ms_cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize", err);
  ms_cuda_leave(before);
  return status;
}

ms_status ms_cuda_layout_create(int32_t E, const int32_t *copies, const int32_t *copy, int32_t device,
                                ms_cuda_layout **out, ms_error *err) {
  *out = NULL;
  if (E < 1 || E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "layout: %d experts, expected 1 to %d", E, MS_MAX_EXPERTS);
  ms_status status = MS_OK;
  ms_cuda_layout *l = calloc(1, sizeof *l);
  if (l) *l = (ms_cuda_layout){.E = E, .device = device, .host = malloc((size_t)E * sizeof *l->host)};
  if (l && l->host)
    status = fill(l, copies, copy, err);
  else
    status = ms_fail(err, MS_ENOMEM, "no memory for a layout of %d experts", E);
  if (status == MS_OK)
    *out = l;
  else
    ms_cuda_layout_free(l);
  return status;
}

void ms_cuda_layout_free(ms_cuda_layout *l) {
  if (!l) return;
  int before;
  if (l->turns && ms_cuda_enter(l->device, &before, NULL) == MS_OK) {
    cudaFree(l->turns); // waits for the device
    ms_cuda_leave(before);
  }
  free(l->host);
  free(l);
}

int64_t ms_cuda_layout_own(const ms_cuda_layout *l, int32_t e, int64_t count) {
  ms_cuda_turns turns = l->host[e];
  return count > turns.first ? (count - turns.first - 1) / turns.step + 1 : 0;
}
