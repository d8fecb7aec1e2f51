// experts.c - this rank's columns of every expert on the device.
//
// Rows stay as nn.Linear has them, which is what the tensor cores' column operand wants; they are only padded to 16
// bytes, with zeros, so that kernels can read whole pieces. A source in host memory comes through a buffer on the
// device; conversion and transposition are done there.
//
// SPDX-License-Identifier: Apache-2.0
#include "experts_convert.h"
#include "moeshard_cuda.h"
#include "status.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN = 256, PIECE = 16 };

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static int64_t place(int64_t *at, int64_t bytes) {
  int64_t here = *at;
  *at += round_up(bytes, ALIGN);
  return here;
}

static int64_t width_of(const ms_cuda_experts *x, int32_t e) {
  return x->spec.columns[2 * e + 1] - x->spec.columns[2 * e];
}

// Where an expert's pieces are, from byte `at` of x->data on. The output bias has room on every rank; only the rank
// that holds column 0 shows it to the kernels.
static void place_expert(ms_cuda_experts *x, int32_t e, int64_t *at) {
  const ms_experts_spec *spec = &x->spec;
  int64_t size = ms_dtype_size(spec->storage), width = width_of(x, e), rows = spec->gated ? 2 * width : width;
  char *base = x->data;
  ms_cuda_expert *t = &x->table[e];
  t->width = (int32_t)width;
  t->ld_out = (int32_t)round_up(width, PIECE / size);
  t->w_in = base + place(at, rows * x->ld_in * size);
  t->w_out = base + place(at, spec->D * t->ld_out * size);
  t->b_in = spec->has_b_in ? (const float *)(base + place(at, rows * 4)) : NULL;
  int64_t b_out = spec->has_b_out ? place(at, spec->D * 4) : 0;
  bool shown = spec->has_b_out && spec->columns[2 * e] == 0 && width > 0;
  t->b_out = shown ? (const float *)(base + b_out) : NULL;
}

static ms_status check_spec(const ms_experts_spec *spec, ms_error *err) {
  if (spec->E < 1 || spec->E > MS_MAX_EXPERTS || spec->D < 1 || spec->F < 1 || spec->D > INT32_MAX / 64 ||
      spec->F > INT32_MAX / 64)
    return ms_fail(err, MS_EINVAL, "num_experts=%d, d_model=%lld, d_ff=%lld: expected 1 to %d, 1 to 2^25, 1 to 2^25",
                   spec->E, (long long)spec->D, (long long)spec->F, MS_MAX_EXPERTS);
  if (spec->storage != MS_F32 && spec->storage != MS_BF16 && spec->storage != MS_F16)
    return ms_fail(err, MS_EDTYPE, "dtype: got %s, expected float32, bfloat16 or float16",
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
      return ms_fail(err, MS_EINVAL, "columns[%d]: got [%lld, %lld), expected a range in [0, %lld)", e,
                     (long long)c[0], (long long)c[1], (long long)spec->F);
  }
  return MS_OK;
}

static ms_status fill(ms_cuda_experts *x, ms_error *err) {
  int64_t bytes = 0, table_bytes = x->spec.E * (int64_t)sizeof *x->table;
  for (int32_t e = 0; e < x->spec.E; e++) place_expert(x, e, &bytes);
  int64_t table_at = place(&bytes, table_bytes),
          seen_at = place(&bytes, (x->spec.E + (int64_t)1) * (int64_t)sizeof *x->seen);
  MS_CUDA(cudaMalloc(&x->data, (size_t)bytes), err);
  x->bytes = bytes;
  MS_CUDA(cudaMemset(x->data, 0, (size_t)bytes), err);
  int64_t at = 0;
  for (int32_t e = 0; e < x->spec.E; e++) place_expert(x, e, &at);
  x->device_table = (const ms_cuda_expert *)((char *)x->data + table_at);
  x->seen = (unsigned long long *)((char *)x->data + seen_at);
  MS_CUDA(cudaMemcpy((char *)x->data + table_at, x->table, (size_t)table_bytes, cudaMemcpyHostToDevice), err);
  MS_CUDA(cudaDeviceSynchronize(), err); // other streams do not wait for the legacy default stream
  return MS_OK;
}

