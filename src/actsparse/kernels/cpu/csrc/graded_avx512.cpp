// AVX-512 with VNNI.
#include <stddef.h>

#include "graded.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

namespace actsparse {
namespace {
#include "graded_plain.inl"

struct Lanes {
  static constexpr int count = 4, fields_at_once = 4;
  static constexpr bool whole_bytes = true;
  using I = __m512i;
  static __mmask16 dwords(int lanes) { return __mmask16((1u << (4 * lanes)) - 1u); }
  static I zero() { return _mm512_setzero_si512(); }
  static I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I load_part(const uint8_t* p, int lanes) { return _mm512_maskz_loadu_epi32(dwords(lanes), p); }
  static I zip_low8(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  static I zip_high8(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
  static I zip_low16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
  static I zip_high16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
  static I mask(int byte) { return _mm512_set1_epi8(char(byte)); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I right2(I a) { return _mm512_srli_epi16(a, 2); }
  static I right4(I a) { return _mm512_srli_epi16(a, 4); }
  static I select(I m, I a, I b) { return _mm512_ternarylogic_epi32(m, a, b, 0xca); }
  static __m128i sixteen(const uint8_t* mantissa, __mmask16 here, int32_t multiplier) {
    const __m256i m = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(here, mantissa));
    return _mm256_cvtepi16_epi8(_mm256_mulhrs_epi16(m, _mm256_set1_epi16(int16_t(multiplier))));
  }
  static void coefficients(const uint8_t* const* mantissa, const int32_t* multiplier, const int32_t* centre, int64_t groups,
                           int32_t* out, int32_t* centres) {
    const I weights = _mm512_set1_epi32(centre[0] | centre[1] << 8 | centre[2] << 16 | int32_t(uint32_t(centre[3]) << 24));
    for (int64_t g = 0; g < groups; g += 16) {
      const __mmask16 here = groups - g >= 16 ? __mmask16(0xffff) : __mmask16((1u << (groups - g)) - 1u);
      const __m128i a = sixteen(mantissa[0] + g, here, multiplier[0]), b = sixteen(mantissa[1] + g, here, multiplier[1]);
      const __m128i c = sixteen(mantissa[2] + g, here, multiplier[2]), d = sixteen(mantissa[3] + g, here, multiplier[3]);
      const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
      const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
      const __m256i low = _mm256_setr_m128i(_mm_unpacklo_epi16(ab0, cd0), _mm_unpackhi_epi16(ab0, cd0));
      const __m256i high = _mm256_setr_m128i(_mm_unpacklo_epi16(ab1, cd1), _mm_unpackhi_epi16(ab1, cd1));
      const I words = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      _mm512_mask_storeu_epi32(out + g, here, words);
      const I before = _mm512_maskz_loadu_epi32(here, centres + g);
      _mm512_mask_storeu_epi32(centres + g, here, _mm512_dpbusd_epi32(before, weights, words));
    }
  }
  static I dot(I sum, I codes, I coefficients) { return _mm512_dpbusd_epi32(sum, codes, coefficients); }
  static I spread(const int32_t* p, int) {
    const I to = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_epi32(to, _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static I left2(I a) { return _mm512_slli_epi32(a, 2); }
  static I left(I a, int bits) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
  static I right4_signed(I a) { return _mm512_srai_epi32(a, 4); }  // of 32 bits
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sums(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
};

#include "graded_vector.inl"

Grades grade(const as_packed& w, int64_t in, const float* x, int64_t first, int64_t count, float* coefficients) {
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  __m512 sum = _mm512_setzero_ps(), top = sum;
  uint64_t read[max_planes] = {};
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 here = count - c >= 16 ? __mmask16(0xffff) : __mmask16((1u << (count - c)) - 1u);
    __m512 v = _mm512_maskz_loadu_ps(here, x + c);
    if (w.center) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(here, w.center + first + c));
    const __m512 size = _mm512_and_ps(v, magnitude);
    const __m512i scale = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, w.scale + first + c));
    __m512 gain = _mm512_setzero_ps();
    __mmask16 kept = here;
    for (int p = 0; p < w.planes; ++p) {
      if (w.threshold)
        kept = _mm512_mask_cmp_ps_mask(kept, size, _mm512_maskz_loadu_ps(here, w.threshold + p * in + first + c), _CMP_NLT_UQ);
      read[p] |= uint64_t(kept) << c;
      gain = _mm512_mask_mov_ps(gain, kept, _mm512_set1_ps(w.gain[p]));
    }
    const __mmask16 any = __mmask16(read[0] >> c);
    const __m512 step = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(scale, 16)), gain);
    const __m512 a = _mm512_maskz_mul_ps(any, v, step), b = _mm512_and_ps(a, magnitude);
    _mm512_mask_storeu_ps(coefficients + c, here, a);
    sum = _mm512_add_ps(sum, b);
    top = _mm512_max_ps(b, top);
  }
  float sums[lanes], tops[lanes];
  _mm512_storeu_ps(sums, sum);
  _mm512_storeu_ps(tops, top);
  Grades g = joined(sums, tops);
  for (int p = 0; p < max_planes; ++p) g.read[p] = read[p];
  return g;
}

const GradedOps table = {"avx512vnni", grade, add, unpack_plain};
}  // namespace

const GradedOps* const graded_avx512 = &table;
}  // namespace actsparse
#else
namespace actsparse {
const GradedOps* const graded_avx512 = nullptr;
}
#endif
