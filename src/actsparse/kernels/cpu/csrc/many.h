// Products of packed matrices with many rows (many.cpp), and what of them is written for one instruction set (many_bf16.cpp).
//
// A tile of 256 outputs is unpacked a block of columns at a time into bfloat16, where it stays in the core's second cache while
// all rows are multiplied with it.
#pragma once
#include "graded.h"

namespace actsparse {

constexpr int64_t panel_outputs = group_outputs;  // what one row's registers add up
constexpr int64_t block_pairs = 128;              // of columns: four panels of them are 128 KB

struct ManyOps {
  // Columns [begin, end), at most 2 * block_pairs of them, of one tile, every plane: to[panel][pair][64][2], filled up to whole
  // pairs with zeros.
  void (*unpack)(const as_packed& w, int64_t out, int64_t tile, int64_t begin, int64_t end, uint16_t* to);
  // sums[row][64] += x[row][2 pairs] times a panel, for rows of x and sums that lie so many elements apart; `fresh` sets them.
  void (*multiply)(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* panel, int64_t pairs, bool fresh,
                   float* sums, int64_t sums_stride);
};

extern const ManyOps* const many_bf16;  // NULL when the file was compiled for another architecture
// NULL then too, and where the system does not give the registers; the processor must have them.
const ManyOps* many_amx();
const ManyOps* many_ops();              // NULL when the instruction set in use has none

}  // namespace actsparse
