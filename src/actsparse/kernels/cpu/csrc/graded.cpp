// Products with packed matrices, and their unpacking.
#include <new>

#include "graded.h"
#include "internal.h"

namespace actsparse {
namespace {

constexpr int64_t most_columns = int64_t(1) << 17;  // sums of so many coefficients stay inside 32 bits
constexpr float least_unit = 1e-30f;
// Coefficients up to three times the mean magnitude take seven bits; the 1 or 2 % above are added in two parts. Rounding then
// leaves 5e-5 of the sums' energy (measured on both reference models' layers), as much as weights of 8 bits do.
constexpr float range = 3.0f / 127.0f, largest_coefficient = 16000.0f;

int64_t groups_of(const as_matrix& w) { return (w.out + group_outputs - 1) / group_outputs; }

// The unit of a row's coefficients, from what its blocks read; NaN where a value read is not finite.
float unit_of(const Grades* grades, int64_t blocks) {
  float sum = 0.0f, top = 0.0f;
  int64_t kept = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    sum += grades[k].sum;
    top = top < grades[k].top ? grades[k].top : top;
    kept += __builtin_popcountll(grades[k].read[0]);
  }
  if (!(sum <= 3.0e38f)) return __builtin_nanf("");
  const float mean = kept ? sum / float(kept) * range : 0.0f, least = top / largest_coefficient;
  const float unit = mean < least ? least : mean;
  return unit < least_unit ? least_unit : unit;
}

// Nearest whole number, ties to even, of |v| < 2^22.
int32_t nearest(float v) {
  constexpr float shift = 12582912.0f;
  return int32_t((v + shift) - shift);
}

// Where one task adds up, and the blocks that it has in hand.
struct alignas(64) Room {
  Block blocks[2];
  alignas(64) int32_t coefficients[2 * coefficient_room];
  char apart[256];
};

struct alignas(64) Counter {
  int64_t value;
  char apart[192];  // from the line that would be fetched with it
};

// One packed product inside a region.
class Packed {
 public:
  Packed() = default;
  Packed(const Product& product, int64_t batch, int64_t tasks)
      : p_(&product), w_(static_cast<const as_packed*>(product.w->data)), ops_(&graded_ops()), batch_(batch), tasks_(tasks) {
    groups_ = groups_of(*p_->w);
    blocks_ = (p_->w->in + block_columns - 1) / block_columns;
    tiles_ = (groups_ + tile_groups - 1) / tile_groups;
    // Long runs of lines are read fastest, but every task should get a few pieces, to even out the cores' speeds.
    const int64_t least = (tiles_ + strip_tiles - 1) / strip_tiles, quads = (tiles_ + 3) / 4;
    strips_ = (4 * tasks + blocks_ - 1) / blocks_;
    strips_ = tasks == 1 || strips_ < least ? least : strips_ < quads ? strips_ : quads;
    // Two blocks at a time have half the sums to store for each column.
    span_ = strips_ * blocks_ < 16 * tasks && tasks > 1 ? 1 : listed_columns / block_columns;
    lists_ = (blocks_ + span_ - 1) / span_;
    grades_ = arena().take<Grades>(batch * blocks_);
    coefficient_stride_ = padded(p_->w->in);
    coefficients_ = arena().take<float>(batch * coefficient_stride_);
    graded_ = Claims(tasks);
    joined_ = Claims(tasks);
    next_ = arena().take<Counter>(tasks + 1);
    for (int64_t t = 0; t <= tasks; ++t) next_[t].value = 0;
    sums_ = arena().take<int32_t>(tasks * task_stride());
    touched_ = arena().take<bool>(tasks * strips_);
    for (int64_t k = 0; k < tasks * strips_; ++k) touched_[k] = false;
  }

