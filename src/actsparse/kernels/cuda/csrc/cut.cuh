// What thresholds leave of many rows, as in a prompt, for the matrix library's products: once through memory.
struct Cut {
  const u16* value;       // [rows, size]
  const u16* second;      // [rows, size], or null: what it is multiplied by
  const float* least;     // [size], or null: of the activated value
  const float* product;   // [size], or null: of both together
  u16* y;                 // [rows, size]
  i64 count;              // rows * size
  int size, activation, second_activation;
};

// Rounded where the oracle in the model's own type rounds: after every operation.
AS_DEVICE float rounded(float v) {
  float low, high;
  widen2((u32)narrow(v), low, high);
  return low;
}

AS_DEVICE float cut_value(const Cut& p, float v, float u, int column) {
  if (p.activation != 5) v = rounded(activate(p.activation, v));
  const bool dropped = p.least && absolute(v) < p.least[column];
  if (p.second) {
    if (p.second_activation != 5) u = rounded(activate(p.second_activation, u));
    v = rounded(v * u);
  }
  return dropped || (p.product && absolute(v) < p.product[column]) ? 0.0f : v;
}

// Eight values a thread.
AS_KERNEL(256, 4) cut_kernel(AS_PARAMETER Cut p) {
  wait_for_previous();
  const i64 apart = (i64)gridDim.x * blockDim.x * 8;
  for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < p.count; at += apart) {
    const int column = (int)(at % p.size);
    const Vec8 from = *reinterpret_cast<const Vec8*>(p.value + at);
    Vec8 other = from, to;
    if (p.second) other = *reinterpret_cast<const Vec8*>(p.second + at);
    for (int k = 0; k < 4; ++k) {
      float v[2], u[2];
      widen2(from.w[k], v[0], v[1]);
      widen2(other.w[k], u[0], u[1]);
      to.w[k] = (u32)narrow(cut_value(p, v[0], u[0], column + 2 * k)) |
                (u32)narrow(cut_value(p, v[1], u[1], column + 2 * k + 1)) << 16;
    }
    *reinterpret_cast<Vec8*>(p.y + at) = to;
  }
}
