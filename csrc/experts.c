// experts.c - this rank's columns of every expert, packed.
// SPDX-License-Identifier: Apache-2.0
#include "experts.h"
#include "base/memory.h"
#include "kernels/pack.h"
#include "kernels/simd.h"

#include <stdlib.h>

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Lay out one expert from byte `at` of x->data on; returns the byte after it. Pieces start on cache lines.
static int64_t place(const ms_experts *x, ms_slice *s, int64_t at) {
  const ms_experts_spec *spec = &x->spec;
  s->in_panels = (int32_t)((s->width + MS_PANEL - 1) / MS_PANEL) * (spec->gated ? 2 : 1);
  s->out_panels = (int32_t)((spec->D + MS_PANEL - 1) / MS_PANEL);
  s->w_in = x->data + at;
  at += s->in_panels * x->in_panel_bytes;
  s->w_out = x->data + at;
  at += s->out_panels * ms_panel_bytes(spec->storage, s->width);
  if (spec->storage == MS_I8) {
    s->scale_in = (const float *)(x->data + at);
    at += (int64_t)s->in_panels * MS_PANEL * (int64_t)sizeof(float);
    s->scale_out = (const float *)(x->data + at);
    at += (int64_t)s->out_panels * MS_PANEL * (int64_t)sizeof(float);
  }
  if (spec->has_b_in) {
    s->b_in = (const float *)(x->data + at);
    at += (int64_t)s->in_panels * MS_PANEL * (int64_t)sizeof(float);
  }
  if (spec->has_b_out && s->start == 0 && s->width > 0) {
    s->b_out = (const float *)(x->data + at);
    at += round_up(spec->D * (int64_t)sizeof(float), 64);
  }
  return at;
}

// Called with x->data NULL for the size, then again for the places. Returns the bytes of all experts.
static int64_t place_all(ms_experts *x) {
  int64_t at = 0;
  for (int32_t e = 0; e < x->spec.E; e++) at = place(x, &x->slices[e], at);
  return at;
}

static bool is_weight_dtype(ms_dtype dtype) {
  return dtype == MS_F32 || dtype == MS_BF16 || dtype == MS_F16;
}

static ms_status check_spec(const ms_experts_spec *spec, ms_error *err) {
  if (spec->E < 1 || spec->E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "num_experts: got %d, expected 1 to %d", spec->E,
                   MS_MAX_EXPERTS);
  if (spec->D < 1 || spec->F < 1)
    return ms_fail(err, MS_EINVAL, "d_model=%lld, d_ff=%lld: expected at least 1",
                   (long long)spec->D, (long long)spec->F);
  if (spec->D > INT32_MAX / 64 || spec->F > INT32_MAX / 64)
    return ms_fail(err, MS_EINVAL, "d_model=%lld, d_ff=%lld: expected less than 2^25",
                   (long long)spec->D, (long long)spec->F);
  if (!is_weight_dtype(spec->storage) && spec->storage != MS_I8)
    return ms_fail(err, MS_EDTYPE, "dtype: got %s, expected float32, bfloat16, float16 or int8",
                   ms_dtype_name(spec->storage));
  if ((unsigned)spec->activation >= MS_ACTIVATION_COUNT)
    return ms_fail(err, MS_EINVAL, "activation: got %d, expected 0 to %d", (int)spec->activation,
                   MS_ACTIVATION_COUNT - 1);
  if (spec->activation == MS_CLAMPED_SWIGLU && !spec->gated)
    return ms_fail(err, MS_EINVAL, "activation: clamped_swiglu is for gated experts");
  if (spec->interleaved && !spec->gated)
    return ms_fail(err, MS_EINVAL, "interleaved: it is for gated experts");
  for (int32_t e = 0; e < spec->E; e++) {
    const int64_t *c = spec->columns + 2 * e;
    if (c[0] < 0 || c[0] > c[1] || c[1] > spec->F)
      return ms_fail(err, MS_EINVAL, "columns[%d]: got [%lld, %lld), expected a range in [0, %lld)",
                     e, (long long)c[0], (long long)c[1], (long long)spec->F);
  }
  return MS_OK;
}

ms_status ms_experts_create(const ms_experts_spec *spec, ms_experts **out, ms_error *err) {
  *out = NULL;
  MS_TRY(check_spec(spec, err));
  size_t E = (size_t)spec->E;
  ms_experts *x = calloc(1, sizeof *x);
  ms_slice *slices = calloc(E, sizeof *slices);
  int64_t *columns = malloc(2 * E * sizeof *columns);
  ms_status status = MS_OK;
  if (!x || !slices || !columns) {
    status = ms_fail(err, MS_ENOMEM, "no memory for %d experts", spec->E);
    goto done;
  }
  memcpy(columns, spec->columns, 2 * E * sizeof *columns);
  *x = (ms_experts){.spec = *spec, .slices = slices, .columns = columns};
  x->spec.columns = columns;
  x->in_panel_bytes = ms_panel_bytes(spec->storage, spec->D);
  for (size_t e = 0; e < E; e++) {
    slices[e].start = columns[2 * e];
    slices[e].width = columns[2 * e + 1] - columns[2 * e];
  }
  x->bytes = place_all(x);
  status = ms_pages_alloc(x->bytes, "packed weights", (void **)&x->data, err);
  if (status == MS_OK) place_all(x);

done:
  if (status == MS_OK) {
    *out = x;
  } else {
    free(columns);
    free(slices);
    free(x);
  }
  return status;
}