  void grade(int64_t task) const {
    for (int64_t i = 0; i < tasks_; ++i) {
      const int64_t part = (task + i) % tasks_;
      if (!graded_.take(part)) continue;
      const Slice s = slice_of(blocks_, part, tasks_);
      for (int64_t b = 0; b < batch_; ++b)
        for (int64_t k = s.begin; k < s.end; ++k) {
          const int64_t first = k * block_columns, rest = p_->w->in - first;
          grades_[b * blocks_ + k] = ops_->grade(*w_, p_->w->in, p_->x.x + b * p_->x.stride, first,
                                                 rest < block_columns ? rest : block_columns,
                                                 coefficients_ + b * coefficient_stride_ + first);
        }
      graded_.finish(part);
    }
    graded_.wait();
  }

  // Adds up what this task gets of the product; `room` is its own.
  void add(int64_t task, Room* room) const {
    float units[AS_MAX_BATCH];
    for (int64_t b = 0; b < batch_; ++b) units[b] = unit_of(grades_ + b * blocks_, blocks_);
    Place at;
    at.victim = task;
    int64_t begun = 0;
    int now = 0;
    bool more = fill(&at, units, &begun, &room->blocks[0]);
    if (more) request_begin(room->blocks[0]);
    while (more) {
      const int64_t row = at.row, strip = at.item / lists_;
      more = fill(&at, units, &begun, &room->blocks[now ^ 1]);
      touch(task, strip);
      const int64_t first = strip_begin(strip);
      ops_->add(room->blocks[now], more ? &room->blocks[now ^ 1] : nullptr, room->coefficients,
                sums(task, row) + first * tile_outputs, centres(task, row) + first * tile_groups);
      now ^= 1;
    }
    if (begun) __atomic_fetch_add(&next_[tasks_].value, begun, __ATOMIC_ACQ_REL);
  }

  // Turns the tasks' sums into outputs, once all of them are there.
  void join(int64_t task) const {
    wait_until(&next_[tasks_].value, strips_ * lists_);
    float units[AS_MAX_BATCH];
    for (int64_t b = 0; b < batch_; ++b) units[b] = unit_of(grades_ + b * blocks_, blocks_);
    for (int64_t i = 0; i < tasks_; ++i) {
      const int64_t part = (task + i) % tasks_;
      if (!joined_.take(part)) continue;
      const Slice s = slice_of(tiles_, part, tasks_);
      for (int64_t b = 0; b < batch_; ++b)
        for (int64_t t = s.begin; t < s.end; ++t) join_tile(b, t, units[b]);
      joined_.finish(part);
    }
  }

  void count(as_stats* stats) const {
    if (!stats) return;
    int64_t first = 0, planes = 0;
    for (int64_t k = 0; k < blocks_; ++k)
      for (int p = 0; p < w_->planes; ++p) {
        uint64_t any = 0;
        for (int64_t b = 0; b < batch_; ++b) any |= grades_[b * blocks_ + k].read[p];
        planes += __builtin_popcountll(any);
        if (p == 0) first += __builtin_popcountll(any);
      }
    // With the first plane come a column's mantissas and scale.
    count_packed(stats, planes, p_->w->in * p_->w->out, planes * 16 * groups_ + first * (groups_ + 2));
  }

 private:
  struct Place {
    int64_t item = 0, row = -1, victim = 0;  // row -1: no item in hand
  };

  int64_t centre_stride() const { return (tiles_ * tile_groups + 15) / 16 * 16; }
  // A task's sums, then its centres. Lines of two tasks lie far enough apart that no core fetches another's as a neighbour.
  int64_t task_stride() const { return batch_ * (tiles_ * tile_outputs + centre_stride()) + 1024; }
  int32_t* sums(int64_t task, int64_t row) const { return sums_ + task * task_stride() + row * tiles_ * tile_outputs; }
  int32_t* centres(int64_t task, int64_t row) const { return sums(task, batch_) + row * centre_stride(); }
  // Strips begin at whole fours of tiles: sixteen groups.
  int64_t strip_begin(int64_t strip) const { return strip == strips_ ? tiles_ : tiles_ * strip / strips_ / 4 * 4; }

