// counted_calls.h - functions of the CUDA runtime that are counted while they are called, for test_counts.cu.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_TESTS_COUNTED_CALLS_H
#define MS_TESTS_COUNTED_CALLS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef struct counted_calls {
  int launches, waits, allocations, copies, events;
} counted_calls;

// Count this thread's calls from now on, or stop. While counting is off, calls pass as they are.
void count_calls(int on);
// What was counted in this thread so far; `forget` it.
counted_calls calls_so_far(int forget);

#ifdef __cplusplus
}
#endif
#endif
