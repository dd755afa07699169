// Portable C++: the fallback on any CPU and the second opinion in the tests.
#include <stddef.h>

#include "actsparse.h"
#include "isa.h"

namespace {
#include "isa_types.h"

struct Vec {
  static constexpr const char* name = "scalar";
  static constexpr int lanes = 4;
  static constexpr bool compresses = false;
  struct V {
    float f[lanes];
  };

  static float one(float v) { return v; }
  static float one(Bf16 v) {
    const uint32_t u = uint32_t(v.bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  static float one(F16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
    uint32_t u;
    if (magnitude >= 0x7c00u) {
      u = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
      u = sign | ((magnitude << 13) + (112u << 23));
    } else {  // subnormal: the magnitude counts multiples of 2^-24
      const float f = float(magnitude) * 5.9604644775390625e-8f;
      return sign ? -f : f;
    }
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }

  static constexpr bool pairs = false;
  static V zero() { return V{}; }
  static V set1(float f) {
    V v;
    for (float& lane : v.f) lane = f;
    return v;
  }
  template <typename T>
  static V load(const T* p) {
    V v;
    for (int i = 0; i < lanes; ++i) v.f[i] = one(p[i]);
    return v;
  }
  template <typename T>
  static V load_tail(const T* p, int n) {
    V v{};
    for (int i = 0; i < n; ++i) v.f[i] = one(p[i]);
    return v;
  }
  static void store(float* p, const V& v) {
    for (int i = 0; i < lanes; ++i) p[i] = v.f[i];
  }
  static void store_tail(float* p, const V& v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v.f[i];
  }
  static V fma(const V& a, const V& b, V c) {
    for (int i = 0; i < lanes; ++i) c.f[i] += a.f[i] * b.f[i];
    return c;
  }
  static V add(V a, const V& b) {
    for (int i = 0; i < lanes; ++i) a.f[i] += b.f[i];
    return a;
  }
  static float sum(const V& v) { return (v.f[0] + v.f[2]) + (v.f[1] + v.f[3]); }

  static uint16_t to_f16(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above rounds to infinity
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lines the last f16 bit up with the last float bit
      float half;
      __builtin_memcpy(&half, &magnitude, 4);
      half += 0.5f;
      uint32_t bits;
      __builtin_memcpy(&bits, &half, 4);
      return uint16_t(sign | (bits - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return uint16_t(sign | ((rounded - (112u << 23)) >> 13));
  }
};

#include "products.inl"
#include "rounding.inl"
#include "elements.inl"
}  // namespace

const IsaOps* const isa_scalar = &table;
