// Portable C++, written straight from the format: the fallback on any CPU and the second opinion in the tests.
#include <stddef.h>

#include "graded.h"

namespace actsparse {
namespace {
#include "graded_plain.inl"

void add(const Block& b, const Block*, int32_t*, int32_t* sums, int32_t* centres) {
  const int planes = b.w->planes;
  for (int c = 0; c < b.kept[0]; ++c) {
    int read = 0;
    while (read < planes && c < b.kept[read]) ++read;
    for (int64_t g = 0; g < b.groups; ++g) {
      const int32_t coefficient = (b.mantissa[c][g] * b.multiplier[c] + (1 << 14)) >> 15;
      centres[g] += coefficient * b.centre[c];
      int32_t* const tile = sums + g / tile_groups * tile_outputs + g % tile_groups * 4;
      for (int p = 0; p < read; ++p) {
        const uint8_t* const bytes = b.plane[c] + p * b.w->plane_stride + 16 * g;
        const int32_t weight = coefficient * (1 << (2 * (planes - 1 - p)));
        for (int f = 0; f < 4; ++f)
          for (int j = 0; j < 16; ++j) tile[(4 * f + j / 4) * 16 + j % 4] += weight * (bytes[j] >> (2 * f) & 3);
      }
    }
  }
}

const GradedOps table = {"scalar", grade_plain, add, unpack_plain};
}  // namespace

const GradedOps* const graded_scalar = &table;
}  // namespace actsparse
