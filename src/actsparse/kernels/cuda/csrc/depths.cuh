// Columns read to a depth each, of nested codes (docs/format.md), on tensor cores.  Letters: B rows of x, I inputs, O outputs,
// L planes, S splits.
//
// A matrix lies in tiles of 512 outputs; a tile holds of every column one record of L runs, a run being 128 bytes: the tile's
// part of one plane.  A tile has two halves of four groups; the run's bytes are ordered [half 2][r 8][group 4][h 2], byte
// (half, r, group, h) being byte 2 r + h of that group in the format.  Mantissas are [tile, I, 8].
//
// Every (column, plane) that is read is an entry: the planes' terms (code - 3/2) 4^-p add up to the weight.  Two bits of a
// 16-bit word, masked where they stand, are a subnormal half: that is all the unpacking there is, and sums are corrected by a
// power of two at the end.  The sixteen rows of a tensor core's product are outputs, its depth entries, its columns rows of x,
// so that eight rows cost what one does.  Factors x mantissa are halves relative to the block's largest; sums are float32, in
// a fixed order.
constexpr int RUN = 128, PLANE_TILE = 512, SHARES = 3, LOOK = 1024, MOST_PLANES = 4;

#ifndef ACTSPARSE_EMULATE
AS_DEVICE u32 as_bits(float v) { return __float_as_uint(v); }

AS_DEVICE uint2 load_codes(const unsigned char* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

AS_DEVICE u32 load_mantissas(const unsigned char* at) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}

// Copies into shared memory that go on in the background, in groups.
AS_DEVICE void copy_ahead16(unsigned char* to, const unsigned char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

AS_DEVICE void copy_ahead4(unsigned char* to, const unsigned char* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

AS_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most LATER groups are under way.
template <int LATER>
AS_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// The compiler forgets how an address came about, and keeps it.
AS_DEVICE const unsigned char* settled(const unsigned char* at) {
  asm volatile("" : "+l"(at));
  return at;
}

AS_DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }

AS_DEVICE u32 select_bytes(u32 low, u32 high, u32 selector) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(selector));
  return v;
}

AS_DEVICE u16 to_half(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

AS_DEVICE u32 half2_multiply(u32 a, u32 b) {
  u32 v;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
  return v;
}

AS_DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  u32 v;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}