ms_status ms_cuda_experts_create(const ms_experts_spec *spec, int32_t device, ms_cuda_experts **out, ms_error *err) {
  *out = NULL;
  MS_TRY(check_spec(spec, err));
  size_t E = (size_t)spec->E;
  ms_cuda_experts *x = calloc(1, sizeof *x);
  int64_t *columns = malloc(2 * E * sizeof *columns);
  ms_cuda_expert *table = calloc(E, sizeof *table);
  ms_status status = MS_OK;
  if (!x || !columns || !table) {
    status = ms_fail(err, MS_ENOMEM, "no memory for %d experts", spec->E);
    free(x);
    free(columns);
    free(table);
    return status;
  }
  memcpy(columns, spec->columns, 2 * E * sizeof *columns);
  *x = (ms_cuda_experts){.spec = *spec, .device = device, .table = table};
  x->spec.columns = columns;
  for (int32_t e = 0; e < spec->E; e++)
    if (width_of(x, e) > x->max_width) x->max_width = width_of(x, e);
  int64_t piece = PIECE / ms_dtype_size(spec->storage);
  x->ld_in = round_up(spec->D, piece);
  x->ld_h = round_up(x->max_width, piece);
  int before;
  if ((status = ms_cuda_enter(device, &before, err)) == MS_OK) {
    status = fill(x, err);
    ms_cuda_leave(before);
  }
  if (status == MS_OK)
    *out = x;
  else
    ms_cuda_experts_free(x);
  return status;
}

void ms_cuda_experts_free(ms_cuda_experts *x) {
  if (!x) return;
  int before;
  if (x->data && ms_cuda_enter(x->device, &before, NULL) == MS_OK) {
    cudaFree(x->data); // waits for the device
    ms_cuda_leave(before);
  }
  free((int64_t *)x->spec.columns);
  free(x->table);
  free(x);
}

// ---- in ---------------------------------------------------------------------------------------------------------

static bool on_device(const void *pointer) {
  struct cudaPointerAttributes where;
  if (cudaPointerGetAttributes(&where, pointer) != cudaSuccess) {
    cudaGetLastError(); // forget it: older runtimes call memory unknown to them an error
    return false;
  }
  return where.type == cudaMemoryTypeDevice || where.type == cudaMemoryTypeManaged;
}

static ms_matrix part_of(const ms_matrix *m, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  ms_matrix part = *m;
  part.data = (const char *)m->data + (row * m->row_stride + col * m->col_stride) * ms_dtype_size(m->dtype);
  part.rows = rows;
  part.cols = cols;
  return part;
}

// A copy of host memory on the device, its rows (or columns) close together. The caller frees *copy.
static ms_status to_device(ms_matrix *m, void **copy, cudaStream_t stream, ms_error *err) {
  bool by_column = m->col_stride != 1 && m->cols > 1;
  int64_t lines = by_column ? m->cols : m->rows, length = by_column ? m->rows : m->cols;
  int64_t stride = by_column ? m->col_stride : m->row_stride, within = by_column ? m->row_stride : m->col_stride;
  if (length > 1 && within != 1)
    return ms_fail(err, MS_EINVAL, "weights in host memory: strides [%lld, %lld], expected 1 along one dimension",
                   (long long)m->row_stride, (long long)m->col_stride);
  size_t size = (size_t)ms_dtype_size(m->dtype), bytes = (size_t)length * size;
  MS_CUDA(cudaMalloc(copy, bytes * (size_t)lines), err);
  if (lines == 1 || stride == length) // one piece; also where a stride is not a legal pitch
    MS_CUDA(cudaMemcpyAsync(*copy, m->data, bytes * (size_t)lines, cudaMemcpyHostToDevice, stream), err);
  else if (stride > length)
    MS_CUDA(cudaMemcpy2DAsync(*copy, bytes, m->data, (size_t)stride * size, bytes, (size_t)lines,
                              cudaMemcpyHostToDevice, stream),
            err);
  else
    return ms_fail(err, MS_EINVAL, "weights in host memory: rows overlap (stride %lld for %lld elements)",
                   (long long)stride, (long long)length);
  m->data = *copy;
  m->row_stride = by_column ? 1 : length;
  m->col_stride = by_column ? length : 1;
  return MS_OK;
}

static ms_status move_in(ms_matrix m, const void *to, ms_dtype dtype, int64_t ld, cudaStream_t stream, ms_error *err) {
  if (m.rows == 0 || m.cols == 0) return MS_OK;
  void *copy = NULL;
  ms_status status = MS_OK;
  if (!on_device(m.data)) status = to_device(&m, &copy, stream, err);
  if (status == MS_OK) status = ms_cuda_convert(&m, (void *)(uintptr_t)to, dtype, ld, stream, err);
  // also when something failed: the source must not be read after this returns
  cudaError_t waited = cudaStreamSynchronize(stream);
  if (status == MS_OK) status = ms_cuda_status(waited, "cudaStreamSynchronize", err);
  cudaFree(copy);
  return status;
}

