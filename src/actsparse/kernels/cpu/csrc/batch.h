// Products of a few rows of bfloat16 activations with bfloat16 weights, where the CPU multiplies bfloat16 in pairs. Elsewhere,
// and at batch 1 and for activations of another type, the tables of isa.h do it, for which eight rows are more arithmetic
// than two cores do while the weights arrive.
#pragma once
#include <stdint.h>

namespace actsparse {

struct BatchOps {
  // As IsaOps::dot_rows for weights of bfloat16, with x [batch, x_stride] of bfloat16 in its own order, batch 2 to 8.
  void (*dot_rows)(const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const uint16_t* x,
                   int64_t x_stride, int64_t batch, int64_t length, float* out, int64_t out_stride);
  // As IsaOps::add_rows for weights of bfloat16, with coefficients that are bfloat16 values, batch 2 to 8, and the same sums
  // to the bit.
  void (*add_rows)(const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const float* coef,
                   int64_t coef_stride, int64_t batch, int64_t length, float* acc, int64_t acc_stride, bool fresh);
  // Writes the positions i < n where any row of x [batch, x_stride] has not (|x| < threshold[i]), and the values [batch,
  // values_stride] there, 0 where the row does not keep it; returns how many. Both need room for n + 16.
  int64_t (*keep)(const uint16_t* x, int64_t x_stride, const float* threshold, int64_t batch, int64_t n, int32_t* idx,
                  float* values, int64_t values_stride);
};

extern const BatchOps* const batch_bf16;  // NULL when the file was compiled for another architecture
const BatchOps* batch_ops();              // NULL when the instruction set in use has none

}  // namespace actsparse
