// experts_convert.cu - the launch of the conversion of weights.
// SPDX-License-Identifier: Apache-2.0
#include "experts_convert.cuh"
#include "experts_convert.h"
#include "status.h"

static const int64_t MOST_ROWS = 65535 * MS_SQUARE; // the y dimension of a grid

template <typename To, typename From>
static ms_status launch(const ms_matrix *m, void *to, int64_t ld, void *stream, ms_error *err) {
  for (int64_t row = 0; row < m->rows; row += MOST_ROWS) {
    int64_t rows = m->rows - row < MOST_ROWS ? m->rows - row : MOST_ROWS;
    dim3 grid((unsigned)((m->cols + MS_SQUARE - 1) / MS_SQUARE), (unsigned)((rows + MS_SQUARE - 1) / MS_SQUARE));
    ms_convert<To, From><<<grid, dim3(MS_SQUARE, MS_SQUARE_LINES), 0, (cudaStream_t)stream>>>(
        (const From *)m->data + row * m->row_stride, m->row_stride, m->col_stride, (To *)to + row * ld, ld, rows,
        m->cols);
    MS_TRY(ms_cuda_status(cudaGetLastError(), "experts: convert", err));
  }
  return MS_OK;
}

template <typename To>
static ms_status choose(const ms_matrix *m, void *to, int64_t ld, void *stream, ms_error *err) {
  if (m->dtype == MS_F32) return launch<To, float>(m, to, ld, stream, err);
  if (m->dtype == MS_BF16) return launch<To, __nv_bfloat16>(m, to, ld, stream, err);
  if (m->dtype == MS_F16) return launch<To, __half>(m, to, ld, stream, err);
  return ms_fail(err, MS_EDTYPE, "weights: got %s, expected float32, bfloat16 or float16", ms_dtype_name(m->dtype));
}

ms_status ms_cuda_convert(const ms_matrix *m, void *to, ms_dtype dtype, int64_t ld, void *stream, ms_error *err) {
  if (m->rows == 0 || m->cols == 0) return MS_OK;
  if (dtype == MS_F32) return choose<float>(m, to, ld, stream, err);
  if (dtype == MS_BF16) return choose<__nv_bfloat16>(m, to, ld, stream, err);
  if (dtype == MS_F16) return choose<__half>(m, to, ld, stream, err);
  return ms_fail(err, MS_EDTYPE, "dtype: got %s, expected float32, bfloat16 or float16", ms_dtype_name(dtype));
}
