// Vectors to which several blocks add: integers in steps of 2^-30, so that no order changes a bit and nobody waits for anybody.
// A part that is no number, or 2^23 and more, makes its sum one that lies out of range, as does what leaves it later; such
// a sum is read as not a number.  Fewer than 256 parts meet in one between two readings.
constexpr float SUM_STEPS = 1073741824.0f, MOST_PART = 8388608.0f;
constexpr i64 BROKEN_SUM = 1ll << 62;

struct alignas(16) SumPair {
  i64 low, high;
};

#ifndef ACTSPARSE_EMULATE
AS_DEVICE i64 to_steps(float v) { return __float2ll_rn(v); }

// From L2, where they are added.
AS_DEVICE i64 load_sum(const i64* at) {
  i64 v;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(at));
  return v;
}

AS_DEVICE SumPair load_sums(const i64* at) {
  SumPair v;
  asm volatile("ld.global.cg.v2.s64 {%0, %1}, [%2];" : "=l"(v.low), "=l"(v.high) : "l"(at));
  return v;
}

AS_DEVICE void add_steps(i64* at, i64 steps) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(steps) : "memory");
}

AS_DEVICE void put_steps(i64* at, i64 steps) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(steps) : "memory");
}
// What the sum was.
AS_DEVICE i64 add_and_get(i64* at, i64 steps) {
  i64 before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(at), "l"(steps) : "memory");
  return before;
}
#else
AS_DEVICE SumPair load_sums(const i64* at) { return *reinterpret_cast<const SumPair*>(at); }
#endif

AS_DEVICE i64 sum_of(float v) { return absolute(v) < MOST_PART ? to_steps(v * SUM_STEPS) : BROKEN_SUM; }

AS_DEVICE void add_part(i64* at, float part) {
  if (absolute(part) < MOST_PART)
    add_steps(at, to_steps(part * SUM_STEPS));
  else
    put_steps(at, BROKEN_SUM);
}

AS_DEVICE float from_sum(i64 sum) {
  const bool inside = (u32)(sum >> 32) + 0x20000000u < 0x40000000u;
  return inside ? (float)sum * (1.0f / SUM_STEPS) : as_float(0x7fc00000u);
}

// The sum of a vector's squares, for its norm, is kept by those who add to the vector: each adds what the squares of its sums
// have grown by, in integers too, modulo 2^64.  In steps of 2^-20 it stays below that while it is less than 2^23, and in steps
// of 2^-3 always, if no value reaches 2^20 (and there are fewer than 32,768): otherwise the norm is not a number.
constexpr int SQUARE_PLACES = 32;  // [places, 2] and whether a value was too large

AS_DEVICE bool has_square(i64 sum) { return (u32)((int)(sum >> 50) + 1) < 2u; }

AS_DEVICE SumPair square_of(i64 sum) {
  const u64 fine = (u64)((sum + (1 << 9)) >> 10), coarse = (u64)((sum + (1 << 26)) >> 27);
  return SumPair{(i64)(fine * fine), (i64)(coarse * coarse)};
}

AS_DEVICE void grow(SumPair& squares, SumPair by, SumPair from) {
  squares.low = (i64)((u64)squares.low + (u64)by.low - (u64)from.low);
  squares.high = (i64)((u64)squares.high + (u64)by.high - (u64)from.high);
}

AS_DEVICE SumPair warp_total(SumPair v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    SumPair other;
    const u32 low = __shfl_xor_sync(0xffffffffu, (int)(u32)v.low, offset);
    other.low = (i64)((u64)(u32)__shfl_xor_sync(0xffffffffu, (int)(v.low >> 32), offset) << 32 | low);
    const u32 high = __shfl_xor_sync(0xffffffffu, (int)(u32)v.high, offset);
    other.high = (i64)((u64)(u32)__shfl_xor_sync(0xffffffffu, (int)(v.high >> 32), offset) << 32 | high);
    grow(v, other, SumPair{0, 0});
  }
  return v;
}

// A lane's place, and the flag.
struct Squares {
  SumPair own;
  i64 broken;
};

AS_DEVICE Squares load_squares(const i64* squares) {
  return Squares{load_sums(squares + 2 * (threadIdx.x & 31)), load_sum(squares + 2 * SQUARE_PLACES)};
}

// What a vector has to be multiplied with under RMSNorm.
AS_DEVICE float rms_of(const Squares& squares, int size, float eps) {
  const SumPair total = warp_total(squares.own);
  float sum = (float)total.high * 0.015625f;
  if (sum < 2097152.0f) sum = (float)total.low * (1.0f / 1099511627776.0f);
  return squares.broken ? as_float(0x7fc00000u) : rsqrtf(sum / size + eps);
}
