// One packed product inside a region of tasks: what is read of it, who adds up what, and the joining of what they added up.
// Part of graded.cpp.

constexpr float least_unit = 1e-30f;
// Coefficients up to three times the mean magnitude take seven bits; the 1 or 2 % above are added in two parts. Rounding then
// leaves 5e-5 of the sums' energy (measured on both reference models' layers), as much as weights of 8 bits do.
constexpr float range = 3.0f / 127.0f, largest_coefficient = 16000.0f;

int64_t groups_of(const as_matrix& w) { return (w.out + group_outputs - 1) / group_outputs; }

// What a row's unit and lists take from a block: apart from what it reads, because every task wants all of them.
struct Magnitude {
  float sum, top;
  uint8_t read[max_planes];  // columns of which each plane is read
  int32_t unused;
};

// The unit of a row's coefficients, from what its blocks read; NaN where a value read is not finite.
float unit_of(const Magnitude* blocks, int64_t count) {
  float sum = 0.0f, top = 0.0f;
  int64_t kept = 0;
  for (const Magnitude* m = blocks; m < blocks + count; ++m) {
    sum += m->sum;
    top = top < m->top ? m->top : top;
    kept += m->read[0];
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

// What grading finds out of a product: the rows' units, and how its columns are listed.
struct Found {
  float unit[AS_MAX_BATCH];
  int64_t width, lists;  // columns of a list; how many lists
};

constexpr int64_t quarter_outputs = tile_outputs / 4;
// Columns of so many tiles are long: half a page of a plane. A strip has so many tiles of these at most.
constexpr int64_t page = 4096, long_tiles = 32, long_strip_tiles = 128;
static_assert(coefficient_room >= block_columns / 4 * long_strip_tiles * tile_groups, "short lists of long columns have their room");
// Written out, because compilers vectorise the loop around them instead.
using Int4 = int32_t __attribute__((vector_size(16)));

// One packed product inside a region.
class Packed {
 public:
  Packed() = default;
  // `own`: the tasks that begin with this product and have shares of it; the others help when they are done.
  Packed(const Product& product, int64_t batch, int64_t tasks, Slice own)
      : p_(&product), w_(static_cast<const as_packed*>(product.w->data)), ops_(&graded_ops()), batch_(batch), tasks_(tasks), own_(own) {
    const int64_t members = own.size();
    groups_ = groups_of(*p_->w);
    blocks_ = (p_->w->in + block_columns - 1) / block_columns;
    tiles_ = (groups_ + tile_groups - 1) / tile_groups;
    followed_ = pages_followed();
    const bool whole = tiles_ >= long_tiles && followed_;
    const int64_t most = whole ? long_strip_tiles : strip_tiles, least = (tiles_ + most - 1) / most, quads = (tiles_ + 3) / 4;
    // Long runs of lines are read fastest, but every task should get a few pieces, to even out the cores' speeds: strips of
    // lists, or where pages are followed and lists of long columns are short anyway, lists.
    strips_ = (8 * members + blocks_ - 1) / blocks_;
    strips_ = whole || members == 1 || strips_ < least ? least : strips_ < quads ? strips_ : quads;
    // Two blocks at a time have half the sums to store for each column.
    span_ = whole || (strips_ * blocks_ < 16 * members && members > 1) ? 1 : listed_columns / block_columns;
    begins_ = arena().take<int64_t>(strips_ + 1);
    // Fours are shared out, not tiles: cuts rounded down to fours would make the last strip longer than its coefficients' room.
    for (int64_t k = 0; k <= strips_; ++k) begins_[k] = k == strips_ ? tiles_ : quads * k / strips_ * 4;
    grades_ = arena().take<Grades>(batch * blocks_);
    magnitudes_ = arena().take<Magnitude>(batch * blocks_);
    coefficient_stride_ = padded(p_->w->in);
    coefficients_ = arena().take<float>(batch * coefficient_stride_);
    joined_ = Claims(tasks);
    next_ = arena().take<Counter>(members + 2);
    for (int64_t t = 0; t < members + 2; ++t) next_[t].value = 0;
    sums_ = arena().take<int32_t>(tasks * task_stride());
    touched_ = arena().take<bool>(tasks * strips_);
    for (int64_t k = 0; k < tasks * strips_; ++k) touched_[k] = false;
  }

  int64_t blocks() const { return blocks_; }
  bool owned(int64_t task) const { return own_.begin <= task && task < own_.end; }

  // What a row reads of a block, whose inputs are x[0], x[1], ...
  void grade(int64_t row, int64_t block, const float* x) const {
    const int64_t at = row * blocks_ + block, first = block * block_columns, rest = p_->w->in - first;
    const Grades g = ops_->grade(*w_, p_->w->in, x, first, rest < block_columns ? rest : block_columns,
                                 coefficients_ + row * coefficient_stride_ + first);
    grades_[at] = g;
    Magnitude m = {g.sum, g.top, {}, 0};
    for (int p = 0; p < w_->planes; ++p) m.read[p] = uint8_t(__builtin_popcountll(g.read[p]));
    magnitudes_[at] = m;
  }

  // After every block was graded.
  Found found() const {
    Found f = {};
    for (int64_t b = 0; b < batch_; ++b) f.unit[b] = unit_of(magnitudes_ + b * blocks_, blocks_);
    f.width = span_ * block_columns;
    if (followed_) {
      // As many columns as lie on so many pages: with more of them none is followed.
      const int64_t width = int64_t(float(followed_) / pages_of_column()) / 8 * 8;
      f.width = width < 8 ? 8 : width < f.width ? width : f.width;
    }
    f.lists = (p_->w->in + f.width - 1) / f.width;
    return f;
  }

  struct Place {
    int64_t item = 0, row = -1, victim = 0;  // row -1: no item in hand
  };

  Place place(int64_t task) const { return {0, -1, owned(task) ? task - own_.begin : task % own_.size()}; }

  // The next block and row of which anything is read; false when there is none. `begun` counts the items.
  bool fill(Place* at, const Found& found, int64_t* begun, Block* block) const {
    for (;;) {
      if (at->row >= 0 && at->row + 1 < batch_) {
        ++at->row;
      } else {
        at->row = -1;
        const int64_t item = claim(found, &at->victim);
        if (item < 0) return false;
        at->item = item;
        at->row = 0;
        ++*begun;
      }
      list(at->item, found, at->row, block);
      if (block->kept[0]) return true;
    }
  }

  // Nobody has requested the first lines of a task's first block.
  void request_begin(const Block& b) const {
    for (int32_t k = 0; k < b.kept[0]; ++k) __builtin_prefetch(b.mantissa[k], 0, 2);
    for (int p = 0; p < w_->planes; ++p)
      for (int32_t k = 0; k < b.kept[p]; ++k) __builtin_prefetch(b.plane[k] + p * w_->plane_stride, 0, 2);
  }

  void add(int64_t task, const Place& at, const Found& found, const Block& block, const Block* next, int32_t* coefficients) const {
    const int64_t strip = at.item / found.lists, first = strip_begin(strip);
    touch(task, strip);
    ops_->add(block, next, coefficients, sums(task, at.row) + first * tile_outputs, centres(task, at.row) + first * tile_groups);
  }

  void finish(int64_t begun) const {
    if (begun) __atomic_fetch_add(&next_[own_.size()].value, begun, __ATOMIC_ACQ_REL);
  }

  // Until everything is added up.
  void wait(const Found& f) const { wait_until(&next_[own_.size()].value, strips_ * f.lists); }

  // Calls work(quarter of a tile) for what this task gets of the outputs.
  template <typename F>
  void join(int64_t task, F&& work) const {
    for (int64_t i = 0; i < tasks_; ++i) {
      const int64_t part = (task + i) % tasks_;
      if (!joined_.take(part)) continue;
      const Slice s = slice_of(4 * tiles_, part, tasks_);
      for (int64_t q = s.begin; q < s.end; ++q) work(q);
      joined_.finish(part);
    }
  }

  // Turns the tasks' sums into outputs: 16 of each group of the quarter's tile. `combined` wants them, of this product.
  template <typename F>
  void join_quarter(int64_t quarter, const Found& found, F&& combined) const {
    for (int64_t b = 0; b < batch_; ++b) join_row(b, quarter / 4, quarter % 4, found.unit[b], combined);
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
  // Pages of 4 KB that are read at the same time, while a list is multiplied, to each of its columns: a column's part of a plane
  // is a piece of one page at a time, and of those that lie on one page it is enough that one is read.
  float pages_of_column() const {
    const int64_t together = w_->stride < page ? (page + w_->stride / 2) / w_->stride : 1;
    float pages = 1e-3f;
    for (int p = 0; p < w_->planes; ++p) {
      int64_t read = 0;
      for (int64_t k = 0; k < batch_ * blocks_; ++k) read += magnitudes_[k].read[p];
      const float unread = 1.0f - float(read) / float(batch_ * p_->w->in);
      float none = 1.0f;
      for (int64_t k = 0; k < together; ++k) none *= unread;
      pages += (1.0f - none) / float(together);
    }
    return pages;
  }

  int64_t centre_stride() const { return (tiles_ * tile_groups + 15) / 16 * 16; }
  // A task's sums, then its centres. Lines of two tasks lie far enough apart that no core fetches another's as a neighbour.
  int64_t task_stride() const { return batch_ * (tiles_ * tile_outputs + centre_stride()) + 1024; }
  int32_t* sums(int64_t task, int64_t row) const { return sums_ + task * task_stride() + row * tiles_ * tile_outputs; }
  int32_t* centres(int64_t task, int64_t row) const { return sums(task, batch_) + row * centre_stride(); }
  // Strips begin at whole fours of tiles: sixteen groups.
  int64_t strip_begin(int64_t strip) const { return begins_[strip]; }

  // A strip's list that nobody has begun: of this task's own share, or when that is done, of another's. Shares known to be
  // done are marked in one word, because looking at everybody's counter costs as much as a block.
  int64_t claim(const Found& f, int64_t* victim) const {
    const int64_t items = strips_ * f.lists, members = own_.size();
    int64_t* const done = &next_[members + 1].value;
    for (int64_t tries = 0; tries < members; ++tries, *victim = (*victim + 1) % members) {
      const int64_t bit = *victim < 64 ? int64_t(uint64_t(1) << *victim) : 0;
      if (__atomic_load_n(done, __ATOMIC_RELAXED) & bit) continue;
      const Slice s = slice_of(items, *victim, members);
      int64_t* const next = &next_[*victim].value;
      if (__atomic_load_n(next, __ATOMIC_RELAXED) < s.size()) {
        const int64_t k = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (k < s.size()) return s.begin + k;
      }
      if (bit) __atomic_fetch_or(done, bit, __ATOMIC_RELAXED);
    }
    return -1;
  }

  void list(int64_t item, const Found& found, int64_t row, Block* block) const {
    const int64_t strip = item / found.lists, first = item % found.lists * found.width, rest = p_->w->in - first;
    const int64_t count = rest < found.width ? rest : found.width, tile = strip_begin(strip);
    const int64_t end = strip_begin(strip + 1) * tile_groups;
    const Grades* const grades = grades_ + row * blocks_;
    const float unit = found.unit[row];
    const float inverse = unit == unit ? 32768.0f / (255.0f * unit) : 0.0f;
    block->w = w_;
    block->tiles = strip_begin(strip + 1) - tile;
    block->groups = (end < groups_ ? end : groups_) - tile * tile_groups;
    const uint8_t* const planes = w_->plane + first * w_->stride + tile * plane_line;
    const uint8_t* const mantissas = w_->mantissa + first * w_->mantissa_stride + tile * tile_groups;
    int32_t multiplier[listed_columns] = {};
    if (unit == unit) {
      const float* const coefficients = coefficients_ + row * coefficient_stride_ + first;
      for (int64_t c = 0; c < count; ++c) multiplier[c] = nearest(coefficients[c] * inverse);
    }
    int32_t n = 0;
    for (int p = w_->planes - 1; p >= 0; --p) {
      const int32_t centre = (1 << (2 * w_->planes)) - (1 << (2 * (w_->planes - 1 - p)));
      for (int64_t k = first / block_columns; k * block_columns < first + count; ++k) {
        const Grades& g = grades[k];
        const int64_t before = first - k * block_columns, after = before + count;  // of the block's columns, the list's
        uint64_t left = p + 1 < w_->planes ? g.read[p] & ~g.read[p + 1] : g.read[p];
        if (before > 0) left &= ~uint64_t(0) << before;
        if (after < block_columns) left &= (uint64_t(1) << after) - 1;
        for (; left; left &= left - 1, ++n) {
          const int64_t c = __builtin_ctzll(left) - before;
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

  template <typename F>
  void join_row(int64_t row, int64_t tile, int64_t field, float unit, F&& combined) const {
    int32_t total[quarter_outputs] = {}, centre[tile_groups] = {};
    int64_t strip = 0;
    while (strip_begin(strip + 1) <= tile) ++strip;
    const int64_t at = tile * tile_outputs + field * quarter_outputs;
    // Other cores' lines, all asked for before the first is needed.
    for (int64_t t = 0; tasks_ > 1 && t < tasks_; ++t) {
      if (!touched_[t * strips_ + strip]) continue;
      for (int64_t k = 0; k < quarter_outputs; k += 16) __builtin_prefetch(sums(t, row) + at + k);
      __builtin_prefetch(centres(t, row) + tile * tile_groups);
    }
    for (int64_t t = 0; t < tasks_; ++t) {
      if (!touched_[t * strips_ + strip]) continue;
      const int32_t* const from = sums(t, row) + at;
      for (int64_t k = 0; k < quarter_outputs; ++k) total[k] += from[k];
      for (int64_t l = 0; l < tile_groups; ++l) centre[l] += centres(t, row)[tile * tile_groups + l];
    }
    const float scale = unit / float(1 << (2 * w_->planes));
    alignas(64) float values[tile_groups][16];
    for (int64_t l = 0; l < tile_groups; ++l)
      for (int64_t k = 0; k < 4; ++k) {
        Int4 t;
        __builtin_memcpy(&t, total + 16 * k + 4 * l, sizeof t);
        const Float4 v = __builtin_convertvector(t + t - centre[l], Float4) * scale;
        __builtin_memcpy(values[l] + 4 * k, &v, sizeof v);
      }
    const int64_t begin = tile * tile_outputs + 16 * field;
    const auto left = [&](int64_t l) { return p_->w->out - begin - 64 * l < 16 ? p_->w->out - begin - 64 * l : 16; };
    for (int64_t l = 0; p_->w->bias && l < tile_groups; ++l)
      combine(values[l], p_->w->bias + begin + 64 * l, left(l), [](auto x, auto y) { return x + y; });
    if (p_->activation != no_activation) p_->isa->activate(p_->activation, values[0], quarter_outputs);
    for (int64_t l = 0; l < tile_groups && left(l) > 0; ++l) {
      const int64_t first = begin + 64 * l, n = left(l);
      float* const to = p_->out + row * p_->out_stride + first;
      if (p_->onto)
        p_->onto->raise(row, first, n, p_->onto_scale, values[l]);
      else if (n == 16)
        __builtin_memcpy(to, values[l], sizeof values[l]);
      else
        __builtin_memcpy(to, values[l], size_t(n) * sizeof(float));
      combined(row, first, n);
    }
  }

  const Product* p_ = nullptr;
  const as_packed* w_ = nullptr;
  const GradedOps* ops_ = nullptr;
  int64_t batch_ = 0, tasks_ = 0;
  Slice own_ = {0, 0};
  int64_t groups_ = 0, blocks_ = 0, tiles_ = 0, strips_ = 0, coefficient_stride_ = 0;
  int64_t followed_ = 0;       // pages
  int64_t span_ = 0;           // blocks of a list, at most
  int64_t* begins_ = nullptr;  // the strips' first tiles, and the end
  Grades* grades_ = nullptr;   // [batch, blocks]
  Magnitude* magnitudes_ = nullptr;
  float* coefficients_ = nullptr;  // [batch, stride]
  Claims joined_;
  Counter* next_ = nullptr;  // of each owner's share, then how many lists are done, and whose share is
  int32_t* sums_ = nullptr;  // of each task and row, with the centres
  bool* touched_ = nullptr;  // [tasks, strips]
};
