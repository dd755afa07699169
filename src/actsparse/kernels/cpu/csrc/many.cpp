// Packed matrices unpacked: products with many rows, as in a prompt, and columns.
#include <memory>
#include <new>

#include "internal.h"
#include "many.h"

namespace actsparse {
namespace {

constexpr int64_t most_rows = 256;   // of a piece: with their sums in the second cache
constexpr int64_t least_rows = 32;   // that are worth unpacking a tile for once more

// What a task unpacks and adds up in.
struct Room {
  alignas(64) uint16_t block[tile_groups * block_pairs * 2 * panel_outputs];
  alignas(64) float sums[most_rows * tile_outputs];
};

struct Many {
  const as_matrix* w;
  const as_packed* packed;
  const ManyOps* many;
  const uint16_t* x;  // [rows, stride] of deviations
  int64_t stride, rows;
  uint16_t* y;  // [rows, out]

  // One tile of outputs for some rows.
  void piece(int64_t tile, Slice part, Room* room) const {
    const int64_t first = tile * tile_outputs, rest = w->out - first, n = rest < tile_outputs ? rest : tile_outputs;
    for (int64_t begin = 0; begin < w->in; begin += 2 * block_pairs) {
      const int64_t end = begin + 2 * block_pairs < w->in ? begin + 2 * block_pairs : w->in, pairs = (end - begin + 1) / 2;
      many->unpack(*packed, w->out, tile, begin, end, room->block);
      for (int64_t o = 0; o < n; o += panel_outputs)
        many->multiply(x + part.begin * stride + begin, stride, part.size(), room->block + 2 * pairs * o, pairs, begin == 0,
                       room->sums + o, tile_outputs);
    }
    for (int64_t r = 0; r < part.size(); ++r) {
      float* const row = room->sums + r * tile_outputs;
      if (w->bias)
        for (int64_t o = 0; o < n; ++o) row[o] += w->bias[first + o];
      ops().narrow(AS_BF16, row, y + (part.begin + r) * w->out + first, n);
    }
  }
};

void multiply(const as_matrix& w, const ManyOps& many, const uint16_t* x, int64_t rows, uint16_t* y) {
  const as_packed& packed = *static_cast<const as_packed*>(w.data);
  const IsaOps& isa = ops();
  const int64_t stride = (w.in + 1) / 2 * 2, threads = thread_count(), width = padded(w.in);
  const std::unique_ptr<uint16_t[]> deviations(new uint16_t[size_t(rows * stride)]);
  const int64_t arranging = tasks_for(4 * rows * w.in);
  float* const wide = arena().take<float>(arranging * width);
  parallel(arranging, [&](int64_t task) {
    const Slice s = slice_of(rows, task, arranging);
    float* const v = wide + task * width;
    for (int64_t r = s.begin; r < s.end; ++r) {
      isa.widen(AS_BF16, x + r * w.in, v, w.in);
      if (packed.center)
        for (int64_t i = 0; i < w.in; ++i) v[i] -= packed.center[i];
      isa.narrow(AS_BF16, v, deviations.get() + r * stride, w.in);
      if (stride > w.in) deviations[size_t(r * stride + w.in)] = 0;
    }
  });
  const Many product = {&w, &packed, &many, deviations.get(), stride, rows, y};
  const int64_t tiles = (w.out + tile_outputs - 1) / tile_outputs;
  int64_t parts = (rows + most_rows - 1) / most_rows;
  while (tiles * parts < threads && rows >= 2 * parts * least_rows) parts *= 2;
  const int64_t pieces = tiles * parts, tasks = pieces < threads ? pieces : threads;
  Room* const rooms = arena().take<Room>(tasks);
  int64_t next = 0;
  parallel(tasks, [&](int64_t task) {
    for (int64_t k = 0; (k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < pieces;)
      product.piece(k % tiles, slice_of(rows, k / tiles, parts), rooms + task);
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
