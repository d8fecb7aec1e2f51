// check.h - the harness of the C tests: a failed check prints where and what, and ends the program
// at once.
//
//   int main(void) { check_begin(); test_this(); test_that(); return check_end("test_plan"); }
//
// Checks are counted over all threads and forked children. A child that fails ends with status 1:
// check_children.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_CHECK_H
#define MS_CHECK_H

#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition) CHECK_THAT(condition, "%s", #condition)

// With a message of one's own: CHECK_THAT(n == 3, "n is %d", n)
#define CHECK_THAT(condition, ...)                                                                 \
  do {                                                                                             \
    if (!(condition)) check_fail(__FILE__, __LINE__, __VA_ARGS__);                                 \
    check_count();                                                                                 \
  } while (0)

#define CHECK_INT(got, wanted)                                                                     \
  do {                                                                                             \
    long long check_got = (long long)(got), check_wanted = (long long)(wanted);                    \
    CHECK_THAT(check_got == check_wanted, "%s is %lld, expected %lld", #got, check_got,            \
               check_wanted);                                                                      \
  } while (0)

// `call` returns an ms_status and fills `err`, an ms_error.
#define CHECK_STATUS(call, wanted, err)                                                            \
  do {                                                                                             \
    ms_status check_status = (call);                                                               \
    CHECK_THAT(check_status == (wanted), "%s is %d, expected %s: %s", #call, (int)check_status,    \
               #wanted, check_status == MS_OK ? "no error" : (err).msg);                           \
  } while (0)

#define CHECK_OK(call, err) CHECK_STATUS(call, MS_OK, err)

#define CHECK_TEXT(text, wanted)                                                                   \
  do {                                                                                             \
    const char *check_text = (text);                                                               \
    CHECK_THAT(strstr(check_text, wanted) != NULL, "\"%s\" lacks \"%s\"", check_text, wanted);     \
  } while (0)

// max |got - wanted| / max |wanted| over n floats. A NaN anywhere fails, whatever the tolerance.
#define CHECK_CLOSE(got, wanted, n, tolerance)                                                     \
  do {                                                                                             \
    double check_difference = check_relative_difference(got, wanted, n);                           \
    CHECK_THAT(check_difference <= (tolerance), "%s differs from %s by %g, expected at most %g",   \
               #got, #wanted, check_difference, (double)(tolerance));                              \
  } while (0)

static _Atomic int64_t *check_counter; // in shared memory

static inline void check_count(void) {
  atomic_fetch_add_explicit(check_counter, 1, memory_order_relaxed);
}

static inline void check_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4), noreturn));

static inline void check_fail(const char *file, int line, const char *format, ...) {
  char text[1200];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  fprintf(stderr, "%s:%d: %s\n", file, line, text);
  fflush(NULL);
  _exit(1); // no destructors: other threads may still run
}

static inline double check_relative_difference(const float *got, const double *wanted, int64_t n) {
  double difference = 0, scale = 0;
  for (int64_t i = 0; i < n; i++) {
    double d = fabs((double)got[i] - wanted[i]), s = fabs(wanted[i]);
    if (isnan(d) || isnan(s)) return NAN;
    if (d > difference) difference = d;
    if (s > scale) scale = s;
  }
  return difference == 0 ? 0 : difference / scale;
}

// Wait for children: each must have ended with status 0, or by `signal` if it is the one that is
// expected to die.
static inline void check_children(const pid_t *children, int count, int dying, int signal) {
  for (int i = 0; i < count; i++) {
    int status = 0;
    CHECK(waitpid(children[i], &status, 0) == children[i]);
    if (i == dying)
      CHECK_THAT(WIFSIGNALED(status) && WTERMSIG(status) == signal,
                 "child %d did not die of signal %d", i, signal);
    else
      CHECK_THAT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child %d failed (wait status %#x)",
                 i, status);
  }
}

static inline void check_begin(void) {
  check_counter =
      mmap(NULL, sizeof *check_counter, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (check_counter == MAP_FAILED) abort();
}

// The exit status of main. A program that checked nothing has failed.
static inline int check_end(const char *program) {
  printf("%s: %lld checks passed\n", program, (long long)*check_counter);
  return *check_counter > 0 ? 0 : 1;
}

#endif
