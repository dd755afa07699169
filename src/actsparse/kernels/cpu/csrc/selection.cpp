// The strongest channels of every token: their level, and how often and how strongly each channel is among them.
#include <algorithm>
#include <cmath>
#include <functional>
#include <new>

#include "internal.h"

using namespace actsparse;

namespace {

// Non-negative floats order as their bits do; the upper ten of 31 give four steps an octave, few enough values in each.
constexpr int kShift = 21;
constexpr int64_t kSteps = 1 << (31 - kShift);

inline uint32_t step_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits >> kShift;
}

// The k-th largest of n values that are not negative, 1 <= k <= n. `steps` [4 * kSteps] and `candidates` [n] are scratch.
float largest(const float* values, int64_t n, int64_t k, uint32_t* steps, float* candidates) {
  // Four histograms in turn: neighbours that fall into one step would otherwise wait for each other.
  std::fill(steps, steps + 4 * kSteps, 0u);
  for (int64_t i = 0; i < n; ++i) ++steps[(i & 3) * kSteps + step_of(values[i])];
  int64_t step = kSteps, above = 0, inside = 0;
  while (above + inside < k) {
    above += inside;
    --step;
    inside = int64_t(steps[step]) + steps[kSteps + step] + steps[2 * kSteps + step] + steps[3 * kSteps + step];
  }
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    candidates[found] = values[i];
    found += int64_t(step_of(values[i])) == step;
  }
  float* const at = candidates + (k - above - 1);
  std::nth_element(candidates, at, candidates + found, std::greater<float>());
  return *at;
}

}  // namespace

int32_t as_core_statistics(const void* x, int32_t dtype, int64_t tokens, int64_t channels, int64_t row_stride, int64_t count,
                           float share, int32_t positive, float* levels, float* counts, float* sums) {
  if (tokens < 0 || channels < 1 || dtype < AS_F32 || dtype > AS_F16 || (tokens > 1 && row_stride < channels) || !x ||
      count < 0 || count > channels || !(share >= 0.f && share <= 1.f) || !levels || !counts || !sums)
    return AS_EINVAL;
  const IsaOps& isa = ops();
  const int64_t worth = tasks_for(tokens * channels * 32), tasks = worth < tokens ? worth : (tokens ? tokens : 1);
  try {
    Arena& scratch = arena();
    scratch.reset();
    // Per task: strengths, its own counts and sums (added up in order afterwards), a threshold repeated, the candidates above
    // it with their places, the steps.
    const int64_t each = 6 * padded(channels) + padded(4 * kSteps);
    float* const rooms = scratch.take<float>(each * tasks);
    parallel(tasks, [&](int64_t task) {
      float* const strength = rooms + task * each;
      float* const my_counts = strength + padded(channels);
      float* const my_sums = strength + 2 * padded(channels);
      float* const threshold = strength + 3 * padded(channels);
      float* const candidates = strength + 4 * padded(channels);
      int32_t* const places = reinterpret_cast<int32_t*>(strength + 5 * padded(channels));
      uint32_t* const steps = reinterpret_cast<uint32_t*>(strength + 6 * padded(channels));
      std::fill(my_counts, my_counts + channels, 0.f);
      std::fill(my_sums, my_sums + channels, 0.f);
      const Slice s = slice_of(tokens, task, tasks);
      // Levels of neighbouring tokens are alike: what lies above half an octave under the last one usually holds this one.
      float guess = 0.f;
      for (int64_t t = s.begin; t < s.end; ++t) {
        isa.widen(dtype, static_cast<const char*>(x) + t * row_stride * element_size(dtype), strength, channels);
        const int64_t active = isa.rectify(positive, strength, channels);
        int64_t k = count ? count : int64_t(std::nearbyint(share * float(active)));
        k = k < 1 ? 1 : k;
        const int64_t found = guess > 0.f ? isa.keep(AS_F32, strength, channels, threshold, 1, channels, places, candidates) : 0;
        if (found >= k) std::nth_element(candidates, candidates + (k - 1), candidates + found, std::greater<float>());
        const float level = found >= k ? candidates[k - 1] : largest(strength, channels, k, steps, candidates);
        // Selecting among many costs more than counting steps. While the guess serves, its threshold is not written anew.
        const float wanted = 8 * k <= channels && level > 1e-30f ? level * 0.70710678f : 0.f;
        if (found < k || found > 4 * k || wanted == 0.f) {
          guess = wanted;
          std::fill(threshold, threshold + channels, guess);
        }
        levels[t] = level;
        isa.tally(strength, level, 1.f / (level > 1.17549435e-38f ? level : 1.17549435e-38f), channels, my_counts, my_sums);
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      float n = 0.f, sum = 0.f;
      for (int64_t task = 0; task < tasks; ++task) {
        n += rooms[task * each + padded(channels) + c];
        sum += rooms[task * each + 2 * padded(channels) + c];
      }
      counts[c] = n;
      sums[c] = sum;
    }
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}
