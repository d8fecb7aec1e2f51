// memory.h - buffers that grow and never shrink, and large allocations on huge pages.
// Step files allocate through these only, so the steady state allocates nothing.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_BASE_MEMORY_H
#define MS_BASE_MEMORY_H

#include "../moeshard.h"

typedef struct ms_buffer {
  void *data;
  int64_t bytes;
} ms_buffer;

// Make buffer hold at least `bytes`, 64-byte aligned. Contents are lost when it moves.
// `what` names the use in the message. Errors: MS_ENOMEM; the old buffer is kept then.
ms_status ms_buffer_grow(ms_buffer *buffer, int64_t bytes, const char *what, ms_error *err);
void ms_buffer_free(ms_buffer *buffer);

// Anonymous zeroed memory for packed weights, 2 MiB pages advised (faster streaming at one or
// two tokens an expert, docs/cpu.md). Untouched pages cost nothing.
ms_status ms_pages_alloc(int64_t bytes, const char *what, void **out, ms_error *err);
void ms_pages_free(void *data, int64_t bytes); // NULL is legal
// Give the whole pages inside [data, data + bytes) back to the system; they read as zero afterwards.
void ms_pages_release(void *data, int64_t bytes);

// What the pointers of an ms_batch point into. Each step grows its own.
struct ms_batch_memory {
  ms_buffer expert, weight;                     // route
  ms_buffer first, row, all_expert, all_weight; // gather
  ms_buffer partial;                           // gather, when the exchange has no memory of its own
  ms_buffer copy, turns, count, offset, order; // group
  ms_buffer slot, tasks, input, hidden, scratch; // ffn
  ms_buffer places;                              // combine
};

#endif
