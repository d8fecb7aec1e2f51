// experts_convert.cuh - a strided matrix on the device into padded rows of another dtype; once per model.
//
//   to[r * ld + c] = from[r * row_stride + c * col_stride], rows x cols; what lies beyond cols is left as it is
//
// A block moves a 32 x 32 square through shared memory, so that rows as well as columns may be the ones that lie
// together in the source: both sides see whole 64-byte pieces. A 16-bit source of the same dtype moves bit for bit.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_EXPERTS_CONVERT_CUH
#define MS_EXPERTS_CONVERT_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

enum { MS_SQUARE = 32, MS_SQUARE_LINES = 8 };

__device__ __forceinline__ float ms_widen(float x) { return x; }
__device__ __forceinline__ float ms_widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float ms_widen(__half x) { return __half2float(x); }
template <typename To, typename From> struct ms_converted {
  static __device__ __forceinline__ To of(From x) { return (To)ms_widen(x); }
};
template <typename Same> struct ms_converted<Same, Same> {
  static __device__ __forceinline__ Same of(Same x) { return x; }
};

template <typename To, typename From>
__global__ void __launch_bounds__(MS_SQUARE *MS_SQUARE_LINES)
    ms_convert(const From *from, int64_t row_stride, int64_t col_stride, To *to, int64_t ld, int64_t rows,
               int64_t cols) {
  __shared__ To square[MS_SQUARE][MS_SQUARE + 2];
  int64_t r0 = (int64_t)blockIdx.y * MS_SQUARE, c0 = (int64_t)blockIdx.x * MS_SQUARE;
  bool by_column = row_stride == 1 && col_stride != 1; // neighbours in the source are rows
  for (int line = threadIdx.y; line < MS_SQUARE; line += MS_SQUARE_LINES) {
    int r = by_column ? (int)threadIdx.x : line, c = by_column ? line : (int)threadIdx.x;
    if (r0 + r < rows && c0 + c < cols)
      square[r][c] = ms_converted<To, From>::of(from[(r0 + r) * row_stride + (c0 + c) * col_stride]);
  }
  __syncthreads();
  for (int line = threadIdx.y; line < MS_SQUARE; line += MS_SQUARE_LINES) {
    int64_t r = r0 + line, c = c0 + threadIdx.x;
    if (r < rows && c < cols) to[r * ld + c] = square[line][threadIdx.x];
  }
}

#endif
