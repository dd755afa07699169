// AVX-512 F, BW, DQ, VL.
#include <stddef.h>

#include "actsparse.h"
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace {
#include "isa_types.h"

struct Vec {
  static constexpr const char* name = "avx512";
  static constexpr int lanes = 16;
  static constexpr bool compresses = true;
  using V = __m512;

  static __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }
  static V from_bf16(__m256i raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)); }

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float f) { return _mm512_set1_ps(f); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const Bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static constexpr bool pairs = true;
  static void load_pairs(const Bf16* p, V* even, V* odd) {
    const __m512i raw = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))));
  }
  static void split(V a, V b, V* even, V* odd) {
    const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(a, pick, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b);
  }
  static void join(V even, V odd, V* a, V* b) {
    const __m512i pick = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *a = _mm512_permutex2var_ps(even, pick, odd);
    *b = _mm512_permutex2var_ps(even, _mm512_add_epi32(pick, _mm512_set1_epi32(8)), odd);
  }
  static V load_tail(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static V load_tail(const Bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static V load_tail(const F16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store_tail(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static float sum(V v) { return _mm512_reduce_add_ps(v); }
  static uint16_t to_f16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }

  template <typename T>
  static int64_t keep(const T* v, const float* threshold, int64_t n, int32_t* idx, float* values) {
    const __m512i step = _mm512_set1_epi32(lanes);
    __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += lanes, position = _mm512_add_epi32(position, step)) {
      const __mmask16 valid = n - i < lanes ? first(int(n - i)) : __mmask16(0xffff);
      const __m512 value = n - i < lanes ? load_tail(v + i, int(n - i)) : load(v + i), magnitude = _mm512_abs_ps(value);
      const __mmask16 kept =
          _mm512_mask_cmp_ps_mask(valid, magnitude, _mm512_maskz_loadu_ps(valid, threshold + i), _CMP_NLT_UQ);
      // Compress in a register, then store whole: the compressing store is microcoded on Zen 4.
      _mm512_storeu_si512(idx + count, _mm512_maskz_compress_epi32(kept, position));
      if (values) _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(kept, value));
      count += __builtin_popcount(kept);
    }
    return count;
  }
};

#include "products.inl"
#include "rounding.inl"
#include "elements.inl"
}  // namespace

const IsaOps* const isa_avx512 = &table;
#else
const IsaOps* const isa_avx512 = nullptr;
#endif
