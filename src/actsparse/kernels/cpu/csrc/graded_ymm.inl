// 256-bit registers, with the dot product instruction where the file is compiled for it.
struct Lanes {
  static constexpr int count = 2, fields_at_once = 2;
#if defined(__AVXVNNI__)
  static constexpr bool whole_bytes = true;
#else
  static constexpr bool whole_bytes = false;  // sums of two products of bytes have 16 bits
#endif
  using I = __m256i;
  static I zero() { return _mm256_setzero_si256(); }
  static I load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load_part(const uint8_t* p, int lanes) {
    return lanes == count ? load(p) : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I zip_low8(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
  static I zip_high8(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
  static I zip_low16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I zip_high16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
  static I mask(int byte) { return _mm256_set1_epi8(char(byte)); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I right2(I a) { return _mm256_srli_epi16(a, 2); }
  static I right4(I a) { return _mm256_srli_epi16(a, 4); }
  static I select(I m, I a, I b) { return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b)); }
  static void coefficients(const uint8_t* const* mantissa, const int32_t* multiplier, const int32_t* centre, int64_t groups,
                           int32_t* out, int32_t* centres) {
    coefficients_of(mantissa, multiplier, 0, false, centre, groups, out, centres);
  }
  static I dot(I sum, I codes, I coefficients) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, coefficients);
#else
    const I pairs = _mm256_maddubs_epi16(codes, coefficients);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  static I spread(const int32_t* p, int) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(p[0])), _mm_set1_epi32(p[1]), 1);
  }
  static I left2(I a) { return _mm256_slli_epi32(a, 2); }
  static I left(I a, int bits) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
  static I right4_signed(I a) { return _mm256_srai_epi32(a, 4); }  // of 32 bits
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I load_sums(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_sums(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};
