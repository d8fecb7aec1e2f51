// step4_ffn_epilogue.cuh - what happens to a sum before it is stored, alike in every ffn kernel.
//
//   up     h = act(s + b)          gated: act(s_gate + b_gate) * factor(s_up + b_up), rounded to 16 bits where H has 16
//   down   y = weight * (s + b)
//
// The activation is a template parameter: MS_FOR_ACTIVATION picks it once per tile, outside the loops over the
// fragment. Columns of H that no weight has, up to the next 16 bytes, are set to zero: their sums are 0 * x, which is
// NaN for an infinite x. NaN stays NaN. Divisions and exponentials are the fast ones (2 ulp and about 1e-7 * |x|
// relative): below the rounding of every storage type.
// Reference: activate() in csrc/reference.c.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP4_FFN_EPILOGUE_CUH
#define MS_STEP4_FFN_EPILOGUE_CUH

#include "moeshard_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <ms_activation ACTIVATION> __device__ __forceinline__ float ms_activate(float x) {
  if constexpr (ACTIVATION == MS_RELU)
    return x < 0.f ? 0.f : x; // not fmaxf, which drops NaN
  else if constexpr (ACTIVATION == MS_GELU)
    return 0.5f * x * (1.f + erff(x * 0.70710678f));
  else if constexpr (ACTIVATION == MS_GELU_TANH) // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
    return __fdividef(x, 1.f + __expf(-1.59576912f * x * (1.f + 0.044715f * x * x)));
  else if constexpr (ACTIVATION == MS_SILU)
    return __fdividef(x, 1.f + __expf(-x));
  else if constexpr (ACTIVATION == MS_CLAMPED_SWIGLU) {
    float gate = x > 7.f ? 7.f : x;
    return __fdividef(gate, 1.f + __expf(-1.702f * gate));
  } else
    return x;
}

// What the activated gate is multiplied by.
template <ms_activation ACTIVATION> __device__ __forceinline__ float ms_factor(float up) {
  if constexpr (ACTIVATION == MS_CLAMPED_SWIGLU)
    return (up > 7.f ? 7.f : up < -7.f ? -7.f : up) + 1.f;
  else
    return up;
}

// Two sums rounded to the storage type, `low` in the low half: the order of columns in memory.
template <typename Storage> __device__ __forceinline__ uint32_t ms_round2(float low, float high);
template <> __device__ __forceinline__ uint32_t ms_round2<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}
template <> __device__ __forceinline__ uint32_t ms_round2<__half>(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

// The rounded values of 4 columns in a row of out.
template <typename Storage>
__device__ __forceinline__ void ms_store_rounded4(Storage *to, const float (&y)[4], int32_t there, bool aligned) {
  if (aligned) {
    if constexpr (sizeof(Storage) == 4)
      *(float4 *)to = make_float4(y[0], y[1], y[2], y[3]);
    else
      *(uint2 *)to = make_uint2(ms_round2<Storage>(y[0], y[1]), ms_round2<Storage>(y[2], y[3]));
    return;
  }
#pragma unroll
  for (int c = 0; c < 4; c++)
    if (c < there) to[c] = (Storage)y[c];
}

// Run `statement` with the constant ACT = activation, the same for all threads; `gated` is a constant.
#define MS_FOR_ACTIVATION(activation, gated, statement)                                                                \
  switch (activation) {                                                                                                \
  case MS_RELU: {                                                                                                      \
    constexpr ms_activation ACT = MS_RELU;                                                                             \
    statement;                                                                                                         \
  } break;                                                                                                             \
  case MS_GELU: {                                                                                                      \
    constexpr ms_activation ACT = MS_GELU;                                                                             \
    statement;                                                                                                         \
  } break;                                                                                                             \
  case MS_GELU_TANH: {                                                                                                 \
    constexpr ms_activation ACT = MS_GELU_TANH;                                                                        \
    statement;                                                                                                         \
  } break;                                                                                                             \
  case MS_SILU: {                                                                                                      \
    constexpr ms_activation ACT = MS_SILU;                                                                             \
    statement;                                                                                                         \
  } break;                                                                                                             \
  case MS_CLAMPED_SWIGLU: {                                                                                            \
    constexpr ms_activation ACT = gated ? MS_CLAMPED_SWIGLU : MS_IDENTITY;                                             \
    if constexpr (gated) statement;                                                                                    \
  } break;                                                                                                             \
  default: {                                                                                                           \
    constexpr ms_activation ACT = MS_IDENTITY;                                                                         \
    statement;                                                                                                         \
  } break;                                                                                                             \
  }

#endif
