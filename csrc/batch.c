// batch.c - the memory behind an ms_batch.
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"

#include <stdlib.h>

// struct ms_batch_memory has nothing but buffers in it, so it can be walked as an array.
enum { BUFFERS = sizeof(struct ms_batch_memory) / sizeof(ms_buffer) };

ms_status ms_batch_create(ms_batch **out, ms_error *err) {
  *out = calloc(1, sizeof **out);
  if (*out) (*out)->memory = calloc(1, sizeof *(*out)->memory);
  if (!*out || !(*out)->memory) {
    free(*out);
    *out = NULL;
    return ms_fail(err, MS_ENOMEM, "no memory for a batch");
  }
  return MS_OK;
}

void ms_batch_free(ms_batch *batch) {
  if (!batch) return;
  ms_buffer *buffers = (ms_buffer *)batch->memory;
  for (int32_t i = 0; i < BUFFERS; i++) ms_buffer_free(&buffers[i]);
  free(batch->memory);
  free(batch);
}

int64_t ms_batch_bytes(const ms_batch *batch) {
  const ms_buffer *buffers = (const ms_buffer *)batch->memory;
  int64_t bytes = 0;
  for (int32_t i = 0; i < BUFFERS; i++) bytes += buffers[i].bytes;
  return bytes;
}
