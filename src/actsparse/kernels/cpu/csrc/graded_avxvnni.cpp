// AVX2 with AVX-VNNI.
#include <stddef.h>

#include "graded.h"

#if defined(__AVX2__) && defined(__AVXVNNI__)
#include <immintrin.h>

namespace actsparse {
namespace {
#include "graded_plain.inl"
#include "graded_ymm.inl"
#include "graded_vector.inl"

const GradedOps table = {"avxvnni", grade_plain, add, unpack_plain};
}  // namespace

const GradedOps* const graded_avxvnni = &table;
}  // namespace actsparse
#else
namespace actsparse {
const GradedOps* const graded_avxvnni = nullptr;
}
#endif
