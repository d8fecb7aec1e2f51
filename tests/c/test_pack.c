// test_pack.c - packing: every element of a panel where pack.h says, from sources of any strides and alignment, by any
// number of threads; and back.
// SPDX-License-Identifier: Apache-2.0
#include "../../csrc/kernels/pack.h"
#include "check.h"
#include "moeshard.h"

static const ms_dtype dtypes[] = {MS_F32, MS_BF16, MS_F16};
static const int64_t depths[] = {1, 2, 15, 16, 17, 31, 32, 33, 37, 64, 100};

static uint32_t next_random(void) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

// A source of random bits, NaNs too, in a buffer that ends with its last element: a read past it is found.
typedef struct source {
  char *memory;
  ms_matrix m;
} source;

static source make_source(ms_dtype dtype, int64_t rows, int64_t K, int64_t row_stride,
                          int64_t col_stride) {
  int64_t size = ms_dtype_size(dtype);
  int64_t elements = (rows - 1) * row_stride + (K - 1) * col_stride + 1;
  char *memory = malloc((size_t)((elements + 1) * size));
  // One element late: 16-byte alignment is not to be relied on.
  source s = {memory, {memory + size, dtype, rows, K, row_stride, col_stride}};
  for (int64_t i = 0; i < (elements + 1) * size; i++) memory[i] = (char)next_random();
  return s;
}

static const char *element(const ms_matrix *m, int64_t row, int64_t k) {
  return (const char *)m->data +
         (row * m->row_stride + k * m->col_stride) * ms_dtype_size(m->dtype);
}

// Where pack.h says (k, j) is, in elements.
static int64_t place_in_panel(ms_dtype storage, int64_t k, int64_t j) {
  return storage == MS_BF16 ? k / 2 * 32 + j * 2 + k % 2 : k * 16 + j;
}

static void check_panel(const ms_matrix *m, int64_t row, int32_t columns, int64_t K) {
  int64_t size = ms_dtype_size(m->dtype), bytes = ms_panel_bytes(m->dtype, K);
  char *panel = malloc((size_t)bytes), *wanted = calloc(1, (size_t)bytes);
  memset(panel, 0x5a, (size_t)bytes);
  // The bytes after the last row of the panel, which round it up to cache lines, are nobody's.
  int64_t used = (m->dtype == MS_BF16 ? (K + 1) / 2 * 2 : K) * 16 * size;
  for (int64_t k = 0; k < K; k++)
    for (int64_t j = 0; j < columns; j++)
      memcpy(wanted + place_in_panel(m->dtype, k, j) * size, element(m, row + j, k), (size_t)size);
  ms_panel_pack(m, row, columns, K, m->dtype, NULL, panel);
  CHECK_THAT(memcmp(panel, wanted, (size_t)used) == 0,
             "%s, %d columns from %lld, K=%lld, strides %lld %lld: a wrong panel",
             ms_dtype_name(m->dtype), columns, (long long)row, (long long)K,
             (long long)m->row_stride, (long long)m->col_stride);

  // Back into rows that are longer than K: what is between them stays.
  int64_t stride = K + 3;
  char *rows = malloc((size_t)(columns * stride * size));
  memset(rows, 0x5a, (size_t)(columns * stride * size));
  ms_panel_unpack(panel, NULL, columns, K, m->dtype, rows, stride);
  for (int64_t j = 0; j < columns; j++)
    for (int64_t k = 0; k < stride; k++) {
      const char *got = rows + (j * stride + k) * size;
      bool right = k < K ? memcmp(got, element(m, row + j, k), (size_t)size) == 0
                         : *got == 0x5a && got[size - 1] == 0x5a;
      CHECK_THAT(right, "%s, %d columns, K=%lld: row %lld, k=%lld comes back wrong",
                 ms_dtype_name(m->dtype), columns, (long long)K, (long long)j, (long long)k);
    }
  free(rows);
  free(panel);
  free(wanted);
}

static void bits_are_moved(ms_dtype dtype, int64_t K, int32_t columns) {
  int64_t rows = columns + 5;
  const int64_t strides[][2] = {{K, 1},        {K + 7, 1}, {1, rows},
                                {1, rows + 3}, {2 * K, 2}, {2, 2 * rows}};
  for (size_t i = 0; i < sizeof strides / sizeof *strides; i++) {
    source s = make_source(dtype, rows, K, strides[i][0], strides[i][1]);
    check_panel(&s.m, 0, columns, K);
    check_panel(&s.m, rows - columns, columns, K);
    free(s.memory);
  }
}