void ms_experts_free(ms_experts *x) {
  if (!x) return;
  ms_pages_free(x->data, x->bytes);
  free(x->slices);
  free(x->columns);
  free(x);
}

const ms_experts_spec *ms_experts_get_spec(const ms_experts *x) { return &x->spec; }

int64_t ms_experts_bytes(const ms_experts *x) { return x->bytes; }

ms_dtype ms_experts_unpacked(const ms_experts *x) {
  return x->spec.storage == MS_I8 ? MS_F32 : x->spec.storage;
}

// ---- panels, the units of work of packing --------------------------------------------------------

// A panel of an expert: where it is, and which rows of which matrix it holds.
typedef struct panel_place {
  bool first;   // of the first matrix, else of the second
  int64_t half; // 0, or 1: up, of the first matrix of gated experts
  int64_t row;  // among those of this rank, of this half
  int32_t rows; // at most MS_PANEL: columns of the panel
  int64_t K;    // columns of the matrix, of this rank: rows of the panel
  char *data;
  float *scale; // NULL unless the storage is int8
} panel_place;

// Panel i of a slice: those of the first matrix (gated: gate and up in turn) come before those of the second.
static panel_place panel_at(const ms_experts *x, const ms_slice *s, int64_t i) {
  panel_place p = {.first = i < s->in_panels};
  int64_t halves = p.first && x->spec.gated ? 2 : 1, rows = p.first ? s->width : x->spec.D;
  if (!p.first) i -= s->in_panels;
  p.half = i % halves;
  p.row = i / halves * MS_PANEL;
  p.rows = (int32_t)(rows - p.row < MS_PANEL ? rows - p.row : MS_PANEL);
  p.K = p.first ? x->spec.D : s->width;
  p.data = (char *)(p.first ? s->w_in : s->w_out) + i * ms_panel_bytes(x->spec.storage, p.K);
  const float *scale = p.first ? s->scale_in : s->scale_out;
  if (scale) p.scale = (float *)scale + i * MS_PANEL;
  return p;
}

static int64_t panel_count(const ms_slice *s) {
  return s->width ? s->in_panels + s->out_panels : 0;
}

typedef struct packing {
  const ms_experts *x;
  const ms_slice *s;
  ms_matrix w_in[2], w_out; // gate and up (or all in the first), from this rank's first column on
} packing;

static void pack_panel(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  const packing *w = context;
  panel_place p = panel_at(w->x, w->s, unit);
  const ms_matrix *m = p.first ? &w->w_in[p.half] : &w->w_out;
  ms_panel_pack(m, p.row, p.rows, p.K, w->x->spec.storage, p.scale, p.data);
}

typedef struct unpacking {
  const ms_experts *x;
  const ms_slice *s;
  char *w_in, *w_out; // either may be NULL
} unpacking;

static void unpack_panel(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  const unpacking *w = context;
  panel_place p = panel_at(w->x, w->s, unit);
  char *to = p.first ? w->w_in : w->w_out;
  if (!to) return;
  int64_t row = p.half * w->s->width + p.row;
  int64_t size = ms_dtype_size(ms_experts_unpacked(w->x));
  ms_panel_unpack(p.data, p.scale, p.rows, p.K, w->x->spec.storage, to + row * p.K * size, p.K);
}

// A bias vector as a matrix of one column packs into rows of one panel each: [n] -> [n / 16][16].
static void pack_bias(const ms_matrix *bias, int64_t row, int64_t rows, float *to, int64_t step) {
  for (int64_t j = 0; j < rows; j += MS_PANEL, to += step) {
    int32_t columns = (int32_t)(rows - j < MS_PANEL ? rows - j : MS_PANEL);
    ms_panel_pack(bias, row + j, columns, 1, MS_F32, NULL, to);
  }
}

static ms_matrix bias_matrix(const void *bias, ms_dtype dtype) {
  return (ms_matrix){.data = bias, .dtype = dtype, .row_stride = 1, .col_stride = 1};
}

// The gate rows (half 0) or the up rows (1) of w_in or b_in, which hold `count` of each.
static ms_matrix half_of(const ms_experts *x, ms_matrix m, int64_t half, int64_t count) {
  int64_t first = x->spec.interleaved ? half : half * count;
  m.data = (const char *)m.data + first * m.row_stride * ms_dtype_size(m.dtype);
  if (x->spec.interleaved) m.row_stride *= 2;
  return m;
}

static ms_matrix from_element(ms_matrix m, int64_t row, int64_t col) {
  m.data =
      (const char *)m.data + (row * m.row_stride + col * m.col_stride) * ms_dtype_size(m.dtype);
  return m;
}

