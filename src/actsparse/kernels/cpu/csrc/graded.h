// Products with packed matrices (graded.cpp) and what exists of them once per instruction set (graded_*.cpp).
//
// Columns are graded in blocks of 64, and added up in lists of 8 to 128 of them: what one batch row reads of them, columns with
// most planes first, so that plane p is wanted of a prefix. Coefficients are whole numbers of one unit per product and row, so sums are exact
// and do not depend on who adds what. Outputs are dealt with in tiles of 256, a 64-byte line of each plane of each column.
#pragma once
#include <stdint.h>

#include "actsparse.h"

namespace actsparse {

constexpr int64_t block_columns = 64, tile_outputs = 256, group_outputs = 64, tile_groups = 4, plane_line = 64;
constexpr int64_t listed_columns = 2 * block_columns;  // at most
constexpr int max_planes = 4;
constexpr int64_t strip_tiles = 64;  // at most, so that a list's coefficients stay in cache
// A multiplier's largest value whose coefficient (255 k + 2^14) >> 15 fits eight bits; larger ones are added in two parts.
constexpr int32_t max_multiplier = 16383;

// What one batch row reads of 64 columns.
struct Grades {
  uint64_t read[max_planes];  // bit c: plane p of column c is read
  float sum, top;             // of |coefficient| over the columns read, in a fixed order
};

// A list of columns, of which anything is read.
struct Block {
  const as_packed* w;
  int64_t groups, tiles;     // in the strip; its last tile may have fewer than four groups
  int32_t kept[max_planes];  // columns of which plane p is read: a prefix of the lists
  // Filled up to whole fours with columns whose multiplier is 0.
  const uint8_t *plane[listed_columns + 4], *mantissa[listed_columns + 4];  // at the strip
  int32_t multiplier[listed_columns + 4], centre[listed_columns + 4];
};

// Room for the coefficients of a list: four columns of one group to an int32.
constexpr int64_t coefficient_room = (listed_columns / 4) * strip_tiles * tile_groups;

struct GradedOps {
  const char* name;
  // Grades `count` <= 64 columns from `first` on, whose values are x[0], x[1], ...; coefficients[c] becomes (x - center) scale gain; 0: not read.
  Grades (*grade)(const as_packed& w, int64_t in, const float* x, int64_t first, int64_t count, float* coefficients);
  // sums[tile][field][k][16] += coefficient * code, centres[group] += coefficient * (2^S - 2^(S - bits read)). `next` is the
  // block to request while this one is multiplied, or NULL; `room` holds 2 * coefficient_room.
  void (*add)(const Block& block, const Block* next, int32_t* room, int32_t* sums, int32_t* centres);
  void (*unpack)(const as_packed& w, int64_t out, int64_t column, int32_t level, float* to);
};

// NULL when the file was compiled for another architecture.
extern const GradedOps* const graded_scalar;
extern const GradedOps* const graded_avx2;
extern const GradedOps* const graded_avxvnni;
extern const GradedOps* const graded_avx512;
extern const GradedOps* const graded_neon;
// Those for the instruction set in use.
const GradedOps& graded_ops();
// On how many pages at a time this machine's prefetchers are expected to follow what is read; 0: unknown.
int64_t pages_followed();

}  // namespace actsparse
