// Rounding to nested codes: the calls; what they do is in rounding.inl, for each instruction set.
#include "internal.h"

namespace {

bool valid(const as_rounding* b) {
  return b && b->columns >= 1 && b->groups >= 1 && b->outputs == 64 * b->groups &&
         (b->stored == 4 || b->stored == 6 || b->stored == 8) && b->half_range && b->shares && b->gain && b->codes;
}

}  // namespace

int32_t as_round_block(const as_rounding* block, const float* weight, float* rest, float* errors) {
  if (!valid(block) || !weight || !rest || !errors) return AS_EINVAL;
  if (!block->matrix || block->columns > AS_ROUNDING_COLUMNS) return AS_EINVAL;
  actsparse::ops().round_block(block, weight, rest, errors);
  return AS_OK;
}

int32_t as_code_errors(const as_rounding* block, const float* weight, float* as_read, float* whole) {
  if (!valid(block) || !weight || !as_read || !whole) return AS_EINVAL;
  actsparse::ops().code_errors(block, weight, as_read, whole);
  return AS_OK;
}

int32_t as_descend_block(const as_rounding* block, float prompts, const float* weight, float* as_read, float* whole,
                         const float* read_pull, const float* whole_pull, float* stood) {
  if (!valid(block) || !weight || !as_read || !whole || !read_pull || !whole_pull || !stood) return AS_EINVAL;
  if (!block->matrix || block->columns > AS_ROUNDING_COLUMNS) return AS_EINVAL;
  actsparse::ops().descend_block(block, prompts, weight, as_read, whole, read_pull, whole_pull, stood);
  return AS_OK;
}