  // A strip's block that nobody has begun: of this task's own share, or when that is done, of another's.
  int64_t claim(int64_t* victim) const {
    const int64_t items = strips_ * lists_;
    for (int64_t tries = 0; tries < tasks_; ++tries) {
      const Slice s = slice_of(items, *victim, tasks_);
      int64_t* const next = &next_[*victim].value;
      if (__atomic_load_n(next, __ATOMIC_RELAXED) < s.size()) {
        const int64_t k = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (k < s.size()) return s.begin + k;
      }
      *victim = (*victim + 1) % tasks_;
    }
    return -1;
  }

  // The next block and row of which anything is read; false when there is none.
  bool fill(Place* at, const float* units, int64_t* begun, Block* block) const {
    for (;;) {
      if (at->row >= 0 && at->row + 1 < batch_) {
        ++at->row;
      } else {
        at->row = -1;
        const int64_t item = claim(&at->victim);
        if (item < 0) return false;
        at->item = item;
        at->row = 0;
        ++*begun;
      }
      list(at->item, at->row, units[at->row], block);
      if (block->kept[0]) return true;
    }
  }

  void list(int64_t item, int64_t row, float unit, Block* block) const {
    const int64_t strip = item / lists_, begin = item % lists_ * span_, stop = begin + span_ < blocks_ ? begin + span_ : blocks_;
    const int64_t tile = strip_begin(strip), end = strip_begin(strip + 1) * tile_groups, first = begin * block_columns;
    const Grades* const grades = grades_ + row * blocks_;
    const float inverse = unit == unit ? 32768.0f / (255.0f * unit) : 0.0f;
    block->w = w_;
    block->tiles = strip_begin(strip + 1) - tile;
    block->groups = (end < groups_ ? end : groups_) - tile * tile_groups;
    const uint8_t* const planes = w_->plane + first * w_->stride + tile * plane_line;
    const uint8_t* const mantissas = w_->mantissa + first * w_->mantissa_stride + tile * tile_groups;
    int32_t multiplier[listed_columns] = {};
    if (unit == unit) {
      const float* const coefficients = coefficients_ + row * coefficient_stride_ + first;
      const int64_t rest = p_->w->in - first, count = rest < (stop - begin) * block_columns ? rest : (stop - begin) * block_columns;
      for (int64_t c = 0; c < count; ++c) multiplier[c] = nearest(coefficients[c] * inverse);
    }
    int32_t n = 0;
    for (int p = w_->planes - 1; p >= 0; --p) {
      const int32_t centre = (1 << (2 * w_->planes)) - (1 << (2 * (w_->planes - 1 - p)));
      for (int64_t k = begin; k < stop; ++k) {
        const Grades& g = grades[k];
        for (uint64_t left = p + 1 < w_->planes ? g.read[p] & ~g.read[p + 1] : g.read[p]; left; left &= left - 1, ++n) {
          const int64_t c = (k - begin) * block_columns + __builtin_ctzll(left);
          block->plane[n] = planes + c * w_->stride;
          block->mantissa[n] = mantissas + c * w_->mantissa_stride;
          block->multiplier[n] = multiplier[c];
          block->centre[n] = centre;
        }
      }
      block->kept[p] = n;
    }
    for (int p = w_->planes; p < max_planes; ++p) block->kept[p] = 0;
    for (int32_t k = n; k < (n + 3) / 4 * 4; ++k) {
      block->plane[k] = block->plane[0];
      block->mantissa[k] = block->mantissa[0];
      block->multiplier[k] = block->centre[k] = 0;
    }
  }

  // Nobody has requested the first lines of a task's first block.
  void request_begin(const Block& b) const {
    for (int32_t k = 0; k < b.kept[0]; ++k) __builtin_prefetch(b.mantissa[k], 0, 2);
    for (int p = 0; p < w_->planes; ++p)
      for (int32_t k = 0; k < b.kept[p]; ++k) __builtin_prefetch(b.plane[k] + p * w_->plane_stride, 0, 2);
  }

