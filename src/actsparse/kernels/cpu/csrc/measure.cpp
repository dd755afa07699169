// The yardsticks of the benchmarks: how fast plain reading is, and calls timed from where a decode step makes them.
#include <chrono>

#include "internal.h"

using namespace actsparse;

double as_read(const void* data, int64_t bytes) {
  if (!data || bytes <= 0) return 0.0;
  const int64_t tasks = tasks_for(bytes);
  uint64_t all = 0;
  const IsaOps& isa = ops();
  parallel(tasks, [&](int64_t task) {
    const Slice s = slice_of(bytes / 64, task, tasks);
    const uint64_t part = isa.read(static_cast<const char*>(data) + s.begin * 64, s.size() * 64);
    __atomic_fetch_xor(&all, part, __ATOMIC_RELAXED);
  });
  return double(all);
}

double as_time_calls(const as_call* calls, int64_t count, int32_t io_dtype) {
  if (!calls) return -1.0;
  using clock = std::chrono::steady_clock;
  const clock::time_point start = clock::now();
  for (const as_call* c = calls; c < calls + count; ++c) {
    const int32_t refused = c->ffn    ? as_ffn_forward(c->ffn, c->x, c->y, 1, io_dtype, nullptr)
                            : c->row_count >= 0 ? as_linear_rows(c->w, c->rows, c->row_count, c->x, c->y, 1, io_dtype, nullptr)
                                      : as_linear(c->w, c->threshold, c->x, c->y, 1, io_dtype, nullptr);
    if (refused) return -1.0;
  }
  return std::chrono::duration<double>(clock::now() - start).count();
}
