// SPDX-License-Identifier: Apache-2.0
// tensor_core.cpp - see tensor_core.h.
#include "tensor_core.h"
#include <algorithm>

namespace ptx {
double elementValue(Type t, uint64_t bits) {
  switch (t) {
    case T_F16: return h2f((uint16_t)bits);
    case T_BF16: return bf2f((uint16_t)bits);
    case T_TF32: return get<float>(tf32bits((uint32_t)bits));
    case T_S8: return (int8_t)bits;
    case T_U8: return (uint8_t)bits;
    case T_E4M3: return e4m32f((uint8_t)bits);
    case T_E5M2: return e5m22f((uint8_t)bits);
    case T_F64: return get<double>(bits);
    default: return 0;
  }
}
namespace {
int expOf(double x) {
  int e;
  std::frexp(x, &e);
  return e - 1;
}
// Published model of tensor-core sums: align all addends to the largest exponent, keep F fractional
// bits (truncation), add exactly, truncate to fp32.
float truncF32(double x) {
  float f = (float)x;
  if (std::isnan(f))
    return f;
  if (std::fabs((double)f) > std::fabs(x))
    f = std::nextafterf(f, 0.f);
  return f;
}
float alignedSum(const double* a, const double* b, int n, float c, int F) {
  bool special = !std::isfinite(c);
  int em = c != 0 ? expOf(c) : -100000;
  for (int i = 0; i < n; i++) {
    double p = a[i] * b[i];
    if (!std::isfinite(p))
      special = true;
    if (p != 0)
      em = std::max(em, expOf(a[i]) + expOf(b[i]));
  }
  if (special) {
    double s = c;
    for (int i = 0; i < n; i++)
      s += a[i] * b[i];
    return (float)s;
  }
  if (em == -100000) {
    return c;
  }
  em = std::max(em, -133);
  double q = std::ldexp(1.0, F - em), s = std::trunc((double)c * q);
  for (int i = 0; i < n; i++)
    s += std::trunc(a[i] * b[i] * q);
  return truncF32(s / q);
}
} // namespace
float dotProduct(const double* a, const double* b, int K, float c, Type t, int mode) {
  if (mode == 0 || t == T_S8 || t == T_U8) {
    double s = c;
    for (int k = 0; k < K; k++)
      s += a[k] * b[k];
    return (float)s;
  }
  int step = t == T_TF32 ? 4 : t == T_E4M3 || t == T_E5M2 ? 16 : 8, F = 24;
  if (mode == 2) {
    step *= 2;
    F = 25;
    if (t == T_E4M3 || t == T_E5M2)
      F = 13;
  }
  for (int k = 0; k < K; k += step)
    c = alignedSum(a + k, b + k, std::min(step, K - k), c, F);
  return c;
}
} // namespace ptx