  void touch(int64_t task, int64_t strip) const {
    bool& touched = touched_[task * strips_ + strip];
    if (touched) return;
    touched = true;
    const int64_t begin = strip_begin(strip), tiles = strip_begin(strip + 1) - begin;
    for (int64_t b = 0; b < batch_; ++b) {
      __builtin_memset(sums(task, b) + begin * tile_outputs, 0, size_t(tiles * tile_outputs) * sizeof(int32_t));
      __builtin_memset(centres(task, b) + begin * tile_groups, 0, size_t(tiles * tile_groups) * sizeof(int32_t));
    }
  }

  void join_tile(int64_t row, int64_t tile, float unit) const {
    int32_t total[tile_outputs] = {}, centre[tile_groups] = {};
    int64_t strip = tile * strips_ / tiles_;
    while (strip_begin(strip + 1) <= tile) ++strip;
    while (strip_begin(strip) > tile) --strip;
    for (int64_t t = 0; t < tasks_; ++t) {
      if (!touched_[t * strips_ + strip]) continue;
      const int32_t* const from = sums(t, row) + tile * tile_outputs;
      for (int64_t k = 0; k < tile_outputs; ++k) total[k] += from[k];
      for (int64_t l = 0; l < tile_groups; ++l) centre[l] += centres(t, row)[tile * tile_groups + l];
    }
    const float scale = unit / float(1 << (2 * w_->planes));
    float values[tile_outputs];
    for (int64_t l = 0; l < tile_groups; ++l)
      for (int64_t q = 0; q < 16; ++q)  // 4 f + k
        for (int64_t j = 0; j < 4; ++j)
          values[64 * l + 4 * q + j] = float(2 * total[16 * q + 4 * l + j] - centre[l]) * scale;
    const int64_t first = tile * tile_outputs, rest = p_->w->out - first, n = rest < tile_outputs ? rest : tile_outputs;
    float* const out = p_->out + row * p_->out_stride + first;
    const float* const start = p_->w->bias;
    for (int64_t o = 0; o < n; ++o) out[o] = start ? values[o] + start[first + o] : values[o];
    if (p_->activation != no_activation) p_->isa->activate(p_->activation, out, n);
  }

  const Product* p_ = nullptr;
  const as_packed* w_ = nullptr;
  const GradedOps* ops_ = nullptr;
  int64_t batch_ = 0, tasks_ = 0, groups_ = 0, blocks_ = 0, tiles_ = 0, strips_ = 0, coefficient_stride_ = 0;
  int64_t span_ = 0, lists_ = 0;  // blocks of a list; lists of a strip
  Grades* grades_ = nullptr;       // [batch, blocks]
  float* coefficients_ = nullptr;  // [batch, stride]
  Claims graded_, joined_;
  Counter* next_ = nullptr;  // of each task's share, and last how many blocks are done
  int32_t* sums_ = nullptr;  // of each task and row, with the centres
  bool* touched_ = nullptr;  // [tasks, strips]
};

}  // namespace

bool valid_packed(const as_matrix& w) {
  const as_packed* const p = static_cast<const as_packed*>(w.data);
  const int64_t groups = groups_of(w);
  return w.layout == AS_COLUMNS && w.in <= most_columns && p->plane && p->mantissa && p->scale && p->planes >= 2 &&
         p->planes <= max_planes && p->stride >= 16 * groups && p->plane_stride >= 16 * groups && p->mantissa_stride >= groups;
}

int64_t packed_bytes(const as_matrix& w) {
  return w.in * groups_of(w) * (16 * static_cast<const as_packed*>(w.data)->planes + 1);
}

