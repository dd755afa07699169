// AVX-512 with products of bfloat16.
#include <stddef.h>

#include "many.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace actsparse {
namespace {

#include "graded_plain.inl"

constexpr int64_t pair_elements = 2 * panel_outputs, columns_ahead = 24;

// Codes of field k: bits 2k and 2k + 1 of each byte of `planes` planes, the first uppermost.
template <int planes, int k>
inline __attribute__((always_inline)) __m512i codes_of(const __m512i* plane) {
  __m512i c = _mm512_setzero_si512();
  for (int p = planes - 1; p >= 0; --p) {
    const int to = 2 * (planes - 1 - p), by = to - 2 * k;
    const __m512i v = by > 0 ? _mm512_slli_epi16(plane[p], unsigned(by)) : by < 0 ? _mm512_srli_epi16(plane[p], unsigned(-by)) : plane[p];
    const __m512i here = _mm512_set1_epi8(char(3 << to));
    c = p == planes - 1 ? _mm512_and_si512(v, here) : _mm512_ternarylogic_epi32(here, v, c, 0xca);
  }
  return c;
}

// Field k of a tile of two columns, interleaved, as pairs.
template <int planes, int k>
inline __attribute__((always_inline)) void field(const __m512i* a, const __m512i* b, const __m512* scale, const __m512* least,
                                                 int groups, uint16_t* to, int64_t panel_stride) {
  const __m512i x = codes_of<planes, k>(a), y = codes_of<planes, k>(b);
  const __m512i low = _mm512_unpacklo_epi8(x, y), high = _mm512_unpackhi_epi8(x, y);
  const auto weights = [&](__m128i bytes, int g) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), scale[g], least[g]);
  };
  const auto put = [&](__m128i l, __m128i h, int g) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(weights(h, g), weights(l, g));
    __builtin_memcpy(to + g * panel_stride + k * 32, &pairs, 64);
  };
  put(_mm512_castsi512_si128(low), _mm512_castsi512_si128(high), 0);
  if (groups > 1) put(_mm512_extracti32x4_epi32(low, 1), _mm512_extracti32x4_epi32(high, 1), 1);
  if (groups > 2) put(_mm512_extracti32x4_epi32(low, 2), _mm512_extracti32x4_epi32(high, 2), 2);
  if (groups > 3) put(_mm512_extracti32x4_epi32(low, 3), _mm512_extracti32x4_epi32(high, 3), 3);
}

template <int planes>
void unpack_tile(const as_packed& w, int64_t out, int64_t tile, int64_t begin, int64_t end, uint16_t* to) {
  const int64_t left = (out + group_outputs - 1) / group_outputs - tile * tile_groups;
  const int groups = int(left < tile_groups ? left : tile_groups);
  const __mmask16 dwords = __mmask16((1u << (4 * groups)) - 1u), bytes = __mmask16((1u << groups) - 1u);
  const int64_t panel_stride = (end - begin + 1) / 2 * pair_elements;
  constexpr float finest = float(1 << (2 * planes - 1)), centre = 0.5f - finest;
  for (int64_t i = begin; i < end; i += 2, to += pair_elements) {
    __m512i code[2][planes];
    __m128 step[2];
    for (int e = 0; e < 2; ++e) {
      const int64_t column = i + e < end ? i + e : i;
      const uint8_t* const line = w.plane + column * w.stride + tile * plane_line;
      const uint8_t* const mantissa = w.mantissa + column * w.mantissa_stride + tile * tile_groups;
      for (int p = 0; p < planes; ++p) {
        code[e][p] = _mm512_maskz_loadu_epi32(dwords, line + p * w.plane_stride);
        if (column + columns_ahead < end) __builtin_prefetch(line + columns_ahead * w.stride + p * w.plane_stride, 0, 2);
      }
      if (column + columns_ahead < end) __builtin_prefetch(mantissa + columns_ahead * w.mantissa_stride, 0, 2);
      // What is filled up is multiplied with zeros.
      const float unit = i + e < end ? scale_of(w, column) / 255.0f * w.gain[planes - 1] / finest : 0.0f;
      step[e] = _mm_mul_ps(_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, mantissa))), _mm_set1_ps(unit));
    }
    const __m128d low = _mm_castps_pd(_mm_unpacklo_ps(step[0], step[1])), high = _mm_castps_pd(_mm_unpackhi_ps(step[0], step[1]));
    const __m512 scale[tile_groups] = {
        _mm512_castpd_ps(_mm512_broadcastsd_pd(low)), _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_unpackhi_pd(low, low))),
        _mm512_castpd_ps(_mm512_broadcastsd_pd(high)), _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_unpackhi_pd(high, high)))};
    __m512 least[tile_groups];
    for (int g = 0; g < int(tile_groups); ++g) least[g] = _mm512_mul_ps(scale[g], _mm512_set1_ps(centre));
    field<planes, 0>(code[0], code[1], scale, least, groups, to, panel_stride);
    field<planes, 1>(code[0], code[1], scale, least, groups, to, panel_stride);
    field<planes, 2>(code[0], code[1], scale, least, groups, to, panel_stride);
    field<planes, 3>(code[0], code[1], scale, least, groups, to, panel_stride);
  }
}