// sum[16, 8] += a[16, 16] b[16, 8] by one warp.
AS_DEVICE void multiply_tile(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// The power of two at or under a magnitude, and one over a power of two: exact.
AS_DEVICE float exponent_of(float v) { return as_float(as_bits(v) & 0x7f800000u); }
AS_DEVICE float one_over(float power) { return as_float(0x7f000000u - as_bits(power)); }

struct PlaneInput {         // x
  const u16* x;             // [B, I], or
  const float* value;       // [S, B, I] summed, then activated and multiplied by
  const float* second;      // [S, B, I] summed and activated
  const float* norm;        // RMSNorm weight [I]; with
  const float* squares;     // parts of the sum of x's squares
  int splits, second_splits, activation, second_activation, parts, size;
  float eps;
};

struct PlaneJob {           // one matrix
  const unsigned char* codes;     // [tile, I, L, RUN]
  const unsigned char* mantissa;  // [tile, I, 8]
  const u16* scale;         // bfloat16 [I]
  const float* threshold;   // [L, I]; null: every plane is read
  const float* center;      // [I]
  const float* start;       // [O]
  float* y;                 // [S, B, stride]
  u32* run;                 // [S, room] the entries: column * L + plane; a split's are a multiple of four
  u16* factor;              // [S, B, room] halves, relative to
  float* unit;              // [S, B] powers of two
  int* count;               // [S] entries
  float gain[MOST_PLANES];
  i64 stride;
  int out, begin;           // outputs; first tile
};

struct Planes {
  PlaneInput input;
  PlaneJob job[3];
  int jobs, rows, slice, planes;  // slice: columns of a split, a multiple of four, at most LOOK
  u32 inverse;              // 2^32 / L, rounded up
  int room;                 // slice * L
};

AS_DEVICE const PlaneJob& plane_job_of(const Planes& p, int tile) {
  if (p.jobs > 2 && tile >= p.job[2].begin) return p.job[2];
  if (p.jobs > 1 && tile >= p.job[1].begin) return p.job[1];
  return p.job[0];
}

struct Constants {          // of four columns
  float4 center, scale, norm, threshold[MOST_PLANES];
};

AS_DEVICE Constants constants_of(const Planes& p, const PlaneJob& job, int i) {
  Constants c;
  const u32* const scale = reinterpret_cast<const u32*>(job.scale + i);
  c.scale = make_float4(as_float(scale[0] << 16), as_float(scale[0] & 0xffff0000u), as_float(scale[1] << 16),
                        as_float(scale[1] & 0xffff0000u));
  c.center = job.center ? quad_at(job.center, i / 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  c.norm = p.input.norm ? quad_at(p.input.norm, i / 4) : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
#pragma unroll
  for (int k = 0; k < MOST_PLANES; ++k)
    c.threshold[k] = k < p.planes && job.threshold ? quad_at(job.threshold + (i64)k * p.input.size, i / 4)
                                                   : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  return c;
}

AS_DEVICE float4 summed(const float* parts, int splits, i64 apart) {
  float4 v = quad_at(parts, 0);
#pragma unroll 4
  for (int s = 1; s < splits; ++s) {
    const float4 part = quad_at(parts + s * apart, 0);
    v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
  }
  return v;
}

AS_DEVICE float4 activated(int code, float4 v) {
  return make_float4(activate(code, v.x), activate(code, v.y), activate(code, v.z), activate(code, v.w));
}

AS_DEVICE float4 plane_input(const PlaneInput& in, int rows, int b, int i) {
  if (in.x) {
    const u32* const from = reinterpret_cast<const u32*>(in.x + (i64)b * in.size + i);
    float4 v;
    widen2(from[0], v.x, v.y);
    widen2(from[1], v.z, v.w);
    return v;
  }
  const i64 at = (i64)b * in.size + i, apart = (i64)rows * in.size;
  float4 v = summed(in.value + at, in.splits, apart);
  if (in.activation != 5) v = activated(in.activation, v);
  if (in.second) {
    float4 u = summed(in.second + at, in.second_splits, apart);
    if (in.second_activation != 5) u = activated(in.second_activation, u);
    v.x *= u.x, v.y *= u.y, v.z *= u.z, v.w *= u.w;
  }
  return v;
}

struct Depth {              // of four columns in one row: levels, and deviations times scale and gain
  int level[4];
  float factor[4];
};

AS_DEVICE Depth depth_of(const Planes& p, const PlaneJob& job, const Constants& c, float4 x, float rms) {
  const float v[4] = {x.x, x.y, x.z, x.w}, center[4] = {c.center.x, c.center.y, c.center.z, c.center.w};
  const float norm[4] = {c.norm.x, c.norm.y, c.norm.z, c.norm.w}, scale[4] = {c.scale.x, c.scale.y, c.scale.z, c.scale.w};
  Depth d;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float deviation = (p.input.norm ? v[e] * rms * norm[e] : v[e]) - center[e], size = absolute(deviation);
    d.level[e] = 0;
    float gain = 0.0f;
#pragma unroll
    for (int k = 0; k < MOST_PLANES; ++k) {
      const float4 four = c.threshold[k];
      const float least = e == 0 ? four.x : e == 1 ? four.y : e == 2 ? four.z : four.w;
      if (k < p.planes && !(size < least)) {
        d.level[e] = k + 1;
        gain = job.gain[k];
      }
    }
    d.factor[e] = deviation * scale[e] * gain;
  }
  return d;
}

constexpr float LEAST_UNIT = 7.8886090522101181e-31f;  // 2^-100

// Who is read, and how deep: the lists that planes_kernel multiplies by.  blockIdx.x is a matrix, blockIdx.y a split of its
// columns; a thread looks at four.
AS_KERNEL(256, 1) depths_kernel(AS_PARAMETER Planes p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, split = blockIdx.y;
  const PlaneJob& job = p.job[blockIdx.x];
  float* const most = shared;              // [warps, B]
  float* const units = most + 8 * B;       // [B]
  int* const counts = reinterpret_cast<int*>(units + 8);
  float4* const found = reinterpret_cast<float4*>(counts + 8) + threadIdx.x;           // [B] factors, a block's size apart
  u32* const depths = reinterpret_cast<u32*>(found - threadIdx.x + B * blockDim.x) + threadIdx.x;  // [B] levels, a byte each
  const int first = split * p.slice, end = first + p.slice < p.input.size ? first + p.slice : p.input.size;
  const int i = first + 4 * (int)threadIdx.x;
  const bool inside = i < end;
  Constants constants;
  if (inside) constants = constants_of(p, job, i);
  wait_for_previous();
  float rms = 1.0f;
  if (p.input.norm) {
    float square = 0.0f;
    for (int k = lane; k < p.input.parts; k += 32) square += p.input.squares[k];
    rms = rsqrtf(warp_sum(square) / p.input.size + p.input.eps);
  }
  int level[4] = {0, 0, 0, 0};
#pragma unroll 2
  for (int b = 0; b < B; ++b) {
    float largest = 0.0f;
    u32 packed = 0;
    float4 factor = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (inside && b < p.rows) {
      const Depth of = depth_of(p, job, constants, plane_input(p.input, p.rows, b, i), rms);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        level[e] = of.level[e] > level[e] ? of.level[e] : level[e];
        packed |= (u32)of.level[e] << 8 * e;
        const float size = absolute(of.factor[e]);
        if (of.level[e] && size < 3.0e38f) largest = fmaxf(largest, size);
      }
      factor = make_float4(of.factor[0], of.factor[1], of.factor[2], of.factor[3]);
    }
    found[b * blockDim.x] = factor;
    depths[b * blockDim.x] = packed;
    for (int offset = 16; offset; offset >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    if (lane == 0) most[warp * B + b] = largest;
  }
  const int mine = level[0] + level[1] + level[2] + level[3];
  int upto = mine;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == 31) counts[warp] = upto;
  __syncthreads();
  int at = upto - mine, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) at += counts[w];
    total += counts[w];
  }
  if ((int)threadIdx.x < B) {
    float largest = 0.0f;
    for (int w = 0; w < warps; ++w) largest = fmaxf(largest, most[w * B + threadIdx.x]);
    // Factors come under 32 in magnitude, so that 1024 of them is a half, too.
    const float unit = fmaxf(LEAST_UNIT, exponent_of(largest) * 0.0625f);
    units[threadIdx.x] = unit;
    job.unit[split * B + threadIdx.x] = unit;
  }
  if (threadIdx.x == 0) job.count[split] = (total + 3) & ~3;
  __syncthreads();
  if (!mine) return;
  u32* const run = job.run + (i64)split * p.room;
  int to = at;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < level[e]; ++k, ++to) run[to] = (u32)(i + e) * p.planes + k;
  // Whole fours: the last entry again, with factors of zero, fills the list up.
  const u32 final = run[to - 1];
  const bool last = to == total;
  for (int more = total; last && more % 4; ++more) run[more] = final;
#pragma unroll 1
  for (int b = 0; b < B; ++b) {
    u16* const factors = job.factor + ((i64)split * B + b) * p.room;
    const float inverse = one_over(units[b]);
    const float4 four = found[b * blockDim.x];
    const u32 packed = depths[b * blockDim.x];
    to = at;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float factor = (e == 0 ? four.x : e == 1 ? four.y : e == 2 ? four.z : four.w) * inverse;
      for (int k = 0; k < level[e]; ++k, ++to, factor *= 0.25f)
        factors[to] = k < (int)(packed >> 8 * e & 255u) ? to_half(factor) : 0;
    }
    for (int more = total; last && more % 4; ++more) factors[more] = 0;
  }
}
