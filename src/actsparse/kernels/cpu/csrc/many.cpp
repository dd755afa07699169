// Packed matrices unpacked: products with many rows, as in a prompt, and columns.
#include <memory>
#include <new>

#include "internal.h"
#include "many.h"

namespace actsparse {
namespace {

constexpr int64_t most_rows = 256;   // of a piece: with their sums in the second cache
constexpr int64_t least_rows = 32;   // that are worth unpacking a tile for once more

constexpr int64_t line = 32;         // values of 16 bits
constexpr int64_t least_blocks = 2;  // of columns that are worth sums of their own

// What a task unpacks in.
struct Room {
  alignas(64) uint16_t block[tile_groups * block_pairs * 2 * panel_outputs];
};

struct Many {
  const as_matrix* w;
  const as_packed* packed;
  const ManyOps* many;
  const uint16_t* x;  // [rows, stride] of deviations
  int64_t stride, rows;
  uint16_t* y;  // [rows, out]

  int64_t outputs(int64_t tile) const {
    const int64_t rest = w->out - tile * tile_outputs;
    return rest < tile_outputs ? rest : tile_outputs;
  }

  // Sums [rows, tile_outputs] of some rows over some blocks of columns, for one tile of outputs.
  void add(int64_t tile, Slice part, Slice blocks, Room* room, float* sums) const {
    const int64_t n = outputs(tile), last = blocks.end * 2 * block_pairs < w->in ? blocks.end * 2 * block_pairs : w->in;
    for (int64_t k = blocks.begin; k < blocks.end; ++k) {
      const int64_t begin = 2 * block_pairs * k, end = begin + 2 * block_pairs < last ? begin + 2 * block_pairs : last;
      const int64_t pairs = (end - begin + 1) / 2;
      many->unpack(*packed, w->out, tile, begin, end, room->block);
      for (int64_t o = 0; o < n; o += panel_outputs)
        many->multiply(x + part.begin * stride + begin, stride, part.size(), room->block + 2 * pairs * o, pairs, k == blocks.begin,
                       sums + o, tile_outputs);
    }
  }

  // The outputs of one row, of which `sums` has `spans` parts that lie so far apart. The first becomes their sum.
  void finish(int64_t tile, int64_t row, float* sums, int64_t spans, int64_t apart) const {
    const int64_t first = tile * tile_outputs, n = outputs(tile);
    for (int64_t s = 1; s < spans; ++s) {
      const float* const more = sums + s * apart;
      for (int64_t o = 0; o < n; o += 16) combine(sums + o, more + o, n - o < 16 ? n - o : 16, [](auto a, auto b) { return a + b; });
    }
    if (w->bias)
      for (int64_t o = 0; o < n; ++o) sums[o] += w->bias[first + o];
    ops().narrow(AS_BF16, sums, y + row * w->out + first, n);
  }
};

void multiply(const as_matrix& w, const ManyOps& many, const uint16_t* x, int64_t rows, uint16_t* y) {
  const as_packed& packed = *static_cast<const as_packed*>(w.data);
  const IsaOps& isa = ops();
  // An odd number of lines: rows that lie a power of two apart would share a few sets of the first cache.
  const int64_t stride = line * ((w.in + line - 1) / line | 1), threads = thread_count(), width = padded(w.in);
  const std::unique_ptr<uint16_t[]> room(new uint16_t[size_t(rows * stride + line)]);
  uint16_t* const deviations = room.get() + (-(reinterpret_cast<uintptr_t>(room.get()) / 2) & (line - 1));
  const int64_t arranging = tasks_for(4 * rows * w.in);
  float* const wide = arena().take<float>(arranging * width);
  parallel(arranging, [&](int64_t task) {
    const Slice s = slice_of(rows, task, arranging);
    float* const v = wide + task * width;
    for (int64_t r = s.begin; r < s.end; ++r) {
      isa.widen(AS_BF16, x + r * w.in, v, w.in);
      if (packed.center)
        for (int64_t i = 0; i < w.in; ++i) v[i] -= packed.center[i];
      isa.narrow(AS_BF16, v, deviations + r * stride, w.in);
      if (w.in % 2) deviations[r * stride + w.in] = 0;
    }
  });
  const Many product = {&w, &packed, &many, deviations, stride, rows, y};
  const int64_t tiles = (w.out + tile_outputs - 1) / tile_outputs, blocks = (w.in + 2 * block_pairs - 1) / (2 * block_pairs);
  int64_t parts = (rows + most_rows - 1) / most_rows, spans = 1;
  // Columns are shared out before rows are: a tile is unpacked once more for other rows, for other columns it is not.
  while (threads > 1 && tiles * parts * spans < 2 * threads && 2 * spans * least_blocks <= blocks) spans *= 2;
  while (tiles * parts * spans < threads && rows >= 2 * parts * least_rows) parts *= 2;
  const int64_t pieces = tiles * parts * spans, tasks = pieces < threads ? pieces : threads;
  const int64_t size = (rows + parts - 1) / parts * tile_outputs;  // of a piece's sums
  Room* const rooms = arena().take<Room>(tasks);
  // Side by side for the spans of a part, or a task's own.
  float* const sums = arena().take<float>((spans > 1 ? pieces : tasks) * size);
  int64_t next = 0;
  parallel(tasks, [&](int64_t task) {
    for (int64_t k = 0; (k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < pieces;) {
      const int64_t tile = k / spans % tiles, span = k % spans;
      const Slice part = slice_of(rows, k / spans / tiles, parts);
      float* const to = sums + (spans > 1 ? k : task) * size;
      product.add(tile, part, slice_of(blocks, span, spans), rooms + task, to);
      for (int64_t r = part.begin; spans == 1 && r < part.end; ++r)
        product.finish(tile, r, to + (r - part.begin) * tile_outputs, 1, 0);
    }
  });
  if (spans == 1) return;
  const int64_t joining = tasks_for(4 * rows * tiles * tile_outputs * spans);
  parallel(joining, [&](int64_t task) {
    const Slice s = slice_of(rows * tiles, task, joining);
    for (int64_t k = s.begin; k < s.end; ++k) {
      const int64_t row = k / tiles, tile = k % tiles;
      int64_t part = row * parts / rows;
      while (slice_of(rows, part, parts).end <= row) ++part;
      const int64_t at = (part * tiles + tile) * spans * size + (row - slice_of(rows, part, parts).begin) * tile_outputs;
      product.finish(tile, row, sums + at, spans, size);
    }
  });
}

}  // namespace
}  // namespace actsparse

using namespace actsparse;

int32_t as_many_rows(const as_matrix* w, const void* x, void* y, int64_t rows) {
  if (!w || !valid_matrix(*w) || !is_packed(*w) || !x || !y || rows < 1) return AS_EINVAL;
  if (static_cast<const as_packed*>(w->data)->threshold) return AS_EINVAL;
  const ManyOps* const many = many_ops();
  if (!many) return AS_EINVAL;
  try {
    arena().reset();
    multiply(*w, *many, static_cast<const uint16_t*>(x), rows, static_cast<uint16_t*>(y));
  } catch (const std::bad_alloc&) {
    return AS_ENOMEM;
  }
  return AS_OK;
}

int32_t as_has_many_rows(void) { return many_ops() != nullptr; }

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
