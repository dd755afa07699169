// AVX2 with FMA and F16C.
#include <stddef.h>

#include "actsparse.h"
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace {
#include "isa_types.h"

struct Vec {
  static constexpr const char* name = "avx2";
  static constexpr int lanes = 8;
  static constexpr bool compresses = true;
  using V = __m256;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float f) { return _mm256_set1_ps(f); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const Bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static V load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static constexpr bool pairs = true;
  static void load_pairs(const Bf16* p, V* even, V* odd) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000u))));
  }
  static void split(V a, V b, V* even, V* odd) {
    const V low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    *even = _mm256_shuffle_ps(low, high, 0x88);
    *odd = _mm256_shuffle_ps(low, high, 0xdd);
  }
  static void join(V even, V odd, V* a, V* b) {
    const V low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    *a = _mm256_permute2f128_ps(low, high, 0x20);
    *b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  template <typename T>
  static V load_tail(const T* p, int n) {
    T buffer[lanes] = {};
    __builtin_memcpy(buffer, p, size_t(n) * sizeof(T));
    return load(buffer);
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_tail(float* p, V v, int n) {
    float buffer[lanes];
    store(buffer, v);
    __builtin_memcpy(p, buffer, size_t(n) * sizeof(float));
  }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static uint16_t to_f16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }

  template <typename T>
  static int64_t keep(const T* v, const float* threshold, int64_t n, int32_t* idx, float* values) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += lanes) {
      const bool whole = i + lanes <= n;
      const int rest = int(n - i);
      const __m256 value = whole ? load(v + i) : load_tail(v + i, rest);
      const __m256 at_least = whole ? load(threshold + i) : load_tail(threshold + i, rest);
      unsigned mask = unsigned(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, value), at_least, _CMP_NLT_UQ)));
      if (!whole) mask &= (1u << rest) - 1u;
      float lane[lanes];
      if (values) store(lane, value);
      for (; mask; mask &= mask - 1, ++count) {
        const int k = __builtin_ctz(mask);
        idx[count] = int32_t(i) + k;
        if (values) values[count] = lane[k];
      }
    }
    return count;
  }
};

#include "products.inl"
#include "rounding.inl"
#include "elements.inl"
}  // namespace

const IsaOps* const isa_avx2 = &table;
#else
const IsaOps* const isa_avx2 = nullptr;
#endif
