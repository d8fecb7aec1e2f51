// kernels.c - the inner loops, one source for every instruction set (-DMS_ISA=generic|avx2|avx512|avx512bf16).
//
//   acc[m][n] (+)= sum_k a[m][k] * b[k][n]        m < rows, n < 16 * panels, k0 <= k < k1, fp32 accumulation
//
// Operands: a by row pointers (tokens stay where they are, nothing is gathered); b in 16-wide panels (kernels.h),
// 64-byte aligned; acc [rows][64] fp32, 64-byte aligned, in the L1 or L2 cache between blocks of k.
//
// Tiles: rows x 16 x panels held in registers for the whole k loop. As many rows as fill the accumulators with one
// panel (AVX2: 6 x 16 = 12 of 16 registers) or four (AVX-512: 6 x 64 = 24 of 32; see tallest_tile for more rows); fewer
// rows take more panels, so that there are enough independent sums to cover the FMA latency and four streams of weights
// when few tokens are there. k is not unrolled and all indices into the tile are constants: else gcc 12 keeps the tile on the stack.
//
// Each output is, per block of k, one chain of FMAs in k order from zero, and the sum of the blocks in their order,
// whatever the tile: a token's bits do not depend on its neighbours. One chain over all of k would lose more: at
// K = 3072 the error of a layer was 2.1e-6 of its largest output, with blocks of 384 it is below 1e-6.
//
// Cost of a tile per k: rows x panels x 16 / VW FMAs, as many loads as panels x 16 / VW + rows.
// While a tile is computed, its share of what is read next is prefetched, one line of each panel in turn: one stream
// of weights gets 60 % of the memory bandwidth, four get all of it (docs/cpu.md). Few rows read four streams anyway.
//
// bf16 rows with bf16 panels go by pairs of k where the processor multiplies pairs (DOT): no widening, half the loads,
// nearly twice the flops. Such a sum is the same chain of pairs in every tile; the last pair of an odd K gets a zero.
//
// Needs nothing of K or of the row addresses. Slow twin: ms_reference_layer.
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"
#include "simd.h"

#ifndef MS_ISA
#error "compile with -DMS_ISA=generic, avx2, avx512 or avx512bf16"
#endif
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

enum {
  PV = MS_PANEL / VW,                     // vectors in a panel row
  ACC_STRIDE = MS_TILE_PANELS * MS_PANEL, // floats
  FLAT_ROWS = 6,                          // of a tile of four panels (AVX2: one)
  TALL_ROWS = 10,                         // of two
  MAX_ROWS = TALL_ROWS,
  PREFETCH_STEP =
      8, // k between bursts of prefetches: the share of one step fits the line-fill buffers
  LINE = 64
};

// Of the weights; DOT: bf16 weights for bf16 rows.
typedef enum storage { F32, BF16, F16, I8, DOT } storage;

// ---- prefetch -----------------------------------------------------------------------------------------------

typedef struct ahead {
  const char *base;
  int64_t stride, line, end,
      per_step; // line and end count over all panels: line i is in panel i % panels
  int64_t panels;
} ahead;

// The share of pass `i` of `n`, spread over `steps` steps.
INLINE ahead ahead_share(const ms_tile *t, int64_t i, int64_t n, int64_t steps) {
  ahead w = {0};
  if (!t->ahead) return w;
  int64_t lines = (t->ahead_bytes + LINE - 1) / LINE * t->ahead_panels;
  w.base = t->ahead;
  w.stride = t->ahead_stride;
  w.panels = t->ahead_panels;
  w.line = lines * i / n;
  w.end = lines * (i + 1) / n;
  w.per_step = (w.end - w.line + steps - 1) / steps;
  return w;
}

INLINE void ahead_step(ahead *w) {
  int64_t stop = w->line + w->per_step;
  if (stop > w->end) stop = w->end;
  for (; w->line < stop; w->line++)
    __builtin_prefetch(w->base + w->line % w->panels * w->stride + w->line / w->panels * LINE, 0,
                       3);
}

