// Stand-ins for what the packed products use: bytes, halves and a warp's matrix product.  Included by emulate.cpp.
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

static float __shfl_sync(uint32_t, float value, int from) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulate::exchange(bits, from);
  std::memcpy(&value, &bits, 4);
  return value;
}

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
AS_DEVICE uint32_t load_mantissas(const unsigned char* at) {
  if (reinterpret_cast<uintptr_t>(at) % 4) __builtin_trap();
  uint32_t v;
  std::memcpy(&v, at, 4);
  return v;
}
AS_DEVICE void copy_ahead16(unsigned char* to, const unsigned char* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) __builtin_trap();
  std::memcpy(to, from, 16);
}
AS_DEVICE void copy_ahead4(unsigned char* to, const unsigned char* from) {
  if (reinterpret_cast<uintptr_t>(to) % 4 || reinterpret_cast<uintptr_t>(from) % 4) __builtin_trap();
  std::memcpy(to, from, 4);
}
AS_DEVICE void end_copies() {}
template <int LATER>
AS_DEVICE void await_copies() {}
AS_DEVICE const unsigned char* settled(const unsigned char* at) { return at; }
AS_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
AS_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = (uint64_t)high << 32 | low;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return v;
}
AS_DEVICE uint16_t to_half(float value) {
  const _Float16 h = value;
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
AS_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t v = 0;
  for (int i = 0; i < 2; ++i) {
    // Two halves' product is exact in float32, and this sum in float64: one rounding.
    const double sum = (double)half_to_float(a >> 16 * i & 0xffff) * half_to_float(b >> 16 * i & 0xffff) +
                       half_to_float(c >> 16 * i & 0xffff);
    v |= (uint32_t)to_half((float)sum) << 16 * i;
  }
  return v;
}
AS_DEVICE uint32_t half2_multiply(uint32_t a, uint32_t b) { return half2_fma(a, b, 0); }

AS_DEVICE void multiply_tile(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static std::vector<std::array<uint32_t, 6>> posted;
  posted.resize(emulate::threads.size());
  posted[emulate::current] = {a0, a1, a2, a3, b0, b1};
  emulate::wait_warp();
  const int lane = threadIdx.x & 31, base = emulate::current / 32 * 32, row = lane >> 2, pair = lane & 3;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * pair + (e & 1), second = e >> 1;
    float total = sum[e];
    for (int k = 0; k < 16; ++k) {
      const auto& a = posted[base + row * 4 + k % 8 / 2];
      const auto& b = posted[base + column * 4 + k % 8 / 2];
      total += half_to_float(a[second + (k >= 8 ? 2 : 0)] >> 16 * (k & 1) & 0xffff) *
               half_to_float(b[4 + (k >= 8)] >> 16 * (k & 1) & 0xffff);
    }
    sum[e] = total;
  }
  emulate::wait_warp();
}
