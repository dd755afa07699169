// Armv8 Advanced SIMD, part of every aarch64 CPU.
#include <stddef.h>

#include "actsparse.h"
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace {
#include "isa_types.h"

struct Vec {
  static constexpr const char* name = "neon";
  static constexpr int lanes = 4;
  static constexpr bool compresses = false;
  using V = float32x4_t;

  static V zero() { return vdupq_n_f32(0.0f); }
  static V set1(float f) { return vdupq_n_f32(f); }
  static V load(const float* p) { return vld1q_f32(p); }
  static V load(const Bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  static V load(const F16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static constexpr bool pairs = true;
  static void load_pairs(const Bf16* p, V* even, V* odd) {
    const uint32x4_t raw = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(raw, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(raw, vdupq_n_u32(0xffff0000u)));
  }
  static void split(V a, V b, V* even, V* odd) {
    *even = vuzp1q_f32(a, b);
    *odd = vuzp2q_f32(a, b);
  }
  static void join(V even, V odd, V* a, V* b) {
    *a = vzip1q_f32(even, odd);
    *b = vzip2q_f32(even, odd);
  }
  template <typename T>
  static V load_tail(const T* p, int n) {
    T buffer[lanes] = {};
    __builtin_memcpy(buffer, p, size_t(n) * sizeof(T));
    return load(buffer);
  }
  static void store(float* p, V v) { vst1q_f32(p, v); }
  static void store_tail(float* p, V v, int n) {
    float buffer[lanes];
    store(buffer, v);
    __builtin_memcpy(p, buffer, size_t(n) * sizeof(float));
  }
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static float sum(V v) { return vaddvq_f32(v); }
  static uint16_t to_f16(float f) {
    const __fp16 h = __fp16(f);
    uint16_t u;
    __builtin_memcpy(&u, &h, 2);
    return u;
  }
};

#include "products.inl"
#include "rounding.inl"
#include "elements.inl"
}  // namespace

const IsaOps* const isa_neon = &table;
#else
const IsaOps* const isa_neon = nullptr;
#endif
