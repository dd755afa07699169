// AVX2.
#include <stddef.h>

#include "graded.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace actsparse {
namespace {
#include "graded_plain.inl"
#include "graded_ymm.inl"
#include "graded_vector.inl"

const GradedOps table = {"avx2", grade_plain, add, unpack_plain};
}  // namespace

const GradedOps* const graded_avx2 = &table;
}  // namespace actsparse
#else
namespace actsparse {
const GradedOps* const graded_avx2 = nullptr;
}
#endif
