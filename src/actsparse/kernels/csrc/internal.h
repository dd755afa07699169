// Shared by the files above the instruction sets: threads, scratch memory, and products of matrices with activations.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "actsparse.h"
#include "isa.h"

namespace actsparse {

const IsaOps& ops();
int64_t thread_count();
// Runs body(context, task) for every task < tasks on torch's threads. Tasks may run in any order, on any thread, one after
// another (a nested parallel region is serial), and again after a failure of the pool: each must stand alone and start its
// own results from nothing.
void run_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

template <typename F>
void parallel(int64_t tasks, F&& f) {
  run_tasks(tasks, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &f);
}

// How many tasks are worth waking threads for, when `bytes` are to be read.
inline int64_t tasks_for(int64_t bytes) {
  constexpr int64_t grain = 64 * 1024;  // about 6 us of streaming, the cost of one fork and join
  const int64_t threads = thread_count(), worth = 1 + bytes / grain;
  return worth < threads ? worth : threads;
}

struct Slice {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Slice slice_of(int64_t count, int64_t task, int64_t tasks) {
  return {count * task / tasks, count * (task + 1) / tasks};
}

// Bump allocator of one calling thread: grows to what a call needs and is then reused without touching the heap.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();
  void reset();
  // 64-byte aligned, uninitialised; throws std::bad_alloc.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(size_t(count) * sizeof(T)));
  }
  size_t mark() const { return used_; }
  void release(size_t mark) { used_ = mark < used_ && spilled_.empty() ? mark : used_; }

 private:
  void* take_bytes(size_t bytes);
  char* block_ = nullptr;
  size_t capacity_ = 0, used_ = 0, spilled_bytes_ = 0;
  std::vector<char*> spilled_;  // blocks for what did not fit this time; merged into one block by reset()
};
Arena& arena();

inline int64_t element_size(int32_t dtype) { return dtype == AS_F32 ? 4 : 2; }
// Stored vectors (rows of AS_ROWS, columns of AS_COLUMNS) and their length.
inline int64_t stored_count(const as_matrix& w) { return w.layout == AS_ROWS ? w.out : w.in; }
inline int64_t stored_length(const as_matrix& w) { return w.layout == AS_ROWS ? w.in : w.out; }
inline int64_t stored_bytes(const as_matrix& w) { return stored_length(w) * element_size(w.dtype); }
inline const void* stored_at(const as_matrix& w, int64_t i) {
  return static_cast<const char*>(w.data) + i * w.stride * element_size(w.dtype);
}
// Room between per-task or per-row float arrays: whole lines, so that no two tasks write the same one.
inline int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16 + 16; }

bool valid_matrix(const as_matrix& w);

// One product y = W x~ + bias inside a region that may run several. `out` is [batch, out_stride] float32.
struct Product {
  const as_matrix* w = nullptr;
  const IsaOps* isa = nullptr;  // that x was arranged for: the one in use may be changed by another thread meanwhile
  const float* x = nullptr;  // [batch, x_stride]; AS_COLUMNS: coefficients of the kept columns, in order; AS_ROWS: arranged
  int64_t x_stride = 0;
  const int32_t* kept = nullptr;  // AS_ROWS: rows to compute; AS_COLUMNS: columns to read; NULL = all
  int64_t kept_count = 0;
  float* out = nullptr;  // AS_ROWS: [batch, kept_count]; AS_COLUMNS: [batch, out]
  int64_t out_stride = 0;
  float* partial = nullptr;  // AS_COLUMNS: accumulators of the tasks after the first
  int64_t bytes() const { return kept_count * stored_bytes(*w); }
};

// Prepares W x~ for activations x [batch, x_stride]. `rows` names the rows wanted (AS_ROWS only; NULL = all).
Product prepare(const as_matrix& w, const float* threshold, const float* x, int64_t x_stride, int64_t batch, float* out,
                int64_t out_stride, const int32_t* rows = nullptr, int64_t row_count = 0);
// Computes all products in one parallel region (and a second for a large reduction); adds the bytes read to stats.
void run(Product* products, int64_t count, int64_t batch, as_stats* stats);
// acc[b] (task 0's accumulator, in place) += the accumulators of the other tasks, partial[(task - 1)][b][stride].
void reduce(float* acc, int64_t acc_stride, const float* partial, int64_t stride, int64_t tasks, int64_t batch, int64_t n);
void start_accumulator(float* acc, int64_t acc_stride, const float* bias, int64_t batch, int64_t n);

void count_rows(as_stats* stats, int64_t gate, int64_t up, int64_t down, int64_t bytes);

bool valid_ffn(const as_ffn& f);
// x [batch, x_stride] and y [batch, y_stride] in float32.
void ffn(const as_ffn& f, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t batch, as_stats* stats);

}  // namespace actsparse