void unpack(const as_packed& w, int64_t out, int64_t tile, int64_t begin, int64_t end, uint16_t* to) {
  if (w.planes == 2) return unpack_tile<2>(w, out, tile, begin, end, to);
  if (w.planes == 3) return unpack_tile<3>(w, out, tile, begin, end, to);
  unpack_tile<4>(w, out, tile, begin, end, to);
}

template <int rows>
void multiply_rows(const uint16_t* x, int64_t x_stride, const uint16_t* panel, int64_t pairs, bool fresh, float* sums,
                   int64_t sums_stride) {
  constexpr int vectors = 4;
  __m512 sum[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sum[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * sums_stride + 16 * v);
  for (int64_t p = 0; p < pairs; ++p, panel += pair_elements) {
    __m512bh weight[vectors];
    for (int v = 0; v < vectors; ++v) __builtin_memcpy(weight + v, panel + 32 * v, 64);
    for (int r = 0; r < rows; ++r) {
      int32_t two;
      __builtin_memcpy(&two, x + r * x_stride + 2 * p, 4);
      const __m512i all = _mm512_set1_epi32(two);
      __m512bh both;
      __builtin_memcpy(&both, &all, 64);
      for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, weight[v]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(sums + r * sums_stride + 16 * v, sum[r][v]);
}

void multiply(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* panel, int64_t pairs, bool fresh, float* sums,
              int64_t sums_stride) {
  constexpr int64_t at_once = 6;  // 24 registers of sums
  const int64_t parts = (rows + at_once - 1) / at_once;
  for (int64_t k = 0; k < parts; ++k) {
    const int64_t first = rows * k / parts, count = rows * (k + 1) / parts - first;
    const uint16_t* const from = x + first * x_stride;
    float* const to = sums + first * sums_stride;
    if (count == 6) multiply_rows<6>(from, x_stride, panel, pairs, fresh, to, sums_stride);
    if (count == 5) multiply_rows<5>(from, x_stride, panel, pairs, fresh, to, sums_stride);
    if (count == 4) multiply_rows<4>(from, x_stride, panel, pairs, fresh, to, sums_stride);
    if (count == 3) multiply_rows<3>(from, x_stride, panel, pairs, fresh, to, sums_stride);
    if (count == 2) multiply_rows<2>(from, x_stride, panel, pairs, fresh, to, sums_stride);
    if (count == 1) multiply_rows<1>(from, x_stride, panel, pairs, fresh, to, sums_stride);
  }
}

const ManyOps table = {unpack, multiply};
}  // namespace

const ManyOps* const many_bf16 = &table;
}  // namespace actsparse
#else
namespace actsparse {
const ManyOps* const many_bf16 = nullptr;
}
#endif