// ---- the tile -------------------------------------------------------------------------------------------------

#define UNROLL _Pragma("GCC unroll 32")

// Whether a tile's sums, weights and scratch stay in registers. The rule is what gcc 12 was seen to manage: with 12 of
// 16 registers (24 of 32) full of sums, fp32 weights can be memory operands; widened ones and bf16's mask cannot.
INLINE bool fits(const storage s, const int rows, const int panels) {
  int sums = rows * panels * PV, weights = rows > 1 ? panels * PV : 1;
  if (sums > REGISTERS * 3 / 4) return false;
  return s == F32 || sums + weights + (s == BF16 ? 3 : 1) <= REGISTERS;
}

// VW columns of a panel row; `odd` picks the second row of a bf16 pair.
INLINE vf load_weights(const storage s, const bool odd, const char *at, int v) {
  if (s == F32) return v_load((const float *)at + v * VW);
  if (s == F16) return v_load_f16((const uint16_t *)at + v * VW);
  if (s == I8) return v_load_int8((const int8_t *)at + v * VW);
  vu pairs = v_load_words((const uint32_t *)at + v * VW);
  return odd ? v_high_bf16(pairs) : v_low_bf16(pairs);
}

// c += a[.][k] * panel row k, for one k. `b` points at row k (bf16: at the pair of rows that holds k).
// All weights first, then row by row: AVX2 has registers for 12 sums, 2 weights and 1 broadcast, no more.
INLINE void tile_k(const storage s, const int rows, const int panels, const bool odd,
                   vf c[MAX_ROWS][4 * PV], const void *const *a, int64_t k, const char *b,
                   int64_t b_stride) {
  vf w[4 * PV];
  UNROLL for (int p = 0; p < panels; p++) {
    UNROLL for (int v = 0; v < PV; v++) w[p * PV + v] = load_weights(s, odd, b + p * b_stride, v);
  }
  UNROLL for (int m = 0; m < rows; m++) {
    UNROLL for (int v = 0; v < panels * PV; v++) c[m][v] += ((const float *)a[m])[k] * w[v];
  }
}

#if defined(__AVX512BF16__)
// The same for rows k and k + 1 at once; `last` of an odd K: a[.][k + 1] does not exist and counts as zero.
INLINE void tile_pair(const int rows, const int panels, const bool last, vf c[MAX_ROWS][4 * PV],
                      const void *const *a, int64_t k, const char *b, int64_t b_stride) {
  vu w[4 * PV];
  UNROLL for (int p = 0; p < panels; p++) {
    UNROLL for (int v = 0; v < PV; v++) {
      w[p * PV + v] = v_load_words(b + p * b_stride + v * VW * 4);
    }
  }
  UNROLL for (int m = 0; m < rows; m++) {
    uint32_t pair = 0;
    memcpy(&pair, (const uint16_t *)a[m] + k, last ? 2 : 4);
    UNROLL for (int v = 0; v < panels * PV; v++) c[m][v] =
        v_dot_bf16(c[m][v], v_set_words(pair), w[v]);
  }
}
#endif

// One step of the k loop: a row of the panels, or the two that bf16 interleaves. `last`: the one left of an odd K.
INLINE void tile_step(const storage s, const int rows, const int panels, const bool last,
                      vf c[MAX_ROWS][4 * PV], const void *const *a, int64_t k, const char *b,
                      int64_t b_stride) {
#if defined(__AVX512BF16__)
  if (s == DOT) {
    tile_pair(rows, panels, last, c, a, k, b, b_stride);
    return;
  }
#endif
  tile_k(s, rows, panels, false, c, a, k, b, b_stride);
  if (s == BF16 && !last) tile_k(s, rows, panels, true, c, a, k + 1, b, b_stride);
}

