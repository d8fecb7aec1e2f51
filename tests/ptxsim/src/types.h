// SPDX-License-Identifier: Apache-2.0
// types.h - PTX scalar types and small-float conversions (f16, bf16, fp8, tf32).
// Register lanes are uint64_t holding the value zero-extended; get/put reinterpret the low bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace ptx {

enum Type : uint8_t {
  T_NONE,
  T_PRED,
  T_B8,
  T_B16,
  T_B32,
  T_B64,
  T_B128,
  T_U8,
  T_U16,
  T_U32,
  T_U64,
  T_S8,
  T_S16,
  T_S32,
  T_S64,
  T_F16,
  T_F16X2,
  T_BF16,
  T_BF16X2,
  T_F32,
  T_F64,
  T_TF32,
  T_E4M3,
  T_E5M2,
  T_E4M3X2,
  T_E5M2X2,
  T_F32X2,
  T_U16X2,
  T_S16X2
};

inline Type typeFromName(const std::string& s) {
  static const struct {
    const char* n;
    Type t;
  } tab[] = {{"pred", T_PRED},     {"b8", T_B8},         {"b16", T_B16},     {"b32", T_B32},
             {"b64", T_B64},       {"b128", T_B128},     {"u8", T_U8},       {"u16", T_U16},
             {"u32", T_U32},       {"u64", T_U64},       {"s8", T_S8},       {"s16", T_S16},
             {"s32", T_S32},       {"s64", T_S64},       {"f16", T_F16},     {"f16x2", T_F16X2},
             {"bf16", T_BF16},     {"bf16x2", T_BF16X2}, {"f32", T_F32},     {"f64", T_F64},
             {"tf32", T_TF32},     {"e4m3", T_E4M3},     {"e5m2", T_E5M2},   {"e4m3x2", T_E4M3X2},
             {"e5m2x2", T_E5M2X2}, {"f32x2", T_F32X2},   {"u16x2", T_U16X2}, {"s16x2", T_S16X2}};
  for (auto& e : tab)
    if (s == e.n)
      return e.t;
  return T_NONE;
}
inline int typeSize(Type t) {
  switch (t) {
    case T_PRED:
    case T_B8:
    case T_U8:
    case T_S8:
    case T_E4M3:
    case T_E5M2: return 1;
    case T_B16:
    case T_U16:
    case T_S16:
    case T_F16:
    case T_BF16:
    case T_E4M3X2:
    case T_E5M2X2: return 2;
    case T_B64:
    case T_U64:
    case T_S64:
    case T_F64:
    case T_F32X2: return 8;
    case T_B128: return 16;
    default: return 4;
  }
}
inline bool isSignedType(Type t) {
  return t == T_S8 || t == T_S16 || t == T_S32 || t == T_S64;
}
inline bool isFloatType(Type t) {
  return (t >= T_F16 && t <= T_TF32) || t == T_F32X2;
}
inline uint64_t sizeMask(int bytes) {
  return bytes >= 8 ? ~0ull : (1ull << (8 * bytes)) - 1;
}

template <class T> inline T get(uint64_t x) {
  T t;
  std::memcpy(&t, &x, sizeof t);
  return t;
}
template <class T> inline uint64_t put(T t) {
  uint64_t x = 0;
  std::memcpy(&x, &t, sizeof t);
  return x;
}

// Round a double to a binary float with `mb` mantissa bits and minimum normal exponent `emin`.
// mode: 'n' nearest even, 'z' toward zero, 'a' nearest away, 'p' up, 'm' down. Overflow is the
// caller's.
inline double roundTo(double x, int mb, int emin, char mode) {
  if (x == 0 || std::isnan(x) || std::isinf(x))
    return x;
  int e;
  std::frexp(x, &e);
  e -= 1;
  if (e < emin)
    e = emin;
  double q = std::ldexp(x, mb - e), r;
  switch (mode) {
    case 'z': r = std::trunc(q); break;
    case 'a': r = std::round(q); break;
    case 'p': r = std::ceil(q); break;
    case 'm': r = std::floor(q); break;
    default: r = std::nearbyint(q);
  }
  return std::ldexp(r, e - mb);
}
inline float bf2f(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t d2bf(double d, char mode = 'n') {
  if (std::isnan(d))
    return 0x7fff;
  double r = roundTo(d, 7, -126, mode);
  if (std::fabs(r) > 3.3895313892515355e38)
    r = (mode == 'z' && !std::isinf(d)) ? std::copysign(3.3895313892515355e38, d)
                                        : std::copysign(INFINITY, d);
  float f = (float)r;
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return (uint16_t)(u >> 16);
}
inline uint16_t f2bf(float f) { // fast nearest-even path
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000)
    return 0x7fff;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float h2f(uint16_t h) {
  uint32_t s = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, u;
  if (e == 31)
    u = s | 0x7f800000 | (m << 13);
  else if (e)
    u = s | ((e + 112) << 23) | (m << 13);
  else {
    float f = std::ldexp((float)m, -24);
    std::memcpy(&u, &f, 4);
    u |= s;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t d2h(double d, char mode = 'n') {
  uint16_t s = std::signbit(d) ? 0x8000 : 0;
  if (std::isnan(d))
    return 0x7fff;
  double r = std::fabs(roundTo(d, 10, -14, mode));
  if (r > 65504)
    return s | ((mode == 'z' && !std::isinf(d)) ? 0x7bff : 0x7c00);
  if (r < std::ldexp(1.0, -14))
    return s | (uint16_t)std::ldexp(r, 24);
  int e;
  double f = std::frexp(r, &e);
  return s | (uint16_t)(((e + 14) << 10) + (int)std::ldexp(f, 11) - 1024);
}
inline float tf32(float f, char mode = 'a') {
  return (float)roundTo(f, 10, -126, mode);
}
inline uint32_t tf32bits(uint32_t u) {
  return u & 0xffffe000u;
}
// fp8, saturate-to-finite as in cvt.rn.satfinite
inline uint8_t f2e4m3(float f) {
  if (std::isnan(f))
    return 0x7f;
  uint8_t s = std::signbit(f) ? 0x80 : 0;
  double r = std::fabs(roundTo(f, 3, -6, 'n'));
  if (r > 448)
    r = 448;
  if (r < std::ldexp(1.0, -6))
    return s | (uint8_t)std::ldexp(r, 9);
  int e;
  double m = std::frexp(r, &e);
  return s | (uint8_t)(((e + 6) << 3) + (int)std::ldexp(m, 4) - 8);
}
inline uint8_t f2e5m2(float f) {
  if (std::isnan(f))
    return 0x7f;
  uint8_t s = std::signbit(f) ? 0x80 : 0;
  double r = std::fabs(roundTo(f, 2, -14, 'n'));
  if (r > 57344)
    r = 57344;
  if (r < std::ldexp(1.0, -14))
    return s | (uint8_t)std::ldexp(r, 16);
  int e;
  double m = std::frexp(r, &e);
  return s | (uint8_t)(((e + 14) << 2) + (int)std::ldexp(m, 3) - 4);
}
inline float e4m32f(uint8_t b) {
  int e = (b >> 3) & 15, m = b & 7;
  float f;
  if (e == 15 && m == 7)
    f = NAN;
  else
    f = e ? std::ldexp(8.f + m, e - 10) : std::ldexp((float)m, -9);
  return b & 0x80 ? -f : f;
}
inline float e5m22f(uint8_t b) {
  return h2f((uint16_t)b << 8);
}
inline float ftz(float f) {
  return std::fabs(f) < 1.17549435e-38f ? std::copysign(0.f, f) : f;
}

} // namespace ptx
