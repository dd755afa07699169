// Products with packed matrices: one to eight rows, several products in a region.
#include "graded.h"
#include "internal.h"

namespace actsparse {
namespace {
#include "graded_product.inl"

constexpr int64_t most_columns = int64_t(1) << 17;  // sums of so many coefficients stay inside 32 bits
constexpr int64_t together = 3;  // products of a region

// Grades this task's share of the blocks, and what nobody has begun, for all products of a region; returns when all are graded.
// They have one input.
void grade(const Packed* packed, Product* const* products, int64_t count, int64_t batch, const Claims& claims, int64_t task,
           int64_t tasks) {
  const Product& p = *products[0];
  float scales[AS_MAX_BATCH];
  if (p.norm)
    for (int64_t b = 0; b < batch; ++b) scales[b] = p.stream->norm_scale(b, p.norm->eps);
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t part = (task + i) % tasks;
    if (!claims.take(part)) continue;
    const Slice s = slice_of(packed[0].blocks(), part, tasks);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = s.begin; k < s.end; ++k) {
        const int64_t first = k * block_columns, rest = p.w->in - first;
        float normed[block_columns];
        if (p.norm) p.stream->normed(b, first, rest < block_columns ? rest : block_columns, scales[b], p.norm->weight, normed);
        for (int64_t n = 0; n < count; ++n)
          packed[n].grade(b, k, p.norm ? normed : products[n]->x.x + b * products[n]->x.stride + first);
      }
    claims.finish(part);
  }
  claims.wait();
}

// Adds up what this task gets of the products, its own first, one after the other without a pause; `room` is its own.
void add_up(const Packed* packed, const Found* found, int64_t count, int64_t task, Room* room) {
  int64_t product = 0, tried = 0, begun[together] = {};
  while (product + 1 < count && !packed[product].owned(task)) ++product;
  Packed::Place at = packed[product].place(task);
  const auto fill = [&](Block* block) {
    for (; tried < count; ++tried, product = (product + 1) % count, at = packed[product].place(task))
      if (packed[product].fill(&at, found[product], begun + product, block)) return true;
    return false;
  };
  int now = 0;
  bool more = fill(&room->blocks[0]);
  if (more) packed[product].request_begin(room->blocks[0]);
  while (more) {
    const int64_t mine = product;
    const Packed::Place here = at;
    more = fill(&room->blocks[now ^ 1]);
    packed[mine].add(task, here, found[mine], room->blocks[now], more ? &room->blocks[now ^ 1] : nullptr, room->coefficients);
    now ^= 1;
  }
  for (int64_t k = 0; k < count; ++k) packed[k].finish(begun[k]);
}

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

void run_packed(Product* const* products, int64_t count, int64_t batch, as_stats* stats, const Gating* gating) {
  const Stopwatch watch(stats);
  int64_t all = 0;
  for (int64_t k = 0; k < count; ++k) all += packed_bytes(*products[k]->w);
  const int64_t tasks = tasks_for(all / 2);
  Packed packed[together];
  // Each product belongs to as many of the tasks as it has of the bytes: the fewer of them add to an output, the fewer of their
  // sums, which lie in other cores' caches, are joined.
  int64_t before = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t after = before + packed_bytes(*products[k]->w);
    const Slice own = {(before * tasks + all / 2) / all, (after * tasks + all / 2) / all};
    packed[k] = Packed(*products[k], batch, tasks, own.size() ? own : Slice{0, tasks});
    before = after;
  }
  Room* const rooms = arena().take<Room>(tasks);
  const Claims graded(tasks);
  parallel(tasks, [&](int64_t task) {
    grade(packed, products, count, batch, graded, task, tasks);
    Found found[together];
    for (int64_t k = 0; k < count; ++k) found[k] = packed[k].found();
    add_up(packed, found, count, task, rooms + task);
    const auto nothing = [](int64_t, int64_t, int64_t) {};
    if (gating) {
      for (int64_t k = 0; k < count; ++k) packed[k].wait(found[k]);
      packed[0].join(task, [&](int64_t quarter) {
        if (count == 2) packed[1].join_quarter(quarter, found[1], nothing);
        packed[0].join_quarter(quarter, found[0], [&](int64_t row, int64_t first, int64_t n) { gating->gate(row, first, n); });
      });
      return;
    }
    for (int64_t k = 0; k < count; ++k) {
      packed[k].wait(found[k]);
      packed[k].join(task, [&](int64_t quarter) { packed[k].join_quarter(quarter, found[k], nothing); });
    }
  });
  for (int64_t k = 0; k < count; ++k) packed[k].count(stats);
}

}  // namespace actsparse