INLINE void tile_block(const storage s, const int rows, const int panels, const ms_tile *t,
                       const void *const *a, const char *b, float *acc, ahead w) {
  // bytes of one row of k; bf16 rows come in pairs
  const int64_t row_bytes = MS_PANEL * (s == F32 ? 4 : s == I8 ? 1 : 2);
  const int64_t b_stride = t->b_stride;
  const int step = s == BF16 || s == DOT ? 2 : 1;
  vf c[MAX_ROWS][4 * PV];
  UNROLL for (int m = 0; m < rows; m++) {
    UNROLL for (int v = 0; v < panels * PV; v++) c[m][v] = (vf){0};
  }
  int64_t k = t->k0;
  while (k + step <= t->k1) {
    ahead_step(&w);
    int64_t stop = k + PREFETCH_STEP < t->k1 ? k + PREFETCH_STEP : t->k1;
    for (; k + step <= stop; k += step) {
      tile_step(s, rows, panels, false, c, a, k, b, b_stride);
      b += step * row_bytes;
    }
  }
  if (step == 2 && k < t->k1) tile_step(s, rows, panels, true, c, a, k, b, b_stride);
  UNROLL for (int m = 0; m < rows; m++) {
    UNROLL for (int v = 0; v < panels * PV; v++) {
      float *at = acc + m * ACC_STRIDE + v * VW;
      v_store(at, t->first ? c[m][v] : v_load(at) + c[m][v]);
    }
  }
}

// Every (rows, panels) that fits the registers is compiled on its own.
#define TILE_CASE(ROWS, PANELS)                                                                    \
  case ROWS * 8 + PANELS:                                                                          \
    if (fits(s, ROWS, PANELS)) tile_block(s, ROWS, PANELS, t, a, b, acc, w);                       \
    break;
#define TILE_CASES(ROWS) TILE_CASE(ROWS, 1) TILE_CASE(ROWS, 2) TILE_CASE(ROWS, 4)

INLINE void tile_any(const storage s, int rows, int panels, const ms_tile *t, const void *const *a,
                     const char *b, float *acc, ahead w) {
  switch (rows * 8 + panels) {
    TILE_CASES(1)
    TILE_CASES(2)
    TILE_CASES(3)
    TILE_CASES(4)
    TILE_CASES(5)
    TILE_CASES(6)
    TILE_CASES(7)
    TILE_CASES(8)
    TILE_CASES(9)
    TILE_CASES(10)
  }
}

INLINE int64_t tiles_of(int64_t rows, int most) { return (rows + most - 1) / most; }

// The tallest tile for so many rows. Each tile reads all the panels again, and while they still arrive from memory that
// is what a few rows wait for: 7 to 10 and 13 to 20 of them pass fewer times as tall tiles of half the panels (fp32, 15
// rows an expert: .73 of the roofline against .66). With more rows, or half the bytes, flat tiles are as good or better.
INLINE int tallest_tile(const storage s, int64_t rows) {
  if (s == F32 && fits(s, TALL_ROWS, 2) && rows <= 2 * TALL_ROWS &&
      tiles_of(rows, TALL_ROWS) < tiles_of(rows, FLAT_ROWS))
    return TALL_ROWS;
  int most = FLAT_ROWS;
  while (!fits(s, most, 1)) most--;
  return most;
}

