// Streaming per-channel statistics for calibration.
#include <new>

#include "internal.h"

using namespace actsparse;

namespace {

struct Bins {
  int64_t count;
  int32_t shift;  // leaves sub_bits of the mantissa below the exponent
  int64_t origin;
  // `magnitude` holds the bits of a finite |value|. Positive floats order as their bits do, so that dropping low mantissa
  // bits gives 2^sub_bits equal bins per octave without a logarithm.
  int64_t of(uint32_t magnitude) const {
    if (magnitude == 0) return 0;
    const int64_t bin = int64_t(magnitude >> shift) - origin + 2;
    return bin < 2 ? 1 : (bin < count ? bin : count - 1);
  }
};

constexpr int64_t kBlock = 256;  // channels at a time: their accumulators and histograms stay in cache

struct Input {
  const char* data;
  int32_t dtype;
  int64_t tokens, channels, row_stride;
  // Values of tokens [t, t + rows) from channel c on, `width` of each, as floats.
  void read(const IsaOps& isa, int64_t t, int64_t rows, int64_t c, int64_t width, float* out) const {
    const char* at = data + (t * row_stride + c) * element_size(dtype);
    if (width == row_stride) {
      isa.widen(dtype, at, out, rows * width);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) isa.widen(dtype, at + r * row_stride * element_size(dtype), out + r * width, width);
  }
};

uint32_t magnitude_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x7fffffffu;
}

constexpr uint32_t kInfinity = 0x7f800000u;

// Sums over channels [c0, c0 + n), n <= kBlock. Returns the number of values that are not finite (and left out).
int64_t add_moments(const Input& x, const IsaOps& isa, int64_t c0, int64_t n, double* sum_abs, double* sum_square) {
  float wide[kBlock];
  double absolute[kBlock] = {}, square[kBlock] = {};
  int64_t bad = 0;
  for (int64_t t = 0; t < x.tokens; ++t) {
    x.read(isa, t, 1, c0, n, wide);
    // Looking first keeps the branch out of the loop that sums, which then becomes vector code.
    uint32_t top = 0;
    for (int64_t c = 0; c < n; ++c) {
      const uint32_t bits = magnitude_bits(wide[c]);
      top = bits > top ? bits : top;
    }
    if (top >= kInfinity) {
      for (int64_t c = 0; c < n; ++c) {
        if (magnitude_bits(wide[c]) < kInfinity) continue;
        ++bad;
        wide[c] = 0.f;
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      const double v = __builtin_fabs(double(wide[c]));
      absolute[c] += v;
      square[c] += v * v;
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    if (sum_abs) sum_abs[c0 + c] += absolute[c];
    if (sum_square) sum_square[c0 + c] += square[c];
  }
  return bad;
}

// Counts over channels [c0, c0 + n). Few channels (a pooled histogram) are read many rows at a time, so that a call to
// widen covers a cache line or more.
int64_t add_counts(const Input& x, const IsaOps& isa, const Bins& by, int64_t c0, int64_t n, uint32_t* counts) {
  float wide[2 * kBlock];
  const bool whole_rows = x.row_stride == x.channels && x.channels <= kBlock;
  const int64_t from = whole_rows ? 0 : c0, width = whole_rows ? x.channels : n;
  const int64_t chunk = whole_rows ? 2 * kBlock / width : 1;
  int64_t bad = 0;
  for (int64_t t = 0; t < x.tokens; t += chunk) {
    const int64_t rows = x.tokens - t < chunk ? x.tokens - t : chunk;
    x.read(isa, t, rows, from, width, wide);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = wide + r * width + (c0 - from);
      for (int64_t c = 0; c < n; ++c) {
        const uint32_t bits = magnitude_bits(row[c]);
        if (bits >= kInfinity) {
          ++bad;
          continue;
        }
        ++counts[(c0 + c) * by.count + by.of(bits)];
      }
    }
  }
  return bad;
}

}  // namespace

int64_t as_channel_statistics(const void* x, int32_t dtype, int64_t tokens, int64_t channels, int64_t row_stride,
                              uint32_t* counts, int64_t bins, int32_t min_exponent, int32_t sub_bits, double* sum_abs,
                              double* sum_square) {
  if (tokens < 0 || channels < 0 || dtype < AS_F32 || dtype > AS_F16 || (tokens > 1 && row_stride < channels)) return AS_EINVAL;
  if (tokens == 0 || channels == 0) return 0;
  if (!x) return AS_EINVAL;
  if (counts && (bins < 3 || min_exponent < -126 || min_exponent > 127 || sub_bits < 0 || sub_bits > 23)) return AS_EINVAL;
  const Bins by{bins, 23 - sub_bits, int64_t(min_exponent + 127) << sub_bits};
  const Input input{static_cast<const char*>(x), dtype, tokens, channels, row_stride};
  const IsaOps& isa = ops();
  const int64_t threads = tasks_for(tokens * channels * 16);  // bins cost more than bytes
  // Every channel belongs to one task, so no two threads count into one bin and sums do not depend on timing.
  const int64_t wanted = (channels + threads - 1) / threads;
  const int64_t block = wanted < kBlock ? wanted : kBlock;
  const int64_t blocks = (channels + block - 1) / block;
  const int64_t tasks = threads < blocks ? threads : blocks;
  int64_t bad = 0;
  parallel(tasks, [&](int64_t task) {
    const Slice s = slice_of(blocks, task, tasks);
    int64_t bad_here = 0;
    for (int64_t k = s.begin; k < s.end; ++k) {
      const int64_t c0 = k * block, n = channels - c0 < block ? channels - c0 : block;
      const int64_t in_counts = counts ? add_counts(input, isa, by, c0, n, counts) : 0;
      const bool moments = sum_abs || sum_square || !counts;
      bad_here += moments ? add_moments(input, isa, c0, n, sum_abs, sum_square) : in_counts;
    }
    __atomic_fetch_add(&bad, bad_here, __ATOMIC_RELAXED);
  });
  return bad;
}