// Rows that alternate: the even ones (gate) to `to`, the odd ones (up) `step` elements behind.
static ms_status move_in_alternating(ms_matrix m, const void *to, int64_t step, ms_dtype dtype, int64_t ld,
                                     cudaStream_t stream, ms_error *err) {
  void *copy = NULL;
  ms_status status = MS_OK;
  if (!on_device(m.data)) status = to_device(&m, &copy, stream, err);
  for (int64_t half = 0; half < 2 && status == MS_OK; half++) {
    ms_matrix rows = part_of(&m, half, m.rows / 2, 0, m.cols);
    rows.row_stride *= 2;
    status = ms_cuda_convert(&rows, (char *)(uintptr_t)to + half * step * ms_dtype_size(dtype), dtype, ld, stream, err);
  }
  cudaError_t waited = cudaStreamSynchronize(stream); // as in move_in
  if (status == MS_OK) status = ms_cuda_status(waited, "cudaStreamSynchronize", err);
  cudaFree(copy);
  return status;
}

static ms_status check_matrix(const char *name, const ms_matrix *m, int64_t rows, int64_t cols, ms_error *err) {
  if (m->rows == rows && m->cols == cols) return MS_OK;
  return ms_fail(err, MS_ESHAPE, "%s: got [%lld, %lld], expected [%lld, %lld]", name, (long long)m->rows,
                 (long long)m->cols, (long long)rows, (long long)cols);
}

static ms_status check_expert(const ms_cuda_experts *x, int32_t e, ms_error *err) {
  if (e >= 0 && e < x->spec.E) return MS_OK;
  return ms_fail(err, MS_EINVAL, "expert: got %d, expected 0 to %d", e, x->spec.E - 1);
}

static ms_status check_bias(const char *name, const void *bias, bool wanted, ms_error *err) {
  if ((bias != NULL) == wanted) return MS_OK;
  return ms_fail(err, MS_EINVAL,
                 wanted ? "%s: missing, these experts have one" : "%s: unexpected, these experts were made without one",
                 name);
}

// `skip`: columns that the sources hold before this rank's first.
static ms_status pack_on_device(const ms_cuda_experts *x, int32_t e, int64_t skip, int64_t count, const ms_matrix *w_in,
                                const ms_matrix *w_out, const void *b_in, const void *b_out, ms_dtype bias,
                                cudaStream_t stream, ms_error *err) {
  const ms_experts_spec *spec = &x->spec;
  const ms_cuda_expert *t = &x->table[e];
  int64_t size = ms_dtype_size(spec->storage), width = t->width, halves = spec->gated ? 2 : 1;
  if (spec->interleaved) {
    MS_TRY(move_in_alternating(part_of(w_in, 2 * skip, 2 * width, 0, spec->D), t->w_in, width * x->ld_in, spec->storage,
                               x->ld_in, stream, err));
    ms_matrix whole = {.data = b_in, .dtype = bias, .rows = 2 * count, .cols = 1, .row_stride = 1, .col_stride = 1};
    if (b_in)
      MS_TRY(move_in_alternating(part_of(&whole, 2 * skip, 2 * width, 0, 1), t->b_in, width, MS_F32, 1, stream, err));
  }
  for (int64_t half = 0; half < halves && !spec->interleaved; half++) { // gate rows, then up rows
    MS_TRY(move_in(part_of(w_in, half * count + skip, width, 0, spec->D),
                   (const char *)t->w_in + half * width * x->ld_in * size, spec->storage, x->ld_in, stream, err));
    if (!b_in) continue;
    ms_matrix whole = {.data = b_in, .dtype = bias, .rows = 1, .cols = halves * count, .row_stride = halves * count,
                       .col_stride = 1};
    MS_TRY(move_in(part_of(&whole, 0, 1, half * count + skip, width), t->b_in + half * width, MS_F32, width, stream,
                   err));
  }
  MS_TRY(move_in(part_of(w_out, 0, spec->D, skip, width), t->w_out, spec->storage, t->ld_out, stream, err));
  if (!t->b_out) return MS_OK;
  ms_matrix row = {.data = b_out, .dtype = bias, .rows = 1, .cols = spec->D, .row_stride = spec->D, .col_stride = 1};
  return move_in(row, t->b_out, MS_F32, spec->D, stream, err);
}