INLINE void tile_run(const storage s, const ms_tile *t) {
  int64_t tiles = tiles_of(t->rows, tallest_tile(s, t->rows));
  int64_t tallest = (t->rows + tiles - 1) / tiles; // near-equal: 11 rows are 6 + 5, not 10 + 1
  int32_t wide = 4;
  while (wide > 1 && !fits(s, (int)tallest, wide)) wide /= 2;
  int64_t steps = t->k1 > t->k0 ? (t->k1 - t->k0 + PREFETCH_STEP - 1) / PREFETCH_STEP : 1;
  int64_t passes = tiles * ((t->panels + wide - 1) / wide), pass = 0;
  // All panels in one pass: four streams and nothing but loads to wait for, which the core's own prefetchers and
  // its reorder buffer serve better (.91 to .97 of the bandwidth against .80 with ours, docs/cpu.md).
  bool alone = passes == 1;
  for (int32_t p = 0; p < t->panels; pass += tiles) {
    int32_t panels = wide;
    while (panels > t->panels - p) panels /= 2;
    for (int64_t i = 0; i < tiles; i++) {
      int64_t row = t->rows * i / tiles, rows = t->rows * (i + 1) / tiles - row;
      ahead w = !alone && pass + i < passes ? ahead_share(t, pass + i, passes, steps) : (ahead){0};
      tile_any(s, (int)rows, panels, t, t->a + row, (const char *)t->b + p * t->b_stride,
               t->acc + row * ACC_STRIDE + p * MS_PANEL, w);
    }
    p += panels;
  }
}

static void tile_f32(const ms_tile *t) { tile_run(F32, t); }
static void tile_bf16(const ms_tile *t) { tile_run(BF16, t); }
static void tile_f16(const ms_tile *t) { tile_run(F16, t); }
static void tile_i8(const ms_tile *t) { tile_run(I8, t); }
#if defined(__AVX512BF16__)
static void tile_dot(const ms_tile *t) { tile_run(DOT, t); }
#endif

// ---- activations ------------------------------------------------------------------------------------------------

