// AVX-512 with products of bfloat16: each adds two products to one float32 sum, the upper half's first.
#include <stddef.h>

#include "batch.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace actsparse {
namespace {

constexpr int64_t line = 32, lines_ahead = 32;

inline __attribute__((always_inline)) __m512bh pairs_at(const uint16_t* p) {
  __m512bh v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
inline __attribute__((always_inline)) __m512bh pairs_of(__m512i bits) {
  __m512bh v;
  __builtin_memcpy(&v, &bits, 64);
  return v;
}
inline __attribute__((always_inline)) __m512bh tail_at(const uint16_t* p, __mmask32 valid) {
  return pairs_of(_mm512_maskz_loadu_epi16(valid, p));
}

inline const uint16_t* row_at(const uint16_t* data, int64_t stride, const int32_t* idx, int64_t first, int64_t k) {
  return data + (idx ? int64_t(idx[k]) : first + k) * stride;
}

// R rows of weights with B rows of x. Requested ahead: the same rows, and at their end the beginning of the next.
template <int R, int B>
inline void dot(const uint16_t* const* rows, const uint16_t* const* next, const uint16_t* x, int64_t x_stride, int64_t length,
                float* out, int64_t out_stride) {
  __m512 sum[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) sum[r][b] = _mm512_setzero_ps();
  const int64_t whole = length / line * line;
  const auto work = [&](int64_t i) __attribute__((always_inline)) {
    __m512bh w[R];
    for (int r = 0; r < R; ++r) w[r] = pairs_at(rows[r] + i);
    for (int b = 0; b < B; ++b) {
      const __m512bh v = pairs_at(x + b * x_stride + i);
      for (int r = 0; r < R; ++r) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], w[r], v);
    }
  };
  const int64_t ahead = whole < lines_ahead * line ? whole : lines_ahead * line;
  int64_t i = 0;
  for (; i < whole - ahead; i += line) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(rows[r] + i + ahead, 0, 2);
    work(i);
  }
  for (; i < whole; i += line) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + i + ahead - whole, 0, 2);
    work(i);
  }
  if (whole < length) {
    const __mmask32 valid = __mmask32((1u << (length - whole)) - 1u);
    for (int b = 0; b < B; ++b) {
      const __m512bh v = tail_at(x + b * x_stride + whole, valid);
      for (int r = 0; r < R; ++r) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], tail_at(rows[r] + whole, valid), v);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) out[b * out_stride + r] = _mm512_reduce_add_ps(sum[r][b]);
}

template <int R, int B>
inline int64_t dot_by(const uint16_t* data, int64_t stride, const int32_t* idx, int64_t first, int64_t j, int64_t count,
                      const uint16_t* x, int64_t x_stride, int64_t length, float* out, int64_t out_stride) {
  for (; j + R <= count; j += R) {
    const uint16_t *rows[R], *next[R];
    for (int r = 0; r < R; ++r) {
      rows[r] = row_at(data, stride, idx, first, j + r);
      next[r] = row_at(data, stride, idx, first, j + R + r < count ? j + R + r : count - 1);
    }
    dot<R, B>(rows, next, x, x_stride, length, out + j, out_stride);
  }
  return j;
}

template <int B>
void dot_all(const uint16_t* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const uint16_t* x,
             int64_t x_stride, int64_t length, float* out, int64_t out_stride) {
  constexpr int R = B > 6 ? 3 : 4;  // sums in 24 registers at most
  const int64_t j = dot_by<R, B>(data, stride, idx, first, 0, count, x, x_stride, length, out, out_stride);
  dot_by<1, B>(data, stride, idx, first, j, count, x, x_stride, length, out, out_stride);
}

