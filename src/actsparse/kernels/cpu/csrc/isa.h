// The leaf operations that exist once per instruction set. Everything above them (threads, lists, validation) is compiled
// once for the baseline CPU, so only these tables may be entered after the CPU was asked what it supports.
#pragma once
#include <stdint.h>

#include "actsparse.h"

struct IsaOps {
  const char* name;
  int lanes;
  // Puts x into the order in which dot_rows reads it for weights of this type, in place.
  void (*arrange)(int32_t dtype, float* x, int64_t n);
  // out[b * out_stride + j] = row(j) . x[b]; row(j) is stored row idx[j], or first + j when idx is NULL. x is arranged.
  void (*dot_rows)(int32_t dtype, const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count,
                   const float* x, int64_t x_stride, int64_t batch, int64_t length, float* out, int64_t out_stride);
  // acc[b * acc_stride + o] += sum over j of coef[b * coef_stride + j] * row(j)[o], in the order of j. `fresh`: from zero,
  // whatever acc holds.
  void (*add_rows)(int32_t dtype, const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count,
                   const float* coef, int64_t coef_stride, int64_t batch, int64_t length, float* acc,
                   int64_t acc_stride, bool fresh);
  void (*widen)(int32_t dtype, const void* from, float* to, int64_t n);
  void (*narrow)(int32_t dtype, const float* from, void* to, int64_t n);
  void (*activate)(int32_t kind, float* x, int64_t n);
  // Writes the positions i < n where any batch row has not (|v| < threshold[i]); returns how many. At batch 1 also the values
  // there, unless `values` is NULL. Both need room for n + 16. v has this type at batch 1, and is float32 otherwise.
  int64_t (*keep)(int32_t dtype, const void* v, int64_t v_stride, const float* threshold, int64_t batch, int64_t n,
                  int32_t* idx, float* values);
  // x becomes |x|, or max(x, 0) if `positive`; returns how many of the n are above 0.
  int64_t (*rectify)(bool positive, float* x, int64_t n);
  // counts[i] += 1 where strength[i] is at least `level` and above 0; sums[i] += strength[i] * unit.
  void (*tally)(const float* strength, float level, float unit, int64_t n, float* counts, float* sums);
  void (*normalise)(int32_t kind, const float* x, const float* weight, const float* bias, float eps, int64_t n, float* y);
  void (*softmax)(float* x, float scale, int64_t n);
  uint64_t (*read)(const void* data, int64_t bytes);
  // As as_round_block and those after it.
  void (*round_block)(const as_rounding* block, const float* weight, float* rest, float* errors);
  void (*code_errors)(const as_rounding* block, const float* weight, float* as_read, float* whole);
  void (*descend_block)(const as_rounding* block, float prompts, const float* weight, float* as_read, float* whole,
                        const float* read_pull, const float* whole_pull, float* stood);
};

// NULL when the file was compiled for another architecture.
extern const IsaOps* const isa_scalar;
extern const IsaOps* const isa_avx2;
extern const IsaOps* const isa_avx512;
extern const IsaOps* const isa_neon;