// e^x to 1 ulp or so: x = n ln2 + r, Taylor in r to the 7th power (|r| <= 0.347: remainder 5e-9). Saturates at
// e^88 and e^-87, so that 1/(1 + e^-x) stays finite and reaches 0 and 1.
INLINE vf v_exp(vf x) {
  x = v_select(x > 88.0f, v_set(88.0f), x);
  x = v_select(x < -87.0f, v_set(-87.0f), x);
  const float magic = 0x1.8p23f; // adding it rounds to an integer, left in the low bits
  vf shifted = x * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = x - n * 0x1.62e4p-1f;         // ln 2, upper 15 bits: n * this is exact
  r = r - n * 1.42860682030941723e-6f; // ln 2, the rest
  vf p = v_set(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi exponent = ((vi)shifted << 23) + (127 << 23);
  return p * (vf)exponent;
}

// x * Phi(x), through erfc(z) = e^(-z^2) t Q(t), t = 1 / (1 + z/2): minimax fit of Q over z in [0, 9.3], relative
// error 4e-8 (form: Abramowitz & Stegun 7.1.26; the coefficients are ours, docs/numerics.md).
INLINE vf v_gelu(vf x) {
  vf z = v_select(x < 0.0f, -x, x) * 0.70710678118654752f;
  vf t = 1.0f / (1.0f + 0.5f * z);
  vf q = v_set(-0.0588020285216139f);
  q = q * t + 0.28326607871067044f;
  q = q * t - 0.4844742475010638f;
  q = q * t + 0.2749285110288252f;
  q = q * t - 0.024447186930498854f;
  q = q * t + 0.20175704658000393f;
  q = q * t + 0.24334117652255183f;
  q = q * t + 0.28234228044489934f;
  q = q * t + 0.28208832781324356f;
  vf erfc = q * t * v_exp(-z * z);
  return 0.5f * x * v_select(x < 0.0f, erfc, 2.0f - erfc);
}

INLINE vf v_activate(const ms_activation activation, vf x) {
  switch (activation) {
  case MS_RELU:
    return v_select(x < 0.0f, (vf){0}, x); // NaN stays NaN
  case MS_GELU:
    return v_gelu(x);
  case MS_GELU_TANH: // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
    return x / (1.0f + v_exp(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  case MS_SILU:
    return x / (1.0f + v_exp(-x));
  default:
    return x;
  }
}

INLINE vf v_finished(const float *acc, const float *scale, const float *bias, int64_t n) {
  vf x = v_load(acc + n);
  if (scale) x *= v_load(scale + n);
  return bias ? x + v_load(bias + n) : x;
}

// out[i ..] = x in the dtype of the rows that `s` multiplies.
INLINE void store_row(const storage s, void *out, int64_t i, vf x) {
  if (s != DOT) v_store((float *)out + i, x);
#if defined(__AVX512BF16__)
  else
    v_store_bf16((uint16_t *)out + i, x);
#endif
}

INLINE void activate_all(const storage s, const ms_activation activation, bool gated,
                         const float *acc, const float *scale, const float *bias, int64_t rows,
                         int32_t panels, void *out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i++, acc += ACC_STRIDE) {
    if (!gated)
      for (int64_t n = 0; n < panels * MS_PANEL; n += VW)
        store_row(s, out, i * out_stride + n,
                  v_activate(activation, v_finished(acc, scale, bias, n)));
    else
      for (int64_t p = 0; p < panels; p += 2)
        for (int64_t v = 0; v < MS_PANEL; v += VW) {
          int64_t gate = p * MS_PANEL + v, up = gate + MS_PANEL;
          store_row(s, out, i * out_stride + p / 2 * MS_PANEL + v,
                    v_activate(activation, v_finished(acc, scale, bias, gate)) *
                        v_finished(acc, scale, bias, up));
        }
  }
}

INLINE void activate_for(const storage s, ms_activation activation, bool gated, const float *acc,
                         const float *scale, const float *bias, int64_t rows, int32_t panels,
                         void *out, int64_t out_stride) {
#define CASE(ACTIVATION)                                                                           \
  case ACTIVATION:                                                                                 \
    activate_all(s, ACTIVATION, gated, acc, scale, bias, rows, panels, out, out_stride);           \
    return;
  switch (activation) {
    CASE(MS_RELU)
    CASE(MS_GELU)
    CASE(MS_GELU_TANH)
    CASE(MS_SILU)
  default:
    activate_all(s, MS_IDENTITY, gated, acc, scale, bias, rows, panels, out, out_stride);
  }
#undef CASE
}

static void activate(ms_activation activation, bool gated, const float *acc, const float *scale,
                     const float *bias, int64_t rows, int32_t panels, void *out,
                     int64_t out_stride) {
  activate_for(F32, activation, gated, acc, scale, bias, rows, panels, out, out_stride);
}

#if defined(__AVX512BF16__)
static void activate_bf16(ms_activation activation, bool gated, const float *acc,
                          const float *scale, const float *bias, int64_t rows, int32_t panels,
                          void *out, int64_t out_stride) {
  activate_for(DOT, activation, gated, acc, scale, bias, rows, panels, out, out_stride);
}
#endif

static void scatter(const float *acc, const float *scale, const float *bias, const float *weight,
                    int64_t rows, int64_t columns, float *const *out) {
  for (int64_t i = 0; i < rows; i++, acc += ACC_STRIDE) {
    float *to = out[i];
    int64_t n = 0;
    for (; n + VW <= columns; n += VW) v_store(to + n, weight[i] * v_finished(acc, scale, bias, n));
    for (; n < columns; n++) {
      float x = scale ? acc[n] * scale[n] : acc[n];
      to[n] = weight[i] * (bias ? x + bias[n] : x);
    }
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// Plain loops over an unknown number of rows are not vectorised by gcc 12: 10 to 15 times slower.
static void sum(const float *const *x, int32_t count, float *out, int64_t n) {
  int64_t i = 0;
  for (; i + VW <= n; i += VW) {
    vf total = v_load(x[0] + i);
    for (int32_t j = 1; j < count; j++) total += v_load(x[j] + i);
    v_store(out + i, total);
  }
  for (; i < n; i++) {
    out[i] = x[0][i];
    for (int32_t j = 1; j < count; j++) out[i] += x[j][i];
  }
}

static void widen_bf16(const uint16_t *x, float *out, int64_t n) {
  uint32_t *bits = (uint32_t *)out;
  for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)x[i] << 16;
}

static void widen_f16(const uint16_t *x, float *out, int64_t n) {
  int64_t i = 0;
  for (; i + VW <= n; i += VW) v_store(out + i, v_load_f16(x + i));
  for (; i < n; i++) out[i] = widen_f16_bits(x[i]);
}

static void narrow_bf16(const float *x, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = narrow_bf16_bits(x[i]);
}

static void narrow_f16(const float *x, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = narrow_f16_bits(x[i]);
}

// ---- limits -------------------------------------------------------------------------------------------------------

// Enough independent sums to cover the latency, few enough to stay in registers. Not inlined: a copy inlined into a
// caller was once measured at half the rate.
enum { PEAK_SUMS = REGISTERS * 3 / 4 };

// Keeps the loop: the compiler must believe that the sums are used.
static volatile float peak_sink;

static __attribute__((noinline)) int64_t peak_fma(int64_t rounds) {
  vf c[PEAK_SUMS], a = v_set(0.5f), b = v_set(1.0f);
  UNROLL for (int i = 0; i < PEAK_SUMS; i++) c[i] = v_set((float)i);
  for (int64_t r = 0; r < rounds; r++) {
    UNROLL for (int i = 0; i < PEAK_SUMS; i++) c[i] = c[i] * a + b;
  }
  vf total = {0};
  UNROLL for (int i = 0; i < PEAK_SUMS; i++) total += c[i];
  peak_sink = total[0];
  return PEAK_SUMS * VW * 2;
}

#if defined(__AVX512BF16__)
static __attribute__((noinline)) int64_t peak_dot(int64_t rounds) {
  vf c[PEAK_SUMS];
  vu a = (vu)v_set(0.5f), b = (vu)v_set(1.0f);
  UNROLL for (int i = 0; i < PEAK_SUMS; i++) c[i] = v_set((float)i);
  for (int64_t r = 0; r < rounds; r++) {
    UNROLL for (int i = 0; i < PEAK_SUMS; i++) c[i] = v_dot_bf16(c[i], a, b);
  }
  vf total = {0};
  UNROLL for (int i = 0; i < PEAK_SUMS; i++) total += c[i];
  peak_sink = total[0];
  return PEAK_SUMS * VW * 4;
}
#endif

static void read_all(const void *data, int64_t bytes) {
  enum { STREAMS = MS_TILE_PANELS, AHEAD = 16 * LINE };
  const char *at = data;
  int64_t each = bytes / STREAMS;
  vf sum[STREAMS] = {{0}};
  for (int64_t i = 0; i < each; i += LINE) UNROLL for (int s = 0; s < STREAMS; s++) {
      const char *line = at + s * each + i;
      __builtin_prefetch(line + AHEAD, 0, 3); // a little past the end is harmless
      UNROLL for (int v = 0; v < LINE / 4; v += VW) sum[s] += v_load((const float *)line + v);
    }
  peak_sink = (sum[0] + sum[1] + sum[2] + sum[3])[0];
}

const ms_kernels PASTE(ms_kernels_, MS_ISA) = {
    .isa = TEXT(MS_ISA),
    .tile = {[MS_F32] = tile_f32, [MS_BF16] = tile_bf16, [MS_F16] = tile_f16, [MS_I8] = tile_i8},
    .activate = activate,
    .scatter = scatter,
    .sum = sum,
    .widen_bf16 = widen_bf16,
    .widen_f16 = widen_f16,
    .narrow_bf16 = narrow_bf16,
    .narrow_f16 = narrow_f16,
    .peak_fma = peak_fma,
    .read = read_all,
#if defined(__AVX512BF16__)
    .tile_dot = tile_dot,
    .activate_bf16 = activate_bf16,
    .peak_dot = peak_dot,
#endif
};