void dot_rows(const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const uint16_t* x,
              int64_t x_stride, int64_t batch, int64_t length, float* out, int64_t out_stride) {
  using All = void (*)(const uint16_t*, int64_t, const int32_t*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, float*,
                       int64_t);
  static constexpr All all[] = {dot_all<2>, dot_all<3>, dot_all<4>, dot_all<5>, dot_all<6>, dot_all<7>, dot_all<8>};
  all[batch - 2](static_cast<const uint16_t*>(data), stride, idx, first, count, x, x_stride, length, out, out_stride);
}

// ---- rows added up -----------------------------------------------------------------------------------------------------

// Sums lie as interleaving two rows leaves them: of 32 outputs, those whose bit 2 is clear and then the others.
template <bool Back>
inline void reorder(float* sums, int64_t n) {
  const __m512i low = Back ? _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23)
                           : _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(Back ? 8 : 4));
  for (int64_t o = 0; o < n; o += line) {
    const __m512 a = _mm512_loadu_ps(sums + o), b = _mm512_loadu_ps(sums + o + 16);
    _mm512_storeu_ps(sums + o, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(sums + o + 16, _mm512_permutex2var_ps(a, high, b));
  }
}

// P pairs of rows with their coefficients [B][P], each two of bfloat16. A last row alone has itself and a zero beside it.
template <int P, int B>
inline void add_pairs(const uint16_t* const* rows, const uint16_t* const* next, const int32_t* coef, int64_t n, float* sums,
                      int64_t sums_stride) {
  const int64_t ahead = n < 8 * line ? n / line * line : 8 * line;
  for (int64_t o = 0; o < n; o += line) {
    const __mmask32 valid = n - o < line ? __mmask32((1u << (n - o)) - 1u) : __mmask32(~0u);
    for (int p = 0; p < 2 * P; ++p)
      __builtin_prefetch(o + ahead < n ? rows[p] + o + ahead : next[p] + (o + ahead - n), 0, 2);
    __m512bh low[P], high[P];
    for (int p = 0; p < P; ++p) {
      const __m512i first = _mm512_maskz_loadu_epi16(valid, rows[2 * p] + o);
      const __m512i second = _mm512_maskz_loadu_epi16(valid, rows[2 * p + 1] + o);
      low[p] = pairs_of(_mm512_unpacklo_epi16(second, first));
      high[p] = pairs_of(_mm512_unpackhi_epi16(second, first));
    }
    for (int b = 0; b < B; ++b) {
      float* const at = sums + b * sums_stride + o;
      __m512 l = _mm512_loadu_ps(at), h = _mm512_loadu_ps(at + 16);
      for (int p = 0; p < P; ++p) {
        const __m512bh c = pairs_of(_mm512_set1_epi32(coef[b * P + p]));
        l = _mm512_dpbf16_ps(l, low[p], c);
        h = _mm512_dpbf16_ps(h, high[p], c);
      }
      _mm512_storeu_ps(at, l);
      _mm512_storeu_ps(at + 16, h);
    }
  }
}

// Four pairs of coefficients, the first of each pair in the upper half.
inline void four_pairs(const float* coef, int32_t* to) {
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(_mm256_loadu_ps(coef)), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_rol_epi32(_mm256_cvtepi32_epi16(bits), 16));
}

inline int32_t one_pair(float first, float second) {
  uint32_t upper, lower;
  __builtin_memcpy(&upper, &first, 4);
  __builtin_memcpy(&lower, &second, 4);
  return int32_t((upper & 0xffff0000u) | lower >> 16);
}

constexpr int64_t block = 512;  // outputs whose sums of eight rows stay in the first cache beside the weights

