// Stand-ins for bytes, which the packed products use, and for a warp's matrix products.  Included by emulate.cpp.
struct int4 {
  int x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

AS_DEVICE uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
AS_DEVICE uint2 load_codes(const unsigned char* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8) __builtin_trap();
  uint2 v;
  std::memcpy(&v, at, 8);
  return v;
}
AS_DEVICE uint2 load_mantissas(const unsigned char* at) { return load_codes(at); }
AS_DEVICE uint32_t arrive(uint32_t* at) { return atomicAdd(at, 1u); }
AS_DEVICE uint4 load_codes16(const unsigned char* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) __builtin_trap();
  uint4 v;
  std::memcpy(&v, at, 16);
  return v;
}
AS_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
AS_DEVICE int to_integer(float v) { return v == v ? (int)std::nearbyint(v) : 0; }
AS_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = (uint64_t)high << 32 | low;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return v;
}
AS_DEVICE int add_bytes(uint32_t word, int sum) {
  for (int i = 0; i < 4; ++i) sum += (int8_t)(word >> 8 * i);
  return sum;
}

AS_DEVICE void multiply_tile(int (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static std::vector<std::array<uint32_t, 6>> posted;
  posted.resize(emulate::threads.size());
  posted[emulate::current] = {a0, a1, a2, a3, b0, b1};
  emulate::wait_warp();
  const int lane = threadIdx.x & 31, base = emulate::current / 32 * 32, row = lane >> 2, pair = lane & 3;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * pair + (e & 1), second = e >> 1;
    for (int k = 0; k < 32; ++k) {
      const auto& a = posted[base + row * 4 + k % 16 / 4];
      const auto& b = posted[base + column * 4 + k % 16 / 4];
      sum[e] += (int)(a[second + (k >= 16 ? 2 : 0)] >> 8 * (k & 3) & 255u) * (int8_t)(b[4 + (k >= 16)] >> 8 * (k & 3));
    }
  }
  emulate::wait_warp();
}

AS_DEVICE float head_of(float v) { return as_float(as_bits(v) & 0xffffe000u); }
AS_DEVICE void multiply_heads(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  static std::vector<std::array<float, 6>> posted;
  posted.resize(emulate::threads.size());
  posted[emulate::current] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emulate::wait_warp();
  const int lane = threadIdx.x & 31, base = emulate::current / 32 * 32, row = lane >> 2, pair = lane & 3;
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 8; ++k) {
      const auto& from = posted[base + row * 4 + k % 4];
      const auto& by = posted[base + (2 * pair + (e & 1)) * 4 + k % 4];
      sum[e] += head_of(from[(e >> 1) + (k >= 4 ? 2 : 0)]) * head_of(by[4 + (k >= 4)]);
    }
  emulate::wait_warp();
}

// What each lane of the warp posts, for the others to read.
template <size_t N>
const std::array<uint64_t, N>* post(const std::array<uint64_t, N>& mine) {
  static std::vector<std::array<uint64_t, N>> posted;
  posted.resize(emulate::threads.size());
  posted[emulate::current] = mine;
  emulate::wait_warp();
  return posted.data() + emulate::current / 32 * 32;
}
AS_DEVICE void load_either(uint32_t (&to)[4], const uint16_t* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) __builtin_trap();
  const auto* const rows = post<1>({reinterpret_cast<uint64_t>(row)});
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  for (int m = 0; m < 4; ++m) {
    uint32_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int at = transposed ? 2 * c + e : g, column = transposed ? g : 2 * c + e;
      pair[e] = reinterpret_cast<const uint16_t*>(rows[8 * m + at][0])[column];
    }
    to[m] = pair[0] | pair[1] << 16;
  }
  emulate::wait_warp();
}
AS_DEVICE void load_matrices(uint32_t (&to)[4], const uint16_t* row) { load_either(to, row, false); }
AS_DEVICE void load_transposed(uint32_t (&to)[4], const uint16_t* row) { load_either(to, row, true); }
AS_DEVICE uint32_t transposed(uint32_t pair) {
  const auto* const pairs = post<1>({pair});
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  uint32_t v = 0;
  for (int e = 0; e < 2; ++e) v |= (uint32_t)(pairs[4 * (2 * c + e) + g / 2][0] >> 16 * (g & 1) & 0xffffu) << 16 * e;
  emulate::wait_warp();
  return v;
}
AS_DEVICE void multiply_sixteen(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto* const given = post<6>({a[0], a[1], a[2], a[3], b0, b1});
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 16; ++k) {
      const auto &from = given[4 * g + k % 8 / 2], &by = given[4 * (2 * c + (e & 1)) + k % 8 / 2];
      float x[2], y[2];
      widen2(from[(e >> 1) + 2 * (k / 8)], x[0], x[1]);
      widen2(by[4 + k / 8], y[0], y[1]);
      sum[e] += x[k & 1] * y[k & 1];
    }
  emulate::wait_warp();
}
AS_DEVICE float4 load_others(const float* from) { return {from[0], from[1], from[2], from[3]}; }
