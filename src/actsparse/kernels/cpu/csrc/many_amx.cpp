// Tiles of matrix registers (AMX), for products of bfloat16. Unpacking is AVX-512's.
#include <stddef.h>

#include "many.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace actsparse {
namespace {

constexpr int64_t tile_rows = 16, tile_pairs = 16, tile_columns = 16;  // of x, of both, of outputs
constexpr int64_t pair_bytes = 4 * panel_outputs;                       // from one pair of a panel to the next

// Shapes of the registers: sums 0 to 3 (two rows of tiles by two of outputs), x 4 and 5, weights 6 and 7.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Shapes(int64_t upper, int64_t lower, int64_t pairs) {
    const auto set = [&](int tile, int64_t r, int64_t b) {
      rows[tile] = uint8_t(r);
      bytes[tile] = uint16_t(b);
    };
    for (int t = 0; t < 2; ++t) {
      set(t, upper, 4 * tile_columns);
      set(2 + t, lower ? lower : tile_rows, 4 * tile_columns);
      set(6 + t, pairs, 4 * tile_columns);
    }
    set(4, upper, 4 * pairs);
    set(5, lower ? lower : tile_rows, 4 * pairs);
  }
};

// Up to 32 rows, `lower` of them in the second tile, and `steps` times so many pairs as the shapes have.
template <bool Both>
void multiply_rows(const uint16_t* x, int64_t x_stride, const char* panel, int64_t steps, int64_t pairs, bool fresh, float* sums,
                   int64_t sums_stride) {
  const int64_t x_bytes = 2 * x_stride, sums_bytes = 4 * sums_stride;
  for (int64_t o = 0; o < panel_outputs; o += 2 * tile_columns) {
    float *const upper = sums + o, *const lower = upper + tile_rows * sums_stride;
    if (fresh) {
      _tile_zero(0);
      _tile_zero(1);
      if (Both) _tile_zero(2);
      if (Both) _tile_zero(3);
    } else {
      _tile_loadd(0, upper, sums_bytes);
      _tile_loadd(1, upper + tile_columns, sums_bytes);
      if (Both) _tile_loadd(2, lower, sums_bytes);
      if (Both) _tile_loadd(3, lower + tile_columns, sums_bytes);
    }
    const uint16_t* from = x;
    const char* weights = panel + 4 * o;
    for (int64_t k = 0; k < steps; ++k, from += 2 * pairs, weights += pairs * pair_bytes) {
      _tile_loadd(4, from, x_bytes);
      _tile_loadd(6, weights, pair_bytes);
      _tile_loadd(7, weights + 4 * tile_columns, pair_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (Both) {
        _tile_loadd(5, from + tile_rows * x_stride, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, upper, sums_bytes);
    _tile_stored(1, upper + tile_columns, sums_bytes);
    if (Both) _tile_stored(2, lower, sums_bytes);
    if (Both) _tile_stored(3, lower + tile_columns, sums_bytes);
  }
}

void multiply_pairs(const uint16_t* x, int64_t x_stride, int64_t rows, const char* panel, int64_t steps, int64_t pairs, bool fresh,
                    float* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < rows; first += 2 * tile_rows) {
    const int64_t left = rows - first, upper = left < tile_rows ? left : tile_rows;
    const int64_t lower = left - upper < tile_rows ? left - upper : tile_rows;
    // Loading shapes clears the registers, and is done again only where they change.
    if (first == 0 || left < 2 * tile_rows) {
      const Shapes shapes(upper, lower, pairs);
      _tile_loadconfig(&shapes);
    }
    (lower ? multiply_rows<true> : multiply_rows<false>)(x + first * x_stride, x_stride, panel, steps, pairs, fresh,
                                                        sums + first * sums_stride, sums_stride);
  }
}

void multiply(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* panel, int64_t pairs, bool fresh, float* sums,
              int64_t sums_stride) {
  const int64_t steps = pairs / tile_pairs, whole = steps * tile_pairs;
  const char* const weights = reinterpret_cast<const char*>(panel);
  if (steps) multiply_pairs(x, x_stride, rows, weights, steps, tile_pairs, fresh, sums, sums_stride);
  if (whole < pairs)
    multiply_pairs(x + 2 * whole, x_stride, rows, weights + whole * pair_bytes, 1, pairs - whole, fresh && !steps, sums, sums_stride);
  _tile_release();  // others would save what is in them at every switch of threads
}

// The system gives the registers' room to a process that asks for it.
bool permitted() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

const ManyOps* many_amx() {
  static const ManyOps table = {many_bf16 ? many_bf16->unpack : nullptr, multiply};
  static const bool here = many_bf16 && permitted();
  return here ? &table : nullptr;
}

}  // namespace actsparse
#else
namespace actsparse {
const ManyOps* many_amx() { return nullptr; }
}
#endif