void run_packed(Product* const* products, int64_t count, int64_t batch, as_stats* stats) {
  const Stopwatch watch(stats);
  int64_t most = 0;
  for (int64_t k = 0; k < count; ++k) most += packed_bytes(*products[k]->w) / 2;
  const int64_t tasks = tasks_for(most);
  constexpr int64_t together = 3;
  Packed packed[together];
  for (int64_t k = 0; k < count; ++k) packed[k] = Packed(*products[k], batch, tasks);
  Room* const rooms = arena().take<Room>(tasks);
  parallel(tasks, [&](int64_t task) {
    for (int64_t k = 0; k < count; ++k) packed[k].grade(task);
    for (int64_t k = 0; k < count; ++k) packed[k].add(task, rooms + task);
    for (int64_t k = 0; k < count; ++k) packed[k].join(task);
  });
  for (int64_t k = 0; k < count; ++k) packed[k].count(stats);
}

void packed_ffn(const as_ffn& f, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t batch, as_stats* stats) {
  const bool gated = f.gate.data != nullptr;
  const int64_t neurons = f.up.out, stride = padded(neurons);
  float* const v = arena().take<float>(batch * stride);
  float* const u = gated ? arena().take<float>(batch * stride) : nullptr;
  Product products[2] = {prepare(gated ? f.gate : f.up, nullptr, x, x_stride, batch, v, stride), {}};
  products[0].activation = f.activation;
  if (gated) {
    products[1] = prepare(f.up, nullptr, x, x_stride, batch, u, stride);
    products[1].activation = f.up_activation;
  }
  run(products, gated ? 2 : 1, batch, stats);
  // Values lie in the caches of the cores that computed them: a few tasks fetch them faster than one.
  const int64_t tasks = tasks_for(8 * batch * neurons * int64_t(sizeof(float)));
  parallel(tasks, [&](int64_t task) {
    const Slice lines = slice_of((neurons + 15) / 16, task, tasks);
    const int64_t end = lines.end * 16 < neurons ? lines.end * 16 : neurons;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = lines.begin * 16; i < end; ++i) {
        const float g = v[b * stride + i], product = gated ? g * u[b * stride + i] : g;
        const bool dropped = (f.gate_threshold && __builtin_fabsf(g) < f.gate_threshold[i]) ||
                             (f.value_threshold && __builtin_fabsf(product) < f.value_threshold[i]);
        v[b * stride + i] = dropped ? 0.0f : f.mean ? product - f.mean[i] : product;
      }
  });
  Product down = prepare(f.down, nullptr, v, stride, batch, y, y_stride);
  run(&down, 1, batch, stats);
}

}  // namespace actsparse

using namespace actsparse;

int32_t as_unpack(const as_matrix* w, int64_t begin, int64_t end, int32_t level, void* out, int32_t out_dtype) {
  if (!w || !valid_matrix(*w) || w->dtype != AS_PACKED || !out || out_dtype < AS_F32 || out_dtype > AS_F16) return AS_EINVAL;
  const as_packed& p = *static_cast<const as_packed*>(w->data);
  if (begin < 0 || end < begin || end > w->in || level < 1 || level > p.planes) return AS_EINVAL;
  try {
    arena().reset();
    const int64_t tasks = tasks_for((end - begin) * w->out * 2), stride = padded(w->out);
    float* const rows = out_dtype == AS_F32 ? nullptr : arena().take<float>(tasks * stride);
    const IsaOps& isa = ops();
    const GradedOps& graded = graded_ops();
    parallel(tasks, [&](int64_t task) {
      const Slice s = slice_of(end - begin, task, tasks);
      for (int64_t k = s.begin; k < s.end; ++k) {
        char* const to = static_cast<char*>(out) + k * w->out * element_size(out_dtype);
        float* const row = rows ? rows + task * stride : reinterpret_cast<float*>(to);
        graded.unpack(p, w->out, begin + k, level, row);
        if (rows) isa.narrow(out_dtype, row, to, w->out);
      }
    });
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}
