// How the tasks of a region share its work: claims, segments, and the search for the positions that a threshold keeps.
#include <sched.h>

#include "internal.h"

namespace actsparse {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

constexpr int64_t slack = 16;  // what `keep` may write past its results

constexpr int64_t worth_cutting = 64;  // rows per task; of fewer, whole groups of eight would leave tasks without any
// Percent of its even share that each task gets at once, and then of those for all. Cores of the machine that this was
// tried on differ by up to a third within 100 us; the last round bounds how long one waits for the other.
constexpr int64_t percent[Segments::rounds] = {70, 16, 9, 5};

}  // namespace

void rest(int64_t spins) {
  if (spins < 500)
    pause();
  else
    sched_yield();
}

Claims::Claims(int64_t count) : state_(arena().take<State>(count)), count_(count) {
  for (int64_t i = 0; i < count; ++i) state_[i].value = untouched;
}

bool Claims::take(int64_t piece) const {
  // Looking first leaves the line where it is when the piece is gone.
  int32_t expected = untouched;
  return __atomic_load_n(&state_[piece].value, __ATOMIC_RELAXED) == untouched &&
         __atomic_compare_exchange_n(&state_[piece].value, &expected, int32_t(begun), false, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED);
}

void Claims::finish(int64_t piece) const { __atomic_store_n(&state_[piece].value, int32_t(finished), __ATOMIC_RELEASE); }

void Claims::wait() const {
  for (int64_t i = 0; i < count_; ++i)
    for (int64_t spins = 0; __atomic_load_n(&state_[i].value, __ATOMIC_ACQUIRE) != finished; ++spins) rest(spins);
}

void wait_until(const int64_t* counter, int64_t target) {
  for (int64_t spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < target; ++spins) rest(spins);
}

Segments::Segments(int64_t tasks, bool finely)
    : claims_(finely && tasks > 1 ? rounds * tasks : tasks), tasks_(tasks), number_(finely && tasks > 1 ? rounds * tasks : tasks) {}

Slice Segments::slice(int64_t length, int64_t segment) const {
  if (number_ == tasks_) return slice_of(length, segment, tasks_);
  if (length < worth_cutting * tasks_) return segment < tasks_ ? slice_of(length, segment, tasks_) : Slice{length, length};
  const auto cut = [&](int64_t at) {
    if (at == number_) return length;
    int64_t before = 0;
    for (int64_t r = 0; r < at / tasks_; ++r) before += percent[r] * tasks_;
    before += percent[at / tasks_] * (at % tasks_);
    return length * before / (100 * tasks_) / 8 * 8;  // whole groups of rows
  };
  return {cut(segment), cut(segment + 1)};
}

void Activations::widen(const IsaOps& isa, int64_t batch, int64_t n, int64_t begin, int64_t end) const {
  if (!raw) return;
  for (int64_t b = 0; b < batch; ++b)
    isa.widen(raw_dtype, static_cast<const char*>(raw) + (b * n + begin) * element_size(raw_dtype), x + b * stride + begin,
              end - begin);
}

namespace {

// Where a run's sum lies: those that one task writes, every fourth of a tile's sixteen, side by side.
int64_t place_of(int64_t at) { return at / 16 * 16 + at % 4 * 4 + at % 16 / 4; }

}  // namespace

void Stream::measure(int64_t row, int64_t first, int64_t n) const {
  for (int64_t begin = first; begin < first + n && begin < width; begin += run) {
    const float* const x = at + row * stride + begin;
    const int64_t count = width - begin < run ? width - begin : run;
    double part[4] = {};
    if (count == run)
      for (int64_t i = 0; i < run; i += 4)
        for (int64_t k = 0; k < 4; ++k) part[k] += double(x[i + k]) * double(x[i + k]);
    else
      for (int64_t i = 0; i < count; ++i) part[0] += double(x[i]) * double(x[i]);
    squares[row * squares_stride + place_of(begin / run)] = (part[0] + part[1]) + (part[2] + part[3]);
  }
}

void Stream::raise(int64_t row, int64_t first, int64_t n, float scale, const float* values) const {
  combine(at + row * stride + first, values, n, [scale](auto x, auto v) { return x + scale * v; });
  measure(row, first, n);
}

void Stream::normed(int64_t row, int64_t first, int64_t n, float scale, const float* weight, float* to) const {
  const float* const x = at + row * stride + first;
  if (weight)
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * scale * weight[first + i];
  else
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * scale;
}

float Stream::norm_scale(int64_t row, float eps) const {
  const double* const from = squares + row * squares_stride;
  const int64_t runs = (width + run - 1) / run, whole = runs / 16 * 16;
  double part[4] = {}, sum = 0.0;
  for (int64_t k = 0; k < whole; k += 4)
    for (int64_t j = 0; j < 4; ++j) part[j] += from[k + j];
  for (int64_t k = whole; k < runs; ++k) sum += from[place_of(k)];
  for (double p : part) sum += p;
  return float(1.0 / __builtin_sqrt(sum / double(width) + double(eps)));
}

Kept::Kept(const IsaOps& isa, const Activations& x, const float* threshold, int64_t batch, int64_t n, int64_t segments,
           bool values, const BatchOps* pairs)
    : isa_(&isa), pairs_(values ? pairs : nullptr), x_(x), threshold_(threshold), batch_(batch), n_(n), segments_(segments) {
  stride_ = padded(n + segments * slack);
  counts_ = arena().take<int64_t>(segments * 8);  // a line each
  positions_ = arena().take<int32_t>(stride_);
  values_ = values ? arena().take<float>(batch * stride_) : nullptr;
}

KeptList Kept::find(int64_t segment, Slice s) const {
  if (pairs_) {
    const int64_t at = s.begin + segment * slack;
    const int64_t found = pairs_->keep(static_cast<const uint16_t*>(x_.raw) + s.begin, n_, threshold_ + s.begin, batch_, s.size(),
                                       positions_ + at, values_ + at, stride_);
    for (int64_t j = 0; j < found; ++j) positions_[at + j] += int32_t(s.begin);
    counts_[segment * 8] = found;
    return {positions_ + at, values_ + at, stride_, found};
  }
  const bool as_given = batch_ == 1 && x_.raw;
  if (!as_given) x_.widen(*isa_, batch_, n_, s.begin, s.end);
  const int32_t dtype = as_given ? x_.raw_dtype : AS_F32;
  const void* const from = as_given ? x_.raw : x_.x;
  int32_t* const positions = positions_ + s.begin + segment * slack;
  float* const values = values_ ? values_ + s.begin + segment * slack : nullptr;
  const int64_t count = isa_->keep(dtype, static_cast<const char*>(from) + s.begin * element_size(dtype), x_.stride,
                                   threshold_ + s.begin, batch_, s.size(), positions, batch_ == 1 ? values : nullptr);
  for (int64_t j = 0; j < count; ++j) positions[j] += int32_t(s.begin);
  for (int64_t b = 0; batch_ > 1 && values && b < batch_; ++b)
    for (int64_t j = 0; j < count; ++j) {
      const float v = x_.x[b * x_.stride + positions[j]];
      // Another batch row may be the one that keeps this position.
      values[b * stride_ + j] = __builtin_fabsf(v) < threshold_[positions[j]] ? 0.0f : v;
    }
  counts_[segment * 8] = count;
  return {positions, values, stride_, count};
}

int64_t Kept::count() const {
  int64_t all = 0;
  for (int64_t i = 0; i < segments_; ++i) all += counts_[i * 8];
  return all;
}

}  // namespace actsparse
