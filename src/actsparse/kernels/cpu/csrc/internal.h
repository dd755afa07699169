// Shared by the files above the instruction sets: threads, scratch memory, and products of matrices with activations.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "actsparse.h"
#include "batch.h"
#include "isa.h"

namespace actsparse {

const IsaOps& ops();
int64_t thread_count();
// Runs body(context, task) for every task < tasks on torch's threads. Tasks may run in any order, on any thread, one after
// another (a nested parallel region is serial), and, where the pool refuses to start, on the calling thread.
void run_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// Runs body(context, 0) in a region whose other threads wait there for what it shares out with run_tasks: waking them for
// every product takes several microseconds where there are many. Throws what the body throws.
void lead_team(void (*body)(void* context, int64_t task), void* context);
// While waiting for another thread: the pause before the next look.
void rest(int64_t spins);

template <typename F>
void parallel(int64_t tasks, F&& f) {
  run_tasks(tasks, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &f);
}
template <typename F>
void as_a_team(F&& f) {
  lead_team([](void* context, int64_t) { (*static_cast<F*>(context))(); }, &f);
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

// Of anything but a packed matrix.
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
inline bool is_packed(const as_matrix& w) { return w.data && w.dtype == AS_PACKED; }

// Activations [batch, stride]: float32 at `x`, or values of another type at `raw` (dense), which whoever needs them in
// float32 widens into `x` first.
struct Activations {
  float* x = nullptr;  // nobody else's, and written, only where there is something to widen
  int64_t stride = 0;
  const void* raw = nullptr;
  int32_t raw_dtype = AS_F32;
  void widen(const IsaOps& isa, int64_t batch, int64_t n, int64_t begin, int64_t end) const;
};

// Pieces of work inside one parallel region. A task claims a piece before it begins it, so each is done once whoever comes
// first, and where tasks run one after another the first does all. Only pieces that a running task has begun are waited for.
class Claims {
 public:
  Claims() = default;
  explicit Claims(int64_t count);
  bool take(int64_t piece) const;
  void finish(int64_t piece) const;
  void wait() const;  // until every piece is finished; all must have been claimed

 private:
  enum { untouched, begun, finished };
  struct alignas(64) State {  // a line each: others wait for it
    int32_t value;
  };
  State* state_ = nullptr;
  int64_t count_ = 0;
};

// Waits until a counter that running tasks raise has reached `target`.
void wait_until(const int64_t* counter, int64_t target);

// Stored rows or columns cut into segments: one for each task, or (finely) a large one for each and then smaller and smaller
// ones for whoever is done first, because cores rarely get equal shares of the memory's bandwidth. Where the cuts are depends on
// the length and the number of tasks alone, so sums that are kept per segment and added up in order depend neither on who was
// faster nor, where a threshold keeps only some inside each segment, on what other batch rows keep.
class Segments {
 public:
  static constexpr int64_t rounds = 4;  // segments per task of a fine cut
  Segments() = default;
  Segments(int64_t tasks, bool finely);
  int64_t number() const { return number_; }
  Slice slice(int64_t length, int64_t segment) const;
  // Calls work(segment) for those that this task gets.
  template <typename F>
  void each(int64_t task, F&& work) const {
    const auto attempt = [&](int64_t segment) {
      if (!claims_.take(segment)) return;
      work(segment);
      claims_.finish(segment);
    };
    attempt(task);
    for (int64_t i = tasks_; i < number_; ++i) attempt(i);
    for (int64_t i = 0; i < tasks_; ++i) attempt(i);  // whose task has not begun
  }

 private:
  Claims claims_;
  int64_t tasks_ = 0, number_ = 0;
};

struct KeptList {
  const int32_t* positions;  // ascending
  const float* values;       // [batch, stride] of the activations there, 0 where that row does not keep it; if asked for
  int64_t stride, count;
};

// The positions i < n at which any batch row has not (|x| < threshold[i]), found segment by segment.
class Kept {
 public:
  Kept() = default;
  Kept(const IsaOps& isa, const Activations& x, const float* threshold, int64_t batch, int64_t n, int64_t segments,
       bool values, const BatchOps* pairs = nullptr);
  KeptList find(int64_t segment, Slice s) const;  // those inside s, which is that segment
  int64_t count() const;                          // of all segments, once they are found

 private:
  const IsaOps* isa_ = nullptr;
  const BatchOps* pairs_ = nullptr;
  Activations x_;
  const float* threshold_ = nullptr;
  int64_t batch_ = 0, n_ = 0, segments_ = 0, stride_ = 0;
  int64_t* counts_ = nullptr;  // of each segment
  int32_t* positions_ = nullptr;
  float* values_ = nullptr;
};

// Where the sums over the segments of stored columns go: the first to `out` (with the bias), the others to rooms of their own,
// which are added to it in order afterwards.
class Sums {
 public:
  Sums() = default;
  Sums(const Segments& segments, const as_matrix& w, int64_t batch, float* out, int64_t out_stride);
  // Reads `count` columns: those named, or all from `first` on.
  void add(const IsaOps& isa, int64_t segment, int64_t first, int64_t count, const int32_t* columns,
           const float* coefficients, int64_t coefficient_stride, const BatchOps* pairs = nullptr) const;
  void finish() const;  // after the region

 private:
  const as_matrix* w_ = nullptr;
  int64_t batch_ = 0, out_stride_ = 0, stride_ = 0, segments_ = 0;
  float *out_ = nullptr, *rooms_ = nullptr;
  bool* filled_ = nullptr;
};

constexpr int32_t no_activation = -1;

using Float4 = float __attribute__((vector_size(16)));

// to[i] = f(to[i], from[i]) for i < n <= 16. Sixteen, nearly always, are written out: compilers would first compare the pointers.
template <typename F>
inline void combine(float* to, const float* from, int64_t n, F f) {
  if (n < 16) {
    for (int64_t i = 0; i < n; ++i) to[i] = f(to[i], from[i]);
    return;
  }
  for (int64_t i = 0; i < 16; i += 4) {
    Float4 x, y;
    __builtin_memcpy(&x, to + i, sizeof x);
    __builtin_memcpy(&y, from + i, sizeof y);
    x = f(x, y);
    __builtin_memcpy(to + i, &x, sizeof x);
  }
}

// Residual streams [batch, stride] that packed products read under a norm and add to. Each 16 values come with the sum of their
// squares, which whoever writes them adds up: so a norm needs neither a pass of its own nor everybody's lines.
struct Stream {
  static constexpr int64_t run = 16;
  float* at;
  int64_t stride, width;
  double* squares;  // [batch, squares_stride]
  int64_t squares_stride;
  void measure(int64_t row, int64_t first, int64_t n) const;  // squares of the runs that begin in [first, first + n)
  void raise(int64_t row, int64_t first, int64_t n, float scale, const float* values) const;  // one run
  float norm_scale(int64_t row, float eps) const;             // of a root mean square norm
  // Values under it, times the norm's weight [width] or none.
  void normed(int64_t row, int64_t first, int64_t n, float scale, const float* weight, float* to) const;
};

// One product y = W x~ + bias inside a region that may run several. `out` is [batch, out_stride] float32.
struct Product {
  const as_matrix* w = nullptr;
  const IsaOps* isa = nullptr;  // that x was arranged for: the one in use may be changed by another thread meanwhile
  const BatchOps* pairs = nullptr;  // instead, where x and w are bfloat16 and there are several rows of x
  Activations x;
  const float* mask = nullptr;  // AS_ROWS: threshold under which activations count as 0
  float* arranged = nullptr;  // AS_ROWS: room for every task's own copy of x, as dot_rows wants it
  const float* threshold = nullptr;  // AS_COLUMNS: decides in the region which columns are read
  Kept found;
  const int32_t* rows = nullptr;  // AS_ROWS: rows to compute; NULL = all
  int64_t count = 0;  // rows to compute or columns to read; until the region is over, with a threshold: all of them
  float* out = nullptr;  // AS_ROWS: [batch, count]; AS_COLUMNS: [batch, out]
  int64_t out_stride = 0;
  int32_t activation = no_activation;  // AS_ROWS and packed: applied to each value once its bias is in
  // Packed only: x is `stream` under this norm, AS_RMS_NORM and one for all products of a region.
  const as_norm* norm = nullptr;
  const Stream* stream = nullptr;
  // Packed only: the result, so often, is added to this stream instead of set in `out`.
  const Stream* onto = nullptr;
  float onto_scale = 1.0f;
  Segments segments;
  Sums sums;  // AS_COLUMNS
  // AS_ROWS: makes room for the copies, before the region, and in it fills the task's: [batch, padded(w->in)]. A copy each,
  // because fetching what another core has just written takes longer.
  void make_room(int64_t tasks, int64_t batch);
  const float* arrange(int64_t task, int64_t batch) const;
  const uint16_t* masked_pairs(int64_t task, int64_t batch) const;  // the same for `pairs`: [batch, pairs_stride()]
  int64_t pairs_stride() const { return 2 * padded(w->in); }
  int64_t bytes() const { return count * stored_bytes(*w); }
};

// Prepares W x~. `rows` names the rows wanted (AS_ROWS only; NULL = all).
Product prepare(const as_matrix& w, const float* threshold, const Activations& x, int64_t batch, float* out,
                int64_t out_stride, const int32_t* rows = nullptr, int64_t row_count = 0);
inline Product prepare(const as_matrix& w, const float* threshold, const float* x, int64_t x_stride, int64_t batch,
                       float* out, int64_t out_stride, const int32_t* rows = nullptr, int64_t row_count = 0) {
  Activations wide;
  wide.x = const_cast<float*>(x);
  wide.stride = x_stride;
  return prepare(w, threshold, wide, batch, out, out_stride, rows, row_count);
}
// Computes all products in one parallel region (and one more for each large sum); adds the bytes read to stats.
void run(Product* products, int64_t count, int64_t batch, as_stats* stats);
// What becomes of the gate's and up's values where they are joined: v = what down multiplies.
struct Gating {
  const as_ffn* f;
  float* v;        // [batch, stride], the gate's values, or up's where there is no gate
  const float* u;  // up's, or NULL
  int64_t stride;
  void gate(int64_t row, int64_t first, int64_t n) const;
};
// The same for packed matrices of one input, at most three, or with `gating` one or two of one shape.
void run_packed(Product* const* products, int64_t count, int64_t batch, as_stats* stats, const Gating* gating = nullptr);
bool valid_packed(const as_matrix& w);
int64_t packed_bytes(const as_matrix& w);  // of all its planes and mantissas
// Adds the time from its making to its end to the products' share of stats, unless that is NULL.
class Stopwatch {
 public:
  explicit Stopwatch(as_stats* stats);
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch();

 private:
  as_stats* stats_;
  int64_t begin_ = 0;
};

void count_rows(as_stats* stats, int64_t gate, int64_t up, int64_t down, int64_t bytes);
void count_packed(as_stats* stats, int64_t planes, int64_t weights, int64_t bytes);

bool valid_ffn(const as_ffn& f);
// x [batch, x_stride] and y [batch, y_stride] in float32.
void ffn(const as_ffn& f, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t batch, as_stats* stats);

// The block whose gate (if any), up and down are all packed. With a norm it reads the stream under it instead of x; with `onto` it
// adds to the stream, so often, instead of setting y.
void packed_ffn(const as_ffn& f, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t batch, as_stats* stats,
                const as_norm* norm = nullptr, const Stream* stream = nullptr, bool onto = false, float onto_scale = 1.0f);

}  // namespace actsparse
