// What thresholds leave of many rows, as in a prompt, for the matrix library's products: once through memory.
struct Cut {
  const u16* value;       // [rows, size]
  const u16* second;      // [rows, size], or null: what it is multiplied by
  const float* least;     // [size], or null: of the activated value
  const float* product;   // [size], or null: of both together
  u16* y;                 // [rows, size]
  int rows, size, activation, second_activation;
};

constexpr int CUT_ROWS = 4;  // of a thread, eight columns each: all under way together

// Rounded where the oracle in the model's own type rounds: after every operation.
AS_DEVICE float rounded(float v) {
  float low, high;
  widen2((u32)narrow(v), low, high);
  return low;
}

// Inline what is frequent: a call for each value would take as long as the memory.
template <bool SILU>
AS_DEVICE float cut_value(const Cut& p, float v, float u, float least, float product) {
  if (SILU) v = rounded(v / (1.0f + expf(-v)));
  else if (p.activation != 5) v = rounded(activate(p.activation, v));
  const bool dropped = absolute(v) < least;
  if (p.second) {
    if (p.second_activation != 5) u = rounded(activate(p.second_activation, u));
    v = rounded(v * u);
  }
  return dropped || absolute(v) < product ? 0.0f : v;
}

template <bool SILU>
AS_DEVICE void cut_rows(const Cut& p, int row, int column) {
  Vec8 from[CUT_ROWS], other[CUT_ROWS];
#pragma unroll
  for (int r = 0; r < CUT_ROWS; ++r) {
    const i64 at = (i64)(row + r < p.rows ? row + r : row) * p.size + column;
    from[r] = *reinterpret_cast<const Vec8*>(p.value + at);
    other[r] = p.second ? *reinterpret_cast<const Vec8*>(p.second + at) : from[r];
  }
  float least[8], product[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    least[k] = p.least ? p.least[column + k] : 0.0f;
    product[k] = p.product ? p.product[column + k] : 0.0f;
  }
#pragma unroll
  for (int r = 0; r < CUT_ROWS; ++r) {
    if (row + r >= p.rows) break;
    Vec8 to;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float v[2], u[2];
      widen2(from[r].w[k], v[0], v[1]);
      widen2(other[r].w[k], u[0], u[1]);
      to.w[k] = (u32)narrow(cut_value<SILU>(p, v[0], u[0], least[2 * k], product[2 * k])) |
                (u32)narrow(cut_value<SILU>(p, v[1], u[1], least[2 * k + 1], product[2 * k + 1])) << 16;
    }
    *reinterpret_cast<Vec8*>(p.y + (i64)(row + r) * p.size + column) = to;
  }
}

AS_KERNEL(256, 3) cut_kernel(AS_PARAMETER Cut p) {
  wait_for_previous();
  const u32 pieces = p.size / 8, number = blockIdx.x * blockDim.x + threadIdx.x, strip = number / pieces;
  const int row = strip * CUT_ROWS, column = (number - strip * pieces) * 8;
  if (row >= p.rows) return;
  if (p.activation == 0) cut_rows<true>(p, row, column);
  else cut_rows<false>(p, row, column);
}