static void every_size_of_panel(void) {
  const int32_t columns[] = {1, 7, 15, 16};
  for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
    for (size_t i = 0; i < sizeof depths / sizeof *depths; i++)
      for (size_t j = 0; j < sizeof columns / sizeof *columns; j++)
        bits_are_moved(dtypes[d], depths[i], columns[j]);
}

// ---- whole experts --------------------------------------------------------------------------------

static ms_experts *packed_by(ms_threads *threads, const ms_experts_spec *spec, const source *w_in,
                             const source *w_out) {
  ms_error err;
  ms_experts *x;
  CHECK_OK(ms_experts_create(spec, &x, &err), err);
  CHECK_OK(
      ms_experts_pack(x, 0, 0, spec->F, &w_in->m, &w_out->m, NULL, NULL, MS_F32, threads, &err),
      err);
  return x;
}

static void check_whole(ms_threads *threads, const ms_experts_spec *spec, const ms_experts *x,
                        const source *w_in, const source *w_out) {
  ms_error err;
  int64_t D = spec->D, F = spec->F, size = ms_dtype_size(spec->storage);
  int64_t start = spec->columns[0], width = spec->columns[1] - start, halves = spec->gated ? 2 : 1;
  char *in = malloc((size_t)(halves * width * D * size));
  char *out = malloc((size_t)(width * D * size));
  CHECK_OK(ms_experts_unpack(x, 0, in, out, NULL, NULL, threads, &err), err);
  for (int64_t half = 0; half < halves; half++)
    for (int64_t f = 0; f < width; f++) {
      int64_t row = spec->interleaved ? 2 * (start + f) + half : half * F + start + f;
      for (int64_t d = 0; d < D; d++)
        CHECK(memcmp(in + ((half * width + f) * D + d) * size, element(&w_in->m, row, d),
                     (size_t)size) == 0);
    }
  for (int64_t d = 0; d < D; d++)
    for (int64_t f = 0; f < width; f++)
      CHECK(memcmp(out + (d * width + f) * size, element(&w_out->m, d, start + f), (size_t)size) ==
            0);
  // One of the two alone; the other must not be missed.
  memset(out, 0, (size_t)(width * D * size));
  CHECK_OK(ms_experts_unpack(x, 0, NULL, out, NULL, NULL, threads, &err), err);
  CHECK(memcmp(out + (width * D - 1) * size, element(&w_out->m, D - 1, start + width - 1),
               (size_t)size) == 0);
  free(in);
  free(out);
}

static void experts_come_back(ms_dtype dtype, bool gated, bool interleaved, bool transposed,
                              ms_threads *threads) {
  enum { D = 53, F = 75 };
  const int64_t columns[2] = {13, 62};
  ms_experts_spec spec = {.E = 1,
                          .D = D,
                          .F = F,
                          .storage = dtype,
                          .activation = MS_SILU,
                          .gated = gated,
                          .interleaved = interleaved,
                          .columns = columns};
  int64_t rows = gated ? 2 * F : F;
  source w_in = make_source(dtype, rows, D, transposed ? 1 : D, transposed ? rows : 1);
  source w_out = make_source(dtype, D, F, transposed ? 1 : F, transposed ? D : 1);
  ms_experts *x = packed_by(threads, &spec, &w_in, &w_out);
  check_whole(threads, &spec, x, &w_in, &w_out);
  check_whole(NULL, &spec, x, &w_in, &w_out);
  ms_experts_free(x);
  free(w_in.memory);
  free(w_out.memory);
}

static void any_number_of_threads(void) {
  for (int32_t count = 1; count <= 4; count++) {
    ms_error err;
    ms_threads *threads;
    CHECK_OK(ms_threads_create(count, &threads, &err), err);
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
      for (int shape = 0; shape < 6; shape++)
        experts_come_back(dtypes[d], shape / 2 > 0, shape / 2 > 1, shape % 2, threads);
    ms_threads_free(threads);
  }
}

int main(void) {
  check_begin();
  every_size_of_panel();
  any_number_of_threads();
  return check_end("test_pack");
}