static ms_status check_matrix(const char *name, const ms_matrix *m, int64_t rows, int64_t cols,
                              ms_error *err) {
  if (m->rows != rows || m->cols != cols)
    return ms_fail(err, MS_ESHAPE, "%s: got [%lld, %lld], expected [%lld, %lld]", name,
                   (long long)m->rows, (long long)m->cols, (long long)rows, (long long)cols);
  if (!is_weight_dtype(m->dtype))
    return ms_fail(err, MS_EDTYPE, "%s: got %s, expected float32, bfloat16 or float16", name,
                   ms_dtype_name(m->dtype));
  return MS_OK;
}

static ms_status check_bias(const char *name, const void *bias, bool wanted, ms_error *err) {
  if ((bias != NULL) == wanted) return MS_OK;
  return ms_fail(err, MS_EINVAL,
                 wanted ? "%s: missing, these experts have one"
                        : "%s: unexpected, these experts were made without one",
                 name);
}

static ms_status check_expert(const ms_experts *x, int32_t e, ms_error *err) {
  if (e >= 0 && e < x->spec.E) return MS_OK;
  return ms_fail(err, MS_EINVAL, "expert: got %d, expected 0 to %d", e, x->spec.E - 1);
}

ms_status ms_experts_pack(ms_experts *x, int32_t e, int64_t first, int64_t count,
                          const ms_matrix *w_in, const ms_matrix *w_out, const void *b_in,
                          const void *b_out, ms_dtype bias, ms_threads *threads, ms_error *err) {
  const ms_experts_spec *spec = &x->spec;
  MS_TRY(check_expert(x, e, err));
  const ms_slice *s = &x->slices[e];
  int64_t halves = spec->gated ? 2 : 1;
  if (s->width && (first < 0 || first > s->start || first + count < s->start + s->width))
    return ms_fail(err, MS_ESHAPE,
                   "expert %d: sources hold columns [%lld, %lld), this rank needs [%lld, %lld)", e,
                   (long long)first, (long long)(first + count), (long long)s->start,
                   (long long)(s->start + s->width));
  MS_TRY(check_matrix("w_in", w_in, halves * count, spec->D, err));
  MS_TRY(check_matrix("w_out", w_out, spec->D, count, err));
  MS_TRY(check_bias("b_in", b_in, spec->has_b_in, err));
  MS_TRY(check_bias("b_out", b_out, spec->has_b_out, err));
  if (!is_weight_dtype(bias))
    return ms_fail(err, MS_EDTYPE, "bias: got %s, expected float32, bfloat16 or float16",
                   ms_dtype_name(bias));
  if (!s->width) return MS_OK;

  int64_t skip = s->start - first;
  packing w = {.x = x, .s = s, .w_out = from_element(*w_out, 0, skip)};
  for (int64_t half = 0; half < halves; half++) { // gate, up
    w.w_in[half] = from_element(half_of(x, *w_in, half, count), skip, 0);
    if (!s->b_in) continue;
    ms_matrix rows = half_of(x, bias_matrix(b_in, bias), half, count);
    pack_bias(&rows, skip, s->width, (float *)s->b_in + half * MS_PANEL, halves * MS_PANEL);
  }
  ms_threads_run(threads, panel_count(s), pack_panel, &w);
  if (s->b_out) {
    ms_matrix m = bias_matrix(b_out, bias);
    float panel[MS_PANEL];
    for (int64_t d = 0; d < spec->D; d += MS_PANEL) {
      int64_t n = spec->D - d < MS_PANEL ? spec->D - d : MS_PANEL;
      ms_panel_pack(&m, d, (int32_t)n, 1, MS_F32, NULL, panel);
      memcpy((float *)s->b_out + d, panel, (size_t)n * sizeof(float));
    }
  }
  return MS_OK;
}

ms_status ms_experts_unpack(const ms_experts *x, int32_t e, void *w_in, void *w_out, float *b_in,
                            float *b_out, ms_threads *threads, ms_error *err) {
  const ms_experts_spec *spec = &x->spec;
  MS_TRY(check_expert(x, e, err));
  const ms_slice *s = &x->slices[e];
  unpacking w = {.x = x, .s = s, .w_in = w_in, .w_out = w_out};
  if (w_in || w_out) ms_threads_run(threads, panel_count(s), unpack_panel, &w);
  int64_t halves = spec->gated ? 2 : 1;
  for (int64_t half = 0; half < halves && b_in && s->b_in; half++)
    for (int64_t j = 0; j < s->width; j++)
      b_in[half * s->width + j] = s->b_in[(j / MS_PANEL * halves + half) * MS_PANEL + j % MS_PANEL];
  if (b_out && s->b_out) memcpy(b_out, s->b_out, (size_t)spec->D * sizeof(float));
  return MS_OK;
}

ms_status ms_experts_release(ms_experts *x, int32_t e, ms_error *err) {
  MS_TRY(check_expert(x, e, err));
  const char *start = x->slices[e].w_in;
  const char *end = e + 1 < x->spec.E ? x->slices[e + 1].w_in : x->data + x->bytes;
  ms_pages_release((char *)start, end - start);
  return MS_OK;
}