ms_status ms_cuda_experts_pack(ms_cuda_experts *x, int32_t e, int64_t first, int64_t count, const ms_matrix *w_in,
                               const ms_matrix *w_out, const void *b_in, const void *b_out, ms_dtype bias,
                               void *stream, ms_error *err) {
  const ms_experts_spec *spec = &x->spec;
  MS_TRY(check_expert(x, e, err));
  int64_t start = spec->columns[2 * e], width = width_of(x, e), halves = spec->gated ? 2 : 1;
  if (width && (first < 0 || first > start || first + count < start + width))
    return ms_fail(err, MS_ESHAPE, "expert %d: sources hold columns [%lld, %lld), this rank needs [%lld, %lld)", e,
                   (long long)first, (long long)(first + count), (long long)start, (long long)(start + width));
  MS_TRY(check_matrix("w_in", w_in, halves * count, spec->D, err));
  MS_TRY(check_matrix("w_out", w_out, spec->D, count, err));
  MS_TRY(check_bias("b_in", b_in, spec->has_b_in, err));
  MS_TRY(check_bias("b_out", b_out, spec->has_b_out, err));
  if (!width) return MS_OK;
  int before;
  MS_TRY(ms_cuda_enter(x->device, &before, err));
  ms_status status = pack_on_device(x, e, start - first, count, w_in, w_out, b_in, b_out, bias, stream, err);
  ms_cuda_leave(before);
  return status;
}

// ---- out --------------------------------------------------------------------------------------------------------

static ms_status move_out(const void *from, int64_t ld, void *to, int64_t rows, int64_t cols, int64_t size,
                          cudaStream_t stream, ms_error *err) {
  if (!to || rows == 0 || cols == 0) return MS_OK;
  MS_CUDA(cudaMemcpy2DAsync(to, (size_t)(cols * size), from, (size_t)(ld * size), (size_t)(cols * size), (size_t)rows,
                            cudaMemcpyDefault, stream),
          err);
  return MS_OK;
}

static ms_status unpack_on_device(const ms_cuda_experts *x, int32_t e, void *w_in, void *w_out, float *b_in,
                                  float *b_out, cudaStream_t stream, ms_error *err) {
  const ms_experts_spec *spec = &x->spec;
  const ms_cuda_expert *t = &x->table[e];
  int64_t size = ms_dtype_size(spec->storage), width = t->width, rows = spec->gated ? 2 * width : width;
  MS_TRY(move_out(t->w_in, x->ld_in, w_in, rows, spec->D, size, stream, err));
  MS_TRY(move_out(t->w_out, t->ld_out, w_out, spec->D, width, size, stream, err));
  if (t->b_in) MS_TRY(move_out(t->b_in, rows, b_in, 1, rows, 4, stream, err));
  if (b_out && t->b_out) MS_TRY(move_out(t->b_out, spec->D, b_out, 1, spec->D, 4, stream, err));
  MS_CUDA(cudaStreamSynchronize(stream), err);
  if (!b_out || t->b_out) return MS_OK;
  if (!on_device(b_out)) {
    memset(b_out, 0, (size_t)spec->D * sizeof *b_out);
    return MS_OK;
  }
  MS_CUDA(cudaMemsetAsync(b_out, 0, (size_t)spec->D * sizeof *b_out, stream), err);
  MS_CUDA(cudaStreamSynchronize(stream), err);
  return MS_OK;
}

ms_status ms_cuda_experts_unpack(const ms_cuda_experts *x, int32_t e, void *w_in, void *w_out, float *b_in,
                                 float *b_out, void *stream, ms_error *err) {
  MS_TRY(check_expert(x, e, err));
  int before;
  MS_TRY(ms_cuda_enter(x->device, &before, err));
  ms_status status = unpack_on_device(x, e, w_in, w_out, b_in, b_out, stream, err);
  ms_cuda_leave(before);
  return status;
}

// ---- what came in -----------------------------------------------------------------------------------------------

static ms_status seen_on_device(const ms_cuda_experts *x, int64_t *seen, bool forget, ms_error *err) {
  size_t bytes = ((size_t)x->spec.E + 1) * sizeof *x->seen;
  MS_CUDA(cudaDeviceSynchronize(), err); // whatever the streams were
  if (seen) MS_CUDA(cudaMemcpy(seen, x->seen, bytes, cudaMemcpyDeviceToHost), err);
  if (!forget) return MS_OK;
  MS_CUDA(cudaMemset(x->seen, 0, bytes), err);
  MS_CUDA(cudaDeviceSynchronize(), err); // other streams do not wait for the legacy default stream
  return MS_OK;
}

ms_status ms_cuda_experts_seen(const ms_cuda_experts *x, int64_t *seen, bool forget, ms_error *err) {
  int before;
  MS_TRY(ms_cuda_enter(x->device, &before, err));
  ms_status status = seen_on_device(x, seen, forget, err);
  ms_cuda_leave(before);
  return status;
}