// Adds groups of 2 P rows from row j on; returns the first row left.
template <int P, int B>
inline int64_t add_by(const uint16_t* data, int64_t stride, const int32_t* idx, int64_t first, int64_t j, int64_t count,
                      const float* coef, int64_t coef_stride, int64_t n, float* sums) {
  for (; j < count && (P == 1 || j + 2 * P <= count); j += 2 * P) {
    const uint16_t *rows[2 * P], *next[2 * P];
    for (int k = 0; k < 2 * P; ++k) {
      rows[k] = row_at(data, stride, idx, first, j + k < count ? j + k : count - 1);
      next[k] = row_at(data, stride, idx, first, j + 2 * P + k < count ? j + 2 * P + k : count - 1);
    }
    alignas(16) int32_t two[B * P];
    for (int b = 0; b < B; ++b) {
      const float* const c = coef + b * coef_stride + j;
      if constexpr (P == 4)
        four_pairs(c, two + 4 * b);
      else
        two[b] = one_pair(c[0], j + 1 < count ? c[1] : 0.0f);
    }
    add_pairs<P, B>(rows, next, two, n, sums, block);
  }
  return j;
}

template <int B>
void add_all(const uint16_t* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const float* coef,
             int64_t coef_stride, int64_t length, float* acc, int64_t acc_stride, bool fresh) {
  alignas(64) float sums[B * block];
  for (int64_t o = 0; o < length; o += block) {
    const int64_t n = length - o < block ? length - o : block, whole = (n + line - 1) / line * line;
    for (int b = 0; b < B; ++b) {
      float* const row = sums + b * block;
      __builtin_memset(row, 0, size_t(whole) * sizeof(float));
      if (fresh) continue;
      __builtin_memcpy(row, acc + b * acc_stride + o, size_t(n) * sizeof(float));
      reorder<false>(row, whole);
    }
    const int64_t j = add_by<4, B>(data + o, stride, idx, first, 0, count, coef, coef_stride, n, sums);
    add_by<1, B>(data + o, stride, idx, first, j, count, coef, coef_stride, n, sums);
    for (int b = 0; b < B; ++b) {
      reorder<true>(sums + b * block, whole);
      __builtin_memcpy(acc + b * acc_stride + o, sums + b * block, size_t(n) * sizeof(float));
    }
  }
}

void add_rows(const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const float* coef,
              int64_t coef_stride, int64_t batch, int64_t length, float* acc, int64_t acc_stride, bool fresh) {
  using All = void (*)(const uint16_t*, int64_t, const int32_t*, int64_t, int64_t, const float*, int64_t, int64_t, float*,
                       int64_t, bool);
  static constexpr All all[] = {add_all<2>, add_all<3>, add_all<4>, add_all<5>, add_all<6>, add_all<7>, add_all<8>};
  all[batch - 2](static_cast<const uint16_t*>(data), stride, idx, first, count, coef, coef_stride, length, acc, acc_stride,
                 fresh);
}

// ---- who is kept -------------------------------------------------------------------------------------------------------

int64_t keep(const uint16_t* x, int64_t x_stride, const float* threshold, int64_t batch, int64_t n, int32_t* idx,
             float* values, int64_t values_stride) {
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16, position = _mm512_add_epi32(position, _mm512_set1_epi32(16))) {
    const __mmask16 valid = n - i < 16 ? __mmask16((1u << (n - i)) - 1u) : __mmask16(0xffff);
    const __m512 level = _mm512_maskz_loadu_ps(valid, threshold + i);
    __m512 kept[8];
    __mmask16 any = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const __m512i raw = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, x + b * x_stride + i));
      const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
      const __mmask16 own = _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(v), level, _CMP_NLT_UQ);
      kept[b] = _mm512_maskz_mov_ps(own, v);
      any |= own;
    }
    _mm512_storeu_si512(idx + count, _mm512_maskz_compress_epi32(any, position));
    for (int64_t b = 0; b < batch; ++b)
      _mm512_storeu_ps(values + b * values_stride + count, _mm512_maskz_compress_ps(any, kept[b]));
    count += __builtin_popcount(any);
  }
  return count;
}

const BatchOps table = {dot_rows, add_rows, keep};
}  // namespace

const BatchOps* const batch_bf16 = &table;
}  // namespace actsparse
#else
namespace actsparse {
const BatchOps* const batch_bf16 = nullptr;
}
#endif
