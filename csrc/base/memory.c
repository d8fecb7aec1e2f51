// memory.c - the only place of the core that allocates large memory.
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "memory.h"

#include <stdlib.h>
#include <sys/mman.h> // mmap, madvise(MADV_HUGEPAGE, MADV_DONTNEED)
#include <unistd.h>   // sysconf

enum { ALIGNMENT = 64 };

ms_status ms_buffer_grow(ms_buffer *buffer, int64_t bytes, const char *what, ms_error *err) {
  if (bytes <= buffer->bytes) return MS_OK;
  // An eighth more than asked: a batch that grows token by token reallocates a logarithmic number of times.
  int64_t room = bytes + bytes / 8;
  room = (room + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  void *data = aligned_alloc(ALIGNMENT, (size_t)room);
  if (!data) return ms_fail(err, MS_ENOMEM, "no memory for %s: %lld bytes", what, (long long)room);
  free(buffer->data);
  buffer->data = data;
  buffer->bytes = room;
  return MS_OK;
}

void ms_buffer_free(ms_buffer *buffer) {
  free(buffer->data);
  *buffer = (ms_buffer){0};
}

ms_status ms_pages_alloc(int64_t bytes, const char *what, void **out, ms_error *err) {
  *out = NULL;
  if (bytes == 0) return MS_OK;
  void *data = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED)
    return ms_fail(err, MS_ENOMEM, "no memory for %s: %lld bytes", what, (long long)bytes);
  madvise(data, (size_t)bytes, MADV_HUGEPAGE); // advice only: small pages work too
  *out = data;
  return MS_OK;
}

void ms_pages_free(void *data, int64_t bytes) {
  if (data) munmap(data, (size_t)bytes);
}

void ms_pages_release(void *data, int64_t bytes) {
  int64_t page = sysconf(_SC_PAGESIZE), at = (int64_t)(intptr_t)data;
  int64_t skip = (page - at % page) % page, whole = (bytes - skip) / page * page;
  if (whole > 0) madvise((char *)data + skip, (size_t)whole, MADV_DONTNEED);
}
