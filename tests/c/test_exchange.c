// test_exchange.c - gather and combine over every exchange of the C core, and what happens when
// ranks disagree, refuse, stall, leave or die.
//
//   test_exchange [processes | threads] [part of a test's name]
//
// Ranks are forked processes, or threads of this one. Under ThreadSanitizer they are always
// threads, and a file mapped by two of them lies at one address (see the end of this file), so that
// the whole protocol is checked.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "check.h"
#include "exchange/exchange.h"

#include <dirent.h>
#include <dlfcn.h> // RTLD_NEXT
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>

#ifdef __SANITIZE_THREAD__
enum { UNDER_TSAN = 1 };
#else
enum { UNDER_TSAN = 0 };
#endif

enum { RANKS = 4, LONG = 60 }; // at most; a timeout that nothing should reach, in seconds
static bool use_threads;

// ---- ranks --------------------------------------------------------------------------------------

typedef struct common { // shared memory of all ranks of a test
  char name[64];
  int32_t R;
  double timeout;
  pthread_barrier_t barrier;
  ms_error errors[RANKS];
} common;

typedef void rank_main(int32_t rank, common *c);

typedef struct rank_thread {
  pthread_t thread;
  int32_t rank;
  common *c;
  rank_main *body;
} rank_thread;

static void *run_thread(void *argument) {
  rank_thread *self = argument;
  self->body(self->rank, self->c);
  return NULL;
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int files_of(const char *name) {
  char prefix[96];
  snprintf(prefix, sizeof prefix, "moeshard-%s-", name);
  DIR *dir = opendir("/dev/shm");
  CHECK(dir != NULL);
  int count = 0;
  for (struct dirent *entry; (entry = readdir(dir));)
    count += strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
  closedir(dir);
  return count;
}

static common *make_common(int32_t R, double timeout) {
  static int tests;
  common *c = mmap(NULL, sizeof *c, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(c != MAP_FAILED);
  snprintf(c->name, sizeof c->name, "test-%d-%d", (int)getpid(), tests++);
  c->R = R;
  c->timeout = timeout;
  pthread_barrierattr_t shared;
  pthread_barrierattr_init(&shared);
  pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&c->barrier, &shared, (unsigned)R);
  return c;
}

// Run body on R ranks; rank `dying` is to end by SIGKILL (-1: none). Whatever happens, no file is
// left.
static common *run(int32_t R, double timeout, rank_main *body, int32_t dying) {
  common *c = make_common(R, timeout);
  if (use_threads) {
    rank_thread threads[RANKS];
    for (int32_t r = 0; r < R; r++) {
      threads[r] = (rank_thread){.rank = r, .c = c, .body = body};
      CHECK(pthread_create(&threads[r].thread, NULL, run_thread, &threads[r]) == 0);
    }
    for (int32_t r = 0; r < R; r++) pthread_join(threads[r].thread, NULL);
  } else {
    pid_t children[RANKS];
    fflush(NULL);
    for (int32_t r = 0; r < R; r++) {
      children[r] = fork();
      CHECK(children[r] >= 0);
      if (children[r] == 0) {
        alarm(LONG);
        body(r, c);
        exit(0); // with destructors: LeakSanitizer looks at the children too
      }
    }
    check_children(children, R, dying, SIGKILL);
  }
  CHECK_INT(files_of(c->name), 0);
  return c;
}

static void end(common *c) {
  pthread_barrier_destroy(&c->barrier);
  munmap(c, sizeof *c);
}

static void run_and_end(int32_t R, double timeout, rank_main *body) {
  end(run(R, timeout, body, -1));
}

// All ranks but `except` have the same error; it has this code and these words in it.
static void check_same_error(const common *c, int32_t except, ms_status code, const char *words) {
  int32_t model = except == 0 ? 1 : 0;
  for (int32_t r = 0; r < c->R; r++) {
    if (r == except) continue;
    CHECK_INT(c->errors[r].code, code);
    CHECK_THAT(strcmp(c->errors[r].msg, c->errors[model].msg) == 0,
               "rank %d says \"%s\", rank %d \"%s\"", r, c->errors[r].msg, model,
               c->errors[model].msg);
    CHECK_TEXT(c->errors[r].msg, words);
  }
}

static void wait_for_all(common *c) { pthread_barrier_wait(&c->barrier); }

static ms_exchange *join(int32_t rank, const common *c) {
  ms_error err;
  ms_exchange *x = NULL;
  CHECK_OK(ms_exchange_shm(c->name, rank, c->R, c->timeout, NULL, NULL, &x, &err), err);
  CHECK_INT(ms_exchange_rank(x), rank);
  CHECK_INT(ms_exchange_ranks(x), c->R);
  return x;
}

// ---- a call whose result every rank can work out alone ------------------------------------------

typedef struct shape {
  int64_t T[RANKS], D;
  int32_t K, E;
  ms_dtype dtype;
  bool replicated, combined;
  uint32_t seed;
} shape;

static uint32_t mix(uint32_t a, uint32_t b) {
  uint32_t h = (a ^ b * 0x9e3779b9u) * 0x85ebca6bu;
  h ^= h >> 15;
  h *= 0xc2b2ae35u;
  return h ^ h >> 13;
}

static float noise(uint32_t seed, int64_t i) {
  return (float)(int32_t)mix(seed, (uint32_t)i) * 0x1p-31f;
}

static shape random_shape(uint32_t seed, int32_t R, int64_t tokens, int64_t width) {
  static const int32_t choices[] = {0, 1, 2, 4, 1, 2};
  static const ms_dtype dtypes[] = {MS_F32, MS_BF16, MS_F16};
  shape s = {.seed = seed};
  for (int32_t r = 0; r < R; r++)
    s.T[r] = mix(seed, 10 + (uint32_t)r) % 4 == 0 ? 0 : mix(seed, 20 + (uint32_t)r) % tokens;
  if (mix(seed, 1) % 16 == 0) memset(s.T, 0, sizeof s.T);
  s.D = 1 + mix(seed, 2) % width;
  s.K = choices[mix(seed, 3) % 6];
  s.E = 1 + (int32_t)(mix(seed, 4) % 9);
  s.dtype = dtypes[mix(seed, 5) % 3];
  s.replicated = mix(seed, 6) % 4 == 0;
  s.combined = mix(seed, 7) % 8 != 0;
  if (s.replicated)
    for (int32_t r = 1; r < R; r++) s.T[r] = s.T[0];
  return s;
}

static float widen(ms_dtype dtype, const void *x, int64_t i) {
  if (dtype == MS_F32) return ((const float *)x)[i];
  uint16_t bits = ((const uint16_t *)x)[i];
  if (dtype == MS_F16) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return (float)half;
  }
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static void narrow(ms_dtype dtype, float value, void *x, int64_t i) {
  uint16_t bits;
  if (dtype == MS_F32) {
    ((float *)x)[i] = value;
    return;
  }
  if (dtype == MS_F16) {
    _Float16 half = (_Float16)value;
    memcpy(&bits, &half, sizeof bits);
  } else {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    bits = (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  ((uint16_t *)x)[i] = bits;
}

typedef struct tokens { // what one rank brings along
  void *hidden;
  int32_t *index;
  float *weight;
} tokens;

static void *allocate(int64_t bytes) {
  void *data = malloc((size_t)bytes + 1);
  CHECK(data != NULL);
  return data;
}

static tokens make_tokens(const shape *s, int32_t rank) {
  int64_t T = s->T[rank], slots = T * s->K;
  uint32_t seed = mix(s->seed, s->replicated ? 100 : 100 + (uint32_t)rank);
  tokens t = {allocate(T * s->D * ms_dtype_size(s->dtype)), allocate(slots * 4),
              allocate(slots * 4)};
  for (int64_t i = 0; i < T * s->D; i++) narrow(s->dtype, noise(seed, i), t.hidden, i);
  for (int64_t i = 0; i < slots; i++) {
    uint32_t choice = mix(seed ^ 0x5555, (uint32_t)i);
    t.index[i] = choice % 5 == 0 ? -1 : (int32_t)(choice / 5 % (uint32_t)s->E);
    t.weight[i] = noise(seed ^ 0xaaaa, i);
  }
  return t;
}

static void free_tokens(tokens *t) {
  free(t->hidden);
  free(t->index);
  free(t->weight);
}

// What rank r computes for one slot. Not inlined: the product is rounded before it is added, here
// and there.
static __attribute__((noinline)) float contribution(float value, float weight, int32_t rank,
                                                    int32_t expert) {
  return value * weight * (1.0f + 0.3f * (float)rank + 0.07f * (float)expert);
}

// In the place of ffn.
static void fill_slots(ms_batch *b, float *slot) {
  b->slot = b->K == 1 ? b->partial : slot;
  for (int64_t s = 0; s < b->N * b->K; s++) {
    int64_t t = s / b->K;
    for (int64_t i = 0; i < b->D; i++)
      b->slot[s * b->D + i] = b->all_expert[s] < 0
                                  ? NAN // is never to be read
                                  : contribution(widen(b->dtype, b->row[t], i), b->all_weight[s],
                                                 b->rank, b->all_expert[s]);
  }
}

static void check_gathered(const ms_batch *b, const shape *s, int32_t R, int32_t rank) {
  CHECK_INT(b->R, R);
  CHECK_INT(b->rank, rank);
  int64_t first = 0, bytes = s->D * ms_dtype_size(s->dtype);
  for (int32_t r = 0; r < (s->replicated ? 1 : R); r++) {
    tokens t = make_tokens(s, r);
    CHECK_INT(b->first[r], first);
    for (int64_t i = 0; i < s->T[r]; i++)
      CHECK_THAT(memcmp(b->row[first + i], (char *)t.hidden + i * bytes, (size_t)bytes) == 0,
                 "row %lld of rank %d", (long long)i, r);
    for (int64_t i = 0; i < s->T[r] * s->K; i++) {
      CHECK_INT(b->all_expert[first * s->K + i], t.index[i]);
      CHECK(b->all_weight[first * s->K + i] == t.weight[i]);
    }
    first += s->T[r];
    free_tokens(&t);
  }
  CHECK_INT(b->N, first);
  CHECK_INT(b->first[R], first);
  if (s->K > 0 || b->out) CHECK(b->partial != NULL || b->N == 0);
}

// A plain sum: choices in order, then ranks in order.
static void check_combined(const void *out, const shape *s, int32_t R, const tokens *t, int64_t T) {
  for (int64_t i = 0; i < T * s->D; i++) {
    float total = 0;
    for (int32_t r = 0; r < R; r++) {
      float part = 0;
      bool any = false;
      for (int64_t j = i / s->D * s->K; j < (i / s->D + 1) * s->K; j++) {
        if (t->index[j] < 0) continue;
        float slot = contribution(widen(s->dtype, t->hidden, i), t->weight[j], r, t->index[j]);
        part = any ? part + slot : slot;
        any = true;
      }
      total = r == 0 ? part : total + part;
    }
    char wanted[4];
    int64_t size = ms_dtype_size(s->dtype);
    narrow(s->dtype, total, wanted, 0);
    CHECK_THAT(memcmp(wanted, (const char *)out + i * size, (size_t)size) == 0,
               "token %lld column %lld is %g, expected %g", (long long)(i / s->D),
               (long long)(i % s->D), (double)widen(s->dtype, out, i),
               (double)widen(s->dtype, wanted, 0));
  }
}

typedef struct call { // one call of one rank, in its stages
  shape s;
  tokens t;
  void *out;
  float *slot;
} call;

static call begin_call(ms_batch *b, const shape *s, int32_t rank) {
  ms_error err;
  call k = {*s, make_tokens(s, rank), NULL, NULL};
  int64_t T = s->T[rank];
  if (s->combined) k.out = memset(allocate(T * s->D * 4), 0x7f, (size_t)(T * s->D * 4));
  CHECK_OK(ms_route(b, k.t.hidden, s->dtype, k.t.index, MS_I32, k.t.weight, MS_F32, T, s->D, s->K,
                    s->E, k.out, &err),
           err);
  b->replicated = s->replicated;
  b->layer = (int64_t)s->seed;
  return k;
}

static void compute(ms_batch *b, call *k) {
  free(k->slot);
  k->slot = allocate(b->N * b->K * b->D * (int64_t)sizeof(float));
  if (b->partial || b->N == 0) fill_slots(b, k->slot);
}

static void end_call(call *k) {
  free_tokens(&k->t);
  free(k->out);
  free(k->slot);
}

static void good_call(ms_exchange *x, ms_batch *b, const shape *s, ms_threads *threads) {
  ms_error err;
  int32_t rank = ms_exchange_rank(x), R = ms_exchange_ranks(x);
  call k = begin_call(b, s, rank);
  CHECK_OK(ms_gather(b, x, &err), err);
  check_gathered(b, s, R, rank);
  compute(b, &k);
  CHECK_OK(ms_combine(b, x, threads, &err), err);
  if (k.out) check_combined(k.out, s, R, &k.t, s->T[rank]);
  end_call(&k);
}

static ms_batch *new_batch(void) {
  ms_error err;
  ms_batch *b = NULL;
  CHECK_OK(ms_batch_create(&b, &err), err);
  return b;
}

static const shape plain = {
    .T = {3, 5, 0, 7}, .D = 24, .K = 2, .E = 4, .combined = true, .seed = 77};

static void plain_call(ms_exchange *x, ms_batch *b) { good_call(x, b, &plain, NULL); }

// ---- the sums -----------------------------------------------------------------------------------

static void random_calls(ms_exchange *x, int calls) {
  ms_error err;
  ms_threads *threads = NULL;
  int32_t rank = ms_exchange_rank(x), R = ms_exchange_ranks(x);
  CHECK_OK(ms_threads_create(1 + rank % 2, &threads, &err), err);
  ms_batch *b = new_batch();
  for (int n = 0; n < calls; n++) {
    bool large = n % 50 == 49; // zones grow
    shape s = random_shape((uint32_t)(n + 1000 * R), R, large ? 300 : 12, large ? 300 : 40);
    good_call(x, b, &s, n % 3 ? threads : NULL);
  }
  ms_batch_free(b);
  ms_threads_free(threads);
}

static void shm_calls(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  random_calls(x, 1000);
  ms_exchange_free(x);
}

static void test_shm_equals_a_plain_sum(void) {
  for (int32_t R = 1; R <= RANKS; R++) run_and_end(R, LONG, shm_calls);
}

static void test_one_rank_equals_a_plain_sum(void) {
  ms_error err;
  ms_exchange *x = NULL;
  CHECK_OK(ms_exchange_one(&x, &err), err);
  random_calls(x, 1000);
  ms_batch *b = new_batch();
  CHECK_OK(ms_exchange_refuse(x, "nobody hears it", &err), err);
  plain_call(x, b);
  ms_batch_free(b);
  ms_exchange_free(x);
  ms_exchange_free(NULL);
}

// Memory is taken by the first call of a shape and never again.
static void steady(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  plain_call(x, b);
  int64_t bytes = ms_batch_bytes(b);
  const void *partial = b->partial;
  for (int n = 0; n < 20; n++) plain_call(x, b);
  CHECK_INT(ms_batch_bytes(b), bytes);
  CHECK(b->partial == partial);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_the_second_call_takes_no_memory(void) { run_and_end(2, LONG, steady); }

// A caller's own transport (here: memory that all ranks' tokens were written to) gives the same
// bits.
static void test_halves_for_other_transports(void) {
  enum { R = 3 };
  ms_error err;
  for (uint32_t seed = 0; seed < 200; seed++) {
    shape s = random_shape(seed, R, 12, 40);
    s.combined = true;
    tokens all = {allocate(R * 12 * 40 * 4), allocate(R * 12 * 4 * 4), allocate(R * 12 * 4 * 4)};
    int64_t N = 0, row = s.D * ms_dtype_size(s.dtype);
    for (int32_t r = 0; r < (s.replicated ? 1 : R); r++) {
      tokens t = make_tokens(&s, r);
      memcpy((char *)all.hidden + N * row, t.hidden, (size_t)(s.T[r] * row));
      memcpy(all.index + N * s.K, t.index, (size_t)(s.T[r] * s.K) * 4);
      memcpy(all.weight + N * s.K, t.weight, (size_t)(s.T[r] * s.K) * 4);
      N += s.T[r];
      free_tokens(&t);
    }
    ms_batch *b[R];
    call k[R];
    for (int32_t r = 0; r < R; r++) {
      b[r] = new_batch();
      k[r] = begin_call(b[r], &s, r);
      CHECK_OK(ms_gather_from(b[r], r, R, s.T, all.hidden, all.index, all.weight, &err), err);
      check_gathered(b[r], &s, R, r);
      compute(b[r], &k[r]);
      CHECK_OK(ms_combine_choices(b[r], NULL, &err), err);
    }
    for (int32_t r = 0; r < R; r++) {
      const float *parts[R];
      for (int32_t from = 0; from < R; from++)
        parts[from] = b[from]->partial + (s.replicated ? 0 : b[r]->first[r] * s.D);
      CHECK_OK(ms_combine_ranks(b[r], parts, R, false, NULL, &err), err);
      check_combined(k[r].out, &s, R, &k[r].t, s.T[r]);
    }
    for (int32_t r = 0; r < R; r++) {
      end_call(&k[r]);
      ms_batch_free(b[r]);
    }
    free_tokens(&all);
  }
}

static void test_halves_refuse_bad_arguments(void) {
  ms_error err;
  ms_batch *b = new_batch();
  float part = 0;
  const float *parts[] = {&part};
  CHECK_STATUS(ms_combine_choices(b, NULL, &err), MS_EINVAL, err); // not gathered
  call k = begin_call(b, &plain, 1);
  int64_t counts[] = {3, 5, -1};
  CHECK_STATUS(ms_gather_from(b, 1, 3, counts, k.t.hidden, k.t.index, k.t.weight, &err), MS_EINVAL,
               err);
  CHECK_TEXT(err.msg, "rank 2 has -1 tokens");
  CHECK_STATUS(ms_gather_from(b, 0, 2, counts, k.t.hidden, k.t.index, k.t.weight, &err), MS_EINVAL,
               err);
  CHECK_TEXT(err.msg, "rank 0 routed 5 tokens, but tokens[0] is 3");
  CHECK_STATUS(ms_gather_from(b, 2, 2, counts, k.t.hidden, k.t.index, k.t.weight, &err), MS_EINVAL,
               err);
  CHECK_STATUS(
      ms_gather_from(b, 0, MS_MAX_RANKS + 1, counts, k.t.hidden, k.t.index, k.t.weight, &err),
      MS_EINVAL, err);
  CHECK_INT(b->N, 0);
  int64_t alone[] = {5};
  CHECK_OK(ms_gather_from(b, 0, 1, alone, k.t.hidden, k.t.index, k.t.weight, &err), err);
  CHECK_STATUS(ms_combine_choices(b, NULL, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "ffn has not run");
  CHECK_STATUS(ms_combine_ranks(b, parts, 0, false, NULL, &err), MS_EINVAL, err);
  end_call(&k);
  ms_batch_free(b);
}

// ---- ranks that disagree ------------------------------------------------------------------------

static void test_header_check_names_field_ranks_and_values(void) {
  ms_error err;
  ms_header h[12];
  const ms_header model = {
      .call = 4, .layer = 2, .T = 3, .D = 768, .K = 2, .E = 8, .dtype = MS_BF16};
  for (int r = 0; r < 12; r++) h[r] = model;
  for (int32_t R = 1; R <= 12; R++) CHECK_OK(ms_header_check(h, R, &err), err);
  h[5].T = 9; // ranks may hold different numbers of tokens
  h[5].digest = 1;
  CHECK_OK(ms_header_check(h, 12, &err), err);
  h[5] = model;

  h[2].D = 512;
  CHECK_STATUS(ms_header_check(h, 3, &err), MS_EMISMATCH, err);
  CHECK_TEXT(err.msg,
             "ranks disagree in call 4: the model width D is 768 on ranks 0, 1 but 512 on rank 2");
  h[2] = model;
  for (int r = 0; r < 11; r++) h[r].K = 1;
  CHECK_STATUS(ms_header_check(h, 12, &err), MS_EMISMATCH, err);
  CHECK_TEXT(
      err.msg,
      "the choices per token K is 1 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more but 2 on rank 11");
  for (int r = 0; r < 12; r++) h[r] = model;
  h[1].dtype = MS_F16;
  CHECK_STATUS(ms_header_check(h, 2, &err), MS_EMISMATCH, err);
  CHECK_TEXT(err.msg, "the dtype is bfloat16 on rank 0 but float16 on rank 1");
  h[1] = model;
  h[1].call = 5;
  h[1].K = 7;
  CHECK_STATUS(ms_header_check(h, 2, &err), MS_EMISMATCH, err);
  CHECK_TEXT(err.msg, "the number of the call is 4 on rank 0 but 5 on rank 1");
  CHECK_STATUS(ms_header_check(h, 2, NULL), MS_EMISMATCH, err);
  h[1] = model;
  h[1].layout = 0xabc;
  CHECK_STATUS(ms_header_check(h, 2, &err), MS_EMISMATCH, err);
  CHECK_TEXT(err.msg, "(its digest) is 0000000000000000 on rank 0 but 0000000000000abc on rank 1");
  CHECK_STATUS(ms_header_check(h, 0, &err), MS_EINVAL, err);
}

static void test_digest_sees_every_slot(void) {
  shape s = {.T = {40}, .D = 4, .K = 3, .E = 6, .replicated = true, .seed = 5};
  ms_batch *b = new_batch();
  call k = begin_call(b, &s, 0);
  ms_header model, h;
  ms_header_fill(b, 1, &model);
  for (int64_t i = 0; i < 120; i++) {
    float weight = b->weight[i];
    int32_t expert = b->expert[i];
    b->weight[i] = weight + 1;
    ms_header_fill(b, 1, &h);
    CHECK_INT(h.digest == model.digest, expert < 0); // the weight of no expert means nothing
    b->weight[i] = weight;
    b->expert[i] = expert < 0 ? 0 : expert - 1;
    ms_header_fill(b, 1, &h);
    CHECK(h.digest != model.digest);
    b->expert[i] = expert;
  }
  b->replicated = false;
  ms_header_fill(b, 1, &h);
  CHECK_INT(h.digest, 0);
  end_call(&k);
  ms_batch_free(b);
}

enum { DIFFERENCES = 8 };

// The last rank differs in one thing.
static const char *differ(shape *s, int which) {
  switch (which) {
  case 0:
    s->dtype = MS_BF16;
    return "the dtype is float32 on";
  case 1:
    s->D = 25;
    return "the model width D is 24 on";
  case 2:
    s->K = 0;
    return "the choices per token K is 2 on";
  case 3:
    s->E = 5;
    return "the number of experts E is 4 on";
  case 4:
    s->replicated = true;
    return "replicated is false on";
  case 5:
    s->seed++; // the layer
    return "the layer is 77 on";
  case 6: // only among replicated tokens
    for (int r = 0; r < RANKS; r++) s->T[r]++;
    return "the number of replicated tokens T is 4 on";
  default:
    return "the routing of the replicated tokens (its digest) is";
  }
}

static void mismatches(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  for (int which = 0; which < DIFFERENCES; which++) {
    shape s = plain;
    s.replicated = which >= 6;
    if (s.replicated)
      for (int r = 0; r < RANKS; r++) s.T[r] = 4;
    const char *words = NULL;
    shape other = s;
    words = differ(&other, which);
    for (int twice = 0; twice < 2; twice++) { // in a row: nothing is left over from a failed call
      call k = begin_call(b, rank == c->R - 1 ? &other : &s, rank);
      if (which == DIFFERENCES - 1 && rank == c->R - 1) b->expert[1] = b->expert[1] == 0 ? 1 : 0;
      CHECK_STATUS(ms_gather(b, x, &err), MS_EMISMATCH, err);
      CHECK_TEXT(err.msg, words);
      CHECK_INT(b->N, 0);
      c->errors[rank] = err;
      end_call(&k);
      wait_for_all(c);
      if (rank == 0) check_same_error(c, -1, MS_EMISMATCH, words);
      wait_for_all(c);
    }
    if (which % 2) plain_call(x, b);
  }
  // One rank wants no result.
  shape s = plain;
  s.combined = rank != 1;
  for (int twice = 0; twice < 2; twice++) {
    call k = begin_call(b, &s, rank);
    CHECK_OK(ms_gather(b, x, &err), err);
    compute(b, &k);
    CHECK_STATUS(ms_combine(b, x, NULL, &err), MS_EMISMATCH, err);
    CHECK_TEXT(err.msg, "but not on rank 1");
    end_call(&k);
  }
  plain_call(x, b);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_a_mismatch_is_the_same_error_on_all_ranks(void) {
  for (int32_t R = 2; R <= RANKS; R++) run_and_end(R, LONG, mismatches);
}

// Calls in which the ranks in `who` (bits) refuse: at the gather, or between gather and combine.
static void refuse_calls(ms_exchange *x, ms_batch *b, uint32_t who, bool at_combine, int calls) {
  ms_error err;
  int32_t rank = ms_exchange_rank(x);
  for (int n = 0; n < calls; n++) {
    char msg[64];
    snprintf(msg, sizeof msg, "rank %d does not like it", rank);
    call k = begin_call(b, &plain, rank);
    bool refuses = who >> rank & 1;
    if (at_combine) {
      CHECK_OK(ms_gather(b, x, &err), err);
      compute(b, &k);
    }
    if (refuses) {
      CHECK_OK(ms_exchange_refuse(x, msg, &err), err);
    } else {
      ms_status status = at_combine ? ms_combine(b, x, NULL, &err) : ms_gather(b, x, &err);
      CHECK_STATUS(status, MS_EPEER, err);
      int32_t lowest = __builtin_ctz(who);
      snprintf(msg, sizeof msg, "rank %d: rank %d does not like it", lowest, lowest);
      CHECK_THAT(strcmp(err.msg, msg) == 0, "\"%s\", expected \"%s\"", err.msg, msg);
    }
    end_call(&k);
  }
}

static void refusals(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  for (uint32_t who = 1; who < 1u << c->R; who++)
    for (int at_combine = 0; at_combine < 2; at_combine++) {
      refuse_calls(x, b, who, at_combine, 1 + (int)who % 6);
      if (who % 3 == 0) plain_call(x, b);
    }
  plain_call(x, b);

  // A message longer than the room for it is cut, not overrun.
  ms_error err;
  char text[2000];
  memset(text, 'x', sizeof text - 1);
  text[sizeof text - 1] = 0;
  call k = begin_call(b, &plain, rank);
  if (rank == 0) {
    CHECK_OK(ms_exchange_refuse(x, text, &err), err);
  } else {
    CHECK_STATUS(ms_gather(b, x, &err), MS_EPEER, err);
    CHECK_TEXT(err.msg, "rank 0: xxx");
    CHECK(strlen(err.msg) > 400);
  }
  end_call(&k);
  plain_call(x, b);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_a_refusal_reaches_all_ranks(void) {
  for (int32_t R = 1; R <= RANKS; R++) run_and_end(R, LONG, refusals);
}

// A rank that goes on without its ffn fails alone, and the others hear of it.
static void forgotten_ffn(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  call k = begin_call(b, &plain, rank);
  CHECK_STATUS(ms_combine(b, x, NULL, &err), MS_EINVAL,
               err); // no gather yet: nothing is said to the others
  CHECK_OK(ms_gather(b, x, &err), err);
  CHECK_STATUS(ms_gather(b, x, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "call 1 is still open");
  if (rank != 1) compute(b, &k); // the refused second gather took nothing away
  CHECK_STATUS(ms_combine(b, x, NULL, &err), rank == 1 ? MS_EINVAL : MS_EPEER, err);
  CHECK_TEXT(err.msg, rank == 1 ? "ffn has not run" : "rank 1: combine: ffn has not run");
  end_call(&k);
  plain_call(x, b);

  // Another batch than the one that was gathered.
  ms_batch *other = new_batch();
  shape s = plain;
  s.D = 5;
  k = begin_call(b, &plain, rank);
  call j = begin_call(other, &s, rank);
  CHECK_OK(ms_gather_from(other, 0, 1, &s.T[rank], j.t.hidden, j.t.index, j.t.weight, &err), err);
  compute(other, &j);
  CHECK_OK(ms_gather(b, x, &err), err);
  compute(b, &k);
  CHECK_STATUS(ms_combine(rank == 0 ? other : b, x, NULL, &err), rank == 0 ? MS_EINVAL : MS_EPEER,
               err);
  CHECK_TEXT(err.msg, "not the batch that was gathered in call 3");
  end_call(&k);
  end_call(&j);
  plain_call(x, b);
  ms_batch_free(other);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_wrong_order_fails_on_all_ranks_and_heals(void) {
  run_and_end(3, LONG, forgotten_ffn);
}

// ---- no room ------------------------------------------------------------------------------------

static int64_t overfull_width; // one token of this many floats is more than /dev/shm has room for

static void overfull(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  int64_t D = overfull_width;
  float *hidden =
      mmap(NULL, (size_t)D * 4, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(hidden != MAP_FAILED);
  int32_t index = 0;
  float weight = 1;
  plain_call(x, b);
  // Tokens that do not fit, on one rank.
  call k = begin_call(b, &plain, rank);
  if (rank == 1)
    CHECK_OK(ms_route(b, hidden, MS_F32, &index, MS_I32, &weight, MS_F32, 1, D, 0, 1, NULL, &err),
             err);
  CHECK_STATUS(ms_gather(b, x, &err), rank == 1 ? MS_ENOMEM : MS_EPEER, err);
  CHECK_TEXT(err.msg, "no room in /dev/shm: rank 1 needs");
  CHECK_TEXT(err.msg, "--shm-size");
  end_call(&k);
  plain_call(x, b);
  // Partial outputs that do not fit, on all ranks: the tokens themselves stay where they are.
  CHECK_OK(ms_route(b, hidden, MS_F32, &index, MS_I32, &weight, MS_F32, 1, D, 1, 1, NULL, &err),
           err);
  b->replicated = true;
  CHECK_STATUS(ms_gather(b, x, &err), MS_ENOMEM, err);
  CHECK_TEXT(err.msg, "for its partial outputs");
  CHECK_INT(b->N, 0);
  plain_call(x, b);
  munmap(hidden, (size_t)D * 4);
  ms_batch_free(b);
  ms_exchange_free(x);
}

// Partial outputs that do not fit on one rank, when the others have already begun the call.
static void half_full(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  plain_call(x, b);
  shape s = plain;
  s.T[0] = 3000;
  call k = begin_call(b, &s, rank);
  if (rank == 1) {
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    struct rlimit limit = {((rlim_t)2 << 40) + (1 << 17), RLIM_INFINITY};
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK_STATUS(ms_gather(b, x, &err), MS_ENOMEM, err);
  } else {
    CHECK_OK(ms_gather(b, x, &err), err);
    compute(b, &k);
    CHECK_STATUS(ms_combine(b, x, NULL, &err), MS_EPEER, err);
  }
  CHECK_TEXT(err.msg, "rank 1 needs");
  end_call(&k);
  plain_call(x, b);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_no_room_is_an_error_and_heals(void) {
  struct statvfs room;
  CHECK(statvfs("/dev/shm", &room) == 0);
  overfull_width = (int64_t)(room.f_bavail * room.f_frsize) / 4 + (64 << 20);
  run_and_end(3, LONG, overfull);
  if (!use_threads) run_and_end(3, LONG, half_full);
}

// ---- ranks that stall, leave, die ---------------------------------------------------------------

static int count_down(void *context) { return --*(int *)context < 0; }

static void check_broken(ms_exchange *x, ms_batch *b, const char *words) {
  ms_error err;
  double start = seconds();
  call k = begin_call(b, &plain, ms_exchange_rank(x));
  CHECK_STATUS(ms_gather(b, x, &err), MS_ECOMM, err);
  CHECK_TEXT(err.msg, words);
  CHECK_STATUS(ms_exchange_refuse(x, "too late", &err), MS_ECOMM, err);
  CHECK(seconds() - start < 0.5);
  end_call(&k);
}

static void late(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  plain_call(x, b);
  call k = begin_call(b, &plain, rank);
  if (rank == c->R - 1) usleep(2000 * 1000);
  double start = seconds();
  CHECK_STATUS(ms_gather(b, x, &err), MS_ETIMEOUT, err);
  if (rank == c->R - 1) {
    CHECK(seconds() - start < 0.5); // the others have long gone
    CHECK_TEXT(err.msg, "gave up");
  } else {
    CHECK_THAT(seconds() - start > 0.95 && seconds() - start < 1.9, "%g s", seconds() - start);
  }
  CHECK_TEXT(err.msg, c->R == 2 ? "rank 1 did not arrive within 1 s during call 2 (gather)"
                                : "rank 3 did not arrive within 1 s during call 2 (gather)");
  check_broken(x, b, "did not arrive");
  end_call(&k);
  wait_for_all(c);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_a_late_rank_is_named(void) {
  run_and_end(2, 1, late);
  run_and_end(4, 1, late);
}

static void late_combine(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  call k = begin_call(b, &plain, rank);
  CHECK_OK(ms_gather(b, x, &err), err);
  compute(b, &k);
  if (rank > 0) usleep(1500 * 1000);
  CHECK_STATUS(ms_combine(b, x, NULL, &err), MS_ETIMEOUT, err);
  CHECK_TEXT(err.msg, "ranks 1, 2 did not arrive within 1 s during call 1 (combine)");
  check_broken(x, b, "did not arrive");
  end_call(&k);
  wait_for_all(c);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_late_ranks_at_combine_are_named(void) { run_and_end(3, 1, late_combine); }

// Rank 2 gives up, rank 0 hears it, rank 1 comes late and hears it from either in the same words.
static void interrupted(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error err;
  int looks = 1 << 20;
  CHECK_OK(ms_exchange_shm(c->name, rank, c->R, c->timeout, count_down, &looks, &x, &err), err);
  ms_batch *b = new_batch();
  if (rank == 2) looks = 3;
  call k = begin_call(b, &plain, rank);
  double start = seconds();
  if (rank == 1) wait_for_all(c);
  CHECK_STATUS(ms_gather(b, x, &err), rank == 2 ? MS_EINTR : MS_ELOST, err);
  const char *words = rank == 2 ? "interrupted during call 1 (gather)"
                                : "rank 2 gave up: interrupted during call 1 (gather)";
  CHECK_THAT(strcmp(err.msg, words) == 0, "\"%s\", expected \"%s\"", err.msg, words);
  CHECK(seconds() - start < 2);
  if (rank != 1) wait_for_all(c);
  check_broken(x, b, "interrupted");
  end_call(&k);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_poll_ends_a_wait(void) { run_and_end(3, LONG, interrupted); }

static void leaver(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  plain_call(x, b);
  if (rank == 1) {
    ms_exchange_free(x);
  } else {
    call k = begin_call(b, &plain, rank);
    double start = seconds();
    CHECK_STATUS(ms_gather(b, x, &err), MS_ELOST, err);
    CHECK_TEXT(err.msg, "rank 1 (pid ");
    CHECK_TEXT(err.msg, ") left during call 2 (gather)");
    CHECK(seconds() - start < 2);
    check_broken(x, b, "left during call 2");
    end_call(&k);
    ms_exchange_free(x);
  }
  ms_batch_free(b);
}

static void test_a_rank_that_leaves_is_named(void) { run_and_end(3, LONG, leaver); }

// Ranks that leave right after their last call, with or without saying so, take nothing from the
// others.
static void short_life(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  if (rank == 2) usleep(200);
  plain_call(x, b);
  if (!use_threads && rank == 1) _exit(0);
  ms_exchange_free(x);
  ms_batch_free(b);
}

static void test_leaving_after_the_last_call_is_no_loss(void) {
  for (int n = 0; n < (UNDER_TSAN ? 20 : 100); n++) run_and_end(1 + n % RANKS, LONG, short_life);
}

static void last_call_fails(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  shape s = plain;
  s.D += rank == 1;
  call k = begin_call(b, &s, rank);
  CHECK_STATUS(ms_gather(b, x, &err), MS_EMISMATCH, err); // never "rank 0 left"
  end_call(&k);
  ms_exchange_free(x);
  ms_batch_free(b);
}

static void test_leaving_after_a_failed_call_does_not_hide_the_failure(void) {
  for (int n = 0; n < (UNDER_TSAN ? 20 : 100); n++)
    run_and_end(2 + n % (RANKS - 1), LONG, last_call_fails);
}

static void killed_before_gather(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  plain_call(x, b);
  call k = begin_call(b, &plain, rank);
  if (rank == c->R - 1) {
    usleep(300 * 1000); // the others wait in their futex
    raise(SIGKILL);
  }
  double start = seconds();
  CHECK_STATUS(ms_gather(b, x, &err), MS_ELOST, err);
  CHECK_THAT(seconds() - start < 2, "%g s", seconds() - start);
  CHECK_TEXT(err.msg, "died during call 2 (gather)");
  CHECK_TEXT(err.msg, c->R == 2 ? "rank 1 (pid " : "rank 3 (pid ");
  check_broken(x, b, "died during call 2");
  end_call(&k);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void killed_before_combine(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  call k = begin_call(b, &plain, rank);
  CHECK_OK(ms_gather(b, x, &err), err);
  compute(b, &k); // reads the rows of a rank that may be dead: its memory stays
  if (rank == 0) raise(SIGKILL);
  double start = seconds();
  CHECK_STATUS(ms_combine(b, x, NULL, &err), MS_ELOST, err);
  CHECK_THAT(seconds() - start < 2, "%g s", seconds() - start);
  CHECK_TEXT(err.msg, "rank 0 (pid ");
  CHECK_TEXT(err.msg, "died during call 1 (combine)");
  end_call(&k);
  ms_batch_free(b);
  ms_exchange_free(x);
}

// Killed in its gather, while the others are still on their way there.
static int kill_me(void *armed) {
  if (*(bool *)armed) raise(SIGKILL);
  return 0;
}

static void killed_in_gather(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error err;
  bool armed = false;
  CHECK_OK(ms_exchange_shm(c->name, rank, c->R, c->timeout, kill_me, &armed, &x, &err), err);
  armed = rank == 1;
  ms_batch *b = new_batch();
  call k = begin_call(b, &plain, rank);
  if (rank == 0) usleep(600 * 1000);
  double start = seconds();
  ms_status status =
      ms_gather(b, x, &err); // rank 0 may find all posted: then it learns of it in the combine
  if (status == MS_OK) {
    CHECK_INT(rank, 0);
    compute(b, &k);
    status = ms_combine(b, x, NULL, &err);
  }
  CHECK_STATUS(status, MS_ELOST, err);
  CHECK_TEXT(err.msg, "rank 1 (pid ");
  CHECK(seconds() - start < 2);
  end_call(&k);
  ms_batch_free(b);
  ms_exchange_free(x);
}

// Rank 1 dies while it waits for rank 0. Of two, rank 0 finds the file of a dead rank; of three,
// rank 2 sees it die and removes its file and its own, so that rank 0 finds nobody.
static void killed_while_forming(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error err;
  if (rank == 0) usleep(400 * 1000);
  double start = seconds();
  bool armed = rank == 1, nobody = rank == 0 && c->R == 3;
  CHECK_STATUS(ms_exchange_shm(c->name, rank, c->R, c->timeout, kill_me, &armed, &x, &err),
               nobody ? MS_ETIMEOUT : MS_ELOST, err);
  if (nobody) {
    CHECK_TEXT(err.msg, "ranks 1, 2 did not arrive within 1 s while the group was forming");
  } else {
    CHECK_TEXT(err.msg, "rank 1 (pid ");
    CHECK_TEXT(err.msg, "died while the group was forming");
  }
  CHECK(x == NULL);
  CHECK(seconds() - start < 2);
}

static void test_a_killed_rank_is_named_within_two_seconds(void) {
  if (use_threads) return;
  end(run(2, LONG, killed_before_gather, 1));
  end(run(4, LONG, killed_before_gather, 3));
  end(run(3, LONG, killed_before_combine, 0));
  end(run(3, LONG, killed_in_gather, 1));
  end(run(2, LONG, killed_while_forming, 1));
  end(run(3, 1, killed_while_forming, 1));
}

// A fork, as subprocess modules make it: the child neither leaves for its parent nor may it speak
// for it, and when the parent dies its exchange dies, though the child lives on.
static void forking(int32_t rank, common *c) {
  ms_exchange *x = join(rank, c);
  ms_batch *b = new_batch();
  ms_error err;
  plain_call(x, b);
  pid_t child = fork();
  if (child == 0) {
    call k = begin_call(b, &plain, rank);
    CHECK_STATUS(ms_gather(b, x, &err), MS_ECOMM, err);
    CHECK_TEXT(err.msg, "not to its forked child");
    ms_exchange_free(x);
    end_call(&k);
    if (rank == 1) sleep(1);
    _exit(0);
  }
  usleep(rank == 0 ? 400 * 1000 : 200 * 1000); // long enough for a look at each other
  plain_call(x, b);
  if (rank == 1) raise(SIGKILL);
  call k = begin_call(b, &plain, rank);
  double start = seconds();
  CHECK_STATUS(ms_gather(b, x, &err), MS_ELOST, err);
  CHECK(seconds() - start < 2);
  check_children(&child, 1, -1, 0);
  end_call(&k);
  ms_batch_free(b);
  ms_exchange_free(x);
}

static void test_a_forked_child_changes_nothing(void) {
  if (!use_threads) end(run(2, LONG, forking, 1));
}

// ---- forming a group ----------------------------------------------------------------------------

static void missing_rank(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error err;
  if (rank == 1 || rank == 3) return;
  double start = seconds();
  CHECK_STATUS(ms_exchange_shm(c->name, rank, c->R, 0.5, NULL, NULL, &x, &err), MS_ETIMEOUT, err);
  CHECK_TEXT(err.msg, "ranks 1, 3 did not arrive within 0.5 s while the group was forming");
  CHECK(seconds() - start < 1.5);
}

static void test_ranks_that_never_come_are_named(void) { run_and_end(4, LONG, missing_rank); }

static void interrupted_forming(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error err;
  int looks = 4;
  if (rank == 2) return;
  CHECK_STATUS(
      ms_exchange_shm(c->name, rank, c->R, LONG, rank == 0 ? count_down : NULL, &looks, &x, &err),
      rank == 0 ? MS_EINTR : MS_ELOST, err);
  CHECK_TEXT(err.msg, "interrupted while the group was forming");
}

static void test_poll_ends_forming(void) { run_and_end(3, LONG, interrupted_forming); }

static void other_counts(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error *err = &c->errors[rank];
  CHECK_STATUS(ms_exchange_shm(c->name, rank, rank == 0 ? 2 : 3, 10, NULL, NULL, &x, err),
               MS_EMISMATCH, *err);
  CHECK_TEXT(err->msg, "rank 0 was started with 2 ranks, but rank 1 with 3");
}

static void test_another_number_of_ranks_is_a_mismatch(void) {
  for (int n = 0; n < 10; n++) run_and_end(2, LONG, other_counts);
}

static void twins(int32_t rank, common *c) { // both say that they are rank 0 of 2
  ms_exchange *x = NULL;
  ms_status status = ms_exchange_shm(c->name, 0, 2, 0.5, NULL, NULL, &x, &c->errors[rank]);
  CHECK(status == MS_ECOMM || status == MS_ETIMEOUT);
}

static void test_a_rank_number_used_twice_is_refused(void) {
  common *c = run(2, LONG, twins, -1);
  int refused = (c->errors[0].code == MS_ECOMM) + (c->errors[1].code == MS_ECOMM);
  CHECK_INT(refused, 1);
  CHECK_TEXT(c->errors[c->errors[0].code == MS_ECOMM ? 0 : 1].msg,
             "exists: every group needs a new name");
  end(c);
}

// Something under a peer's name that no peer has made.
static void test_foreign_files_are_refused(void) {
  static const struct {
    size_t bytes;
    int value;
    ms_status status;
    const char *words;
  } files[] = {
      {0, 0, MS_ETIMEOUT, "rank 1 did not arrive"},
      {100, 'x', MS_ETIMEOUT, "rank 1 did not arrive"}, // never grows to a page
      {1 << 16, 0, MS_ETIMEOUT, "rank 1 did not arrive"},
      {1 << 16, 'x', MS_ECOMM, "is not rank 1's"},
  };
  ms_error err;
  ms_exchange *x = NULL;
  char *bytes = allocate(1 << 16);
  for (int i = 0; i < 4; i++) {
    common *c = make_common(2, 0.3);
    char path[128];
    snprintf(path, sizeof path, "/dev/shm/moeshard-%s-1", c->name);
    int fd = open(path, O_CREAT | O_EXCL | O_RDWR, 0600);
    memset(bytes, files[i].value, files[i].bytes + 1);
    CHECK(fd >= 0 && write(fd, bytes, files[i].bytes) == (ssize_t)files[i].bytes);
    CHECK_STATUS(ms_exchange_shm(c->name, 0, 2, c->timeout, NULL, NULL, &x, &err), files[i].status,
                 err);
    CHECK_TEXT(err.msg, files[i].words);
    CHECK_INT(files_of(c->name), 1); // not ours to remove
    CHECK(unlink(path) == 0);
    close(fd);
    // Under our own name: refused, and left alone.
    snprintf(path, sizeof path, "/dev/shm/moeshard-%s-0", c->name);
    fd = open(path, O_CREAT | O_EXCL | O_RDWR, 0600);
    CHECK_STATUS(ms_exchange_shm(c->name, 0, 2, c->timeout, NULL, NULL, &x, &err), MS_ECOMM, err);
    CHECK_INT(files_of(c->name), 1);
    CHECK(unlink(path) == 0);
    close(fd);
    end(c);
  }
  free(bytes);
}

static void test_bad_arguments_are_named(void) {
  static const struct {
    const char *name;
    int32_t rank, R;
    double timeout;
    const char *words;
  } calls[] = {
      {"", 0, 1, 1, "exchange name: got \"\""},
      {"a/b", 0, 1, 1, "exchange name: got \"a/b\""},
      {"..", 0, 1, 1, "exchange name"},
      {"a", 1, 1, 1, "rank: got 1, expected 0 to 0"},
      {"a", -1, 1, 1, "rank: got -1"},
      {"a", 0, 0, 1, "ranks: got 0, expected 1 to 1024"},
      {"a", 0, MS_MAX_RANKS + 1, 1, "ranks: got 1025"},
      {"a", 0, 1, 0, "timeout: got 0"},
      {"a", 0, 1, -1, "timeout: got -1"},
      {"a", 0, 1, NAN, "timeout: got nan"},
  };
  ms_error err;
  ms_exchange *x = NULL;
  for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
    CHECK_STATUS(ms_exchange_shm(calls[i].name, calls[i].rank, calls[i].R, calls[i].timeout, NULL,
                                 NULL, &x, &err),
                 MS_EINVAL, err);
    CHECK_TEXT(err.msg, calls[i].words);
    CHECK(x == NULL);
  }
  char name[202];
  memset(name, 'n', sizeof name);
  name[201] = 0;
  CHECK_STATUS(ms_exchange_shm(name, 0, 1, 1, NULL, NULL, &x, &err), MS_EINVAL, err);
  name[200] = 0;
  CHECK_OK(ms_exchange_shm(name, 0, 1, INFINITY, NULL, NULL, &x, NULL), err);
  ms_exchange_free(x);
}

static void limited(int32_t rank, common *c) {
  ms_exchange *x = NULL;
  ms_error err;
  struct rlimit small = {1 << 20, RLIM_INFINITY};
  CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
  CHECK_STATUS(ms_exchange_shm(c->name, rank, c->R, 1, NULL, NULL, &x, &err), MS_ECOMM, err);
  CHECK_TEXT(err.msg, "ulimit -f");
}

static void test_a_file_size_limit_is_named(void) {
  if (!use_threads) run_and_end(1, LONG, limited);
}

// ---- main ---------------------------------------------------------------------------------------

#define TEST(name) {#name, name}
static const struct {
  const char *name;
  void (*run)(void);
} tests[] = {
    TEST(test_one_rank_equals_a_plain_sum),
    TEST(test_shm_equals_a_plain_sum),
    TEST(test_the_second_call_takes_no_memory),
    TEST(test_halves_for_other_transports),
    TEST(test_halves_refuse_bad_arguments),
    TEST(test_header_check_names_field_ranks_and_values),
    TEST(test_digest_sees_every_slot),
    TEST(test_a_mismatch_is_the_same_error_on_all_ranks),
    TEST(test_a_refusal_reaches_all_ranks),
    TEST(test_wrong_order_fails_on_all_ranks_and_heals),
    TEST(test_no_room_is_an_error_and_heals),
    TEST(test_a_late_rank_is_named),
    TEST(test_late_ranks_at_combine_are_named),
    TEST(test_poll_ends_a_wait),
    TEST(test_a_rank_that_leaves_is_named),
    TEST(test_leaving_after_the_last_call_is_no_loss),
    TEST(test_leaving_after_a_failed_call_does_not_hide_the_failure),
    TEST(test_a_killed_rank_is_named_within_two_seconds),
    TEST(test_a_forked_child_changes_nothing),
    TEST(test_ranks_that_never_come_are_named),
    TEST(test_poll_ends_forming),
    TEST(test_another_number_of_ranks_is_a_mismatch),
    TEST(test_a_rank_number_used_twice_is_refused),
    TEST(test_foreign_files_are_refused),
    TEST(test_bad_arguments_are_named),
    TEST(test_a_file_size_limit_is_named),
};

int main(int argc, char **argv) {
  check_begin();
  use_threads = UNDER_TSAN || (argc > 1 && strcmp(argv[1], "threads") == 0);
  for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
    if (argc > 2 && !strstr(tests[i].name, argv[2])) continue;
    double start = seconds();
    tests[i].run();
    printf("%6.2f s  %s\n", seconds() - start, tests[i].name);
  }
  return check_end(use_threads ? "test_exchange threads" : "test_exchange processes");
}

// ---- one address for all ------------------------------------------------------------------------
// ThreadSanitizer knows addresses, not files: two mappings of one page would be strangers to it. So
// this program's mmap gives every thread that maps the same place of the same file the same
// address.

#ifdef __SANITIZE_THREAD__
enum { VIEWS = 256 };
static const size_t VIEW_BYTES = (size_t)1 << 28;

static pthread_mutex_t views_lock = PTHREAD_MUTEX_INITIALIZER;
static struct view {
  ino_t inode;
  off_t offset;
  char *at;
  size_t mapped;
  int users, fd;
} views[VIEWS];
static _Atomic bool views_used;

// The sanitizer's own mmap, which clears what it knows of the place.
static void *real_mmap(void *hint, size_t bytes, int protection, int flags, int fd, off_t offset) {
  void *(*function)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
  return function(hint, bytes, protection, flags, fd, offset);
}

static void extend_view(struct view *v, size_t bytes, int fd) {
  CHECK(bytes <= VIEW_BYTES);
  if (bytes <= v->mapped) return;
  void *at = real_mmap(v->at + v->mapped, bytes - v->mapped, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_FIXED, fd, v->offset + (off_t)v->mapped);
  CHECK(at == v->at + v->mapped);
  v->mapped = bytes;
}

static void *map_view(size_t bytes, int fd, off_t offset) {
  struct stat info;
  CHECK(fstat(fd, &info) == 0);
  pthread_mutex_lock(&views_lock);
  struct view *v = NULL, *unused = NULL;
  for (int i = 0; i < VIEWS && !v; i++) {
    if (views[i].users > 0 && views[i].inode == info.st_ino && views[i].offset == offset)
      v = &views[i];
    if (views[i].users == 0) unused = &views[i];
  }
  if (!v) {
    CHECK(unused != NULL);
    v = unused;
    *v = (struct view){.inode = info.st_ino, .offset = offset, .fd = dup(fd)};
    v->at = real_mmap(NULL, VIEW_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(v->at != MAP_FAILED);
  }
  v->users++;
  views_used = true;
  extend_view(v, bytes, fd);
  pthread_mutex_unlock(&views_lock);
  return v->at;
}

// The sanitizer itself comes here, before it is ready and when it reports: to the kernel with it.
__attribute__((no_sanitize_thread)) void *mmap(void *hint, size_t bytes, int protection, int flags,
                                               int fd, off_t offset) {
  if (fd < 0 || !(flags & MAP_SHARED))
    return (void *)syscall(SYS_mmap, hint, bytes, protection, flags, fd, offset);
  return map_view(bytes, fd, offset);
}

static struct view *view_at(const void *at) {
  for (int i = 0; i < VIEWS; i++)
    if (views[i].users > 0 && views[i].at == at) return &views[i];
  return NULL;
}

void *mremap(void *old, size_t old_bytes, size_t bytes, int flags, ...) {
  (void)old_bytes, (void)flags;
  pthread_mutex_lock(&views_lock);
  struct view *v = view_at(old);
  CHECK(v != NULL);
  extend_view(v, bytes, v->fd);
  pthread_mutex_unlock(&views_lock);
  return old;
}

static bool drop_view(const void *at) {
  pthread_mutex_lock(&views_lock);
  struct view *v = view_at(at);
  if (v && --v->users == 0) {
    syscall(SYS_munmap, v->at, VIEW_BYTES);
    close(v->fd);
  }
  pthread_mutex_unlock(&views_lock);
  return v != NULL;
}

__attribute__((no_sanitize_thread)) int munmap(void *at, size_t bytes) {
  if (views_used && drop_view(at)) return 0;
  return (int)syscall(SYS_munmap, at, bytes);
}
#endif
