// Columns read to a depth each, of nested codes (docs/format.md), on 8-bit tensor cores.  Letters: B rows of x, I inputs, O
// outputs, L planes.
//
// A matrix lies in tiles of 512 outputs; a tile holds of every column one record of L runs, a run being 128 bytes: the tile's
// part of one plane.  A tile has two halves of four groups; the run's bytes are ordered [g 8][half 2][e 2][j 4], byte
// (g, half, e, j) being byte 2 g + e of group (half, j) in the format: a lane's 16 bytes are four words.  Mantissas are
// [tile, I, j 4, half 2].
//
// Every (column, plane) that is read is an entry: the planes' terms (code - 3/2) 4^-p add up to the weight.  The rows of a
// tensor core's product are a half's sixteen words, its depth is entry (of eight) times byte of the word, its columns are byte
// j' times high or low byte of a coefficient, which is zero where j is not j': so a word of codes, masked where it stands, is an
// operand, and coefficients have 16 bits, relative to the largest of the block.  A block's sums are exact integers.
//
// Blocks take even shares of the columns of all tiles in a row, so a block may end one tile and begin the next; the last block
// of a tile to arrive adds the others' parts up, in their order.
constexpr int RUN = 128, PLANE_TILE = 512, MOST_PLANES = 4;
constexpr int PLANE_THREADS = B <= 4 ? 512 : 256, PLANE_WARPS = PLANE_THREADS / 32;
constexpr int HALVES = B <= 2 ? 2 : 1;  // of a tile, by one warp: more rows have more sums
constexpr int STAGES = B == 1 ? 3 : B == 2 ? 4 : 6, STAGE_BYTES = HALVES * 512;  // of a warp's copies under way
constexpr int FOUND_BYTES = B * PLANE_THREADS * 20, COPY_BYTES = PLANE_WARPS * STAGES * STAGE_BYTES;
constexpr int RING_BYTES = FOUND_BYTES > COPY_BYTES ? FOUND_BYTES : COPY_BYTES;
constexpr float MOST_FACTOR = 8355000.0f;  // times 255 below 2^31 - 2^24
constexpr float LEAST_TOP = 1.0e-30f;

#ifndef ACTSPARSE_EMULATE
AS_DEVICE u32 as_bits(float v) { return __float_as_uint(v); }

AS_DEVICE uint2 load_codes(const unsigned char* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

AS_DEVICE uint2 load_mantissas(const unsigned char* at) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

// What another block of the same launch has written.
AS_DEVICE float load_fresh(const float* at) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at));
  return v;
}

AS_DEVICE void copy_async8(void* to, const void* from) {
  const u32 at = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
}

AS_DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }

// Rounded; not a number becomes 0.
AS_DEVICE int to_integer(float v) { return __float2int_rn(v); }

AS_DEVICE u32 select_bytes(u32 low, u32 high, u32 selector) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(selector));
  return v;
}

// sum plus the four signed bytes of a word.
AS_DEVICE int add_bytes(u32 word, int sum) {
  int v;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(v) : "r"(word), "r"(0x01010101), "r"(sum));
  return v;
}

// sum[16, 8] += a[16, 32] b[32, 8] by one warp, of unsigned and signed bytes.
AS_DEVICE void multiply_tile(int (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

struct PlaneInput {         // x
  const u16* x;             // [B, I], or
  const float* value;       // [B, I] activated and multiplied by
  const float* second;      // [B, I] activated
  const float* norm;        // RMSNorm weight [I], for a value of one row
  int activation, second_activation, size;
  float eps;
};

struct PlaneJob {           // one matrix
  const unsigned char* codes;     // [tile, I, L, RUN]
  const unsigned char* mantissa;  // [tile, I, 8]
  const u16* scale;         // bfloat16 [I]
  const float* threshold;   // [L, I]; null: every plane is read
  const float* center;      // [I]
  const float* start;       // [O]
  const float* residual;    // [B, O]
  float* y;                 // [B, O], or
  u16* rounded;             // [B, O]
  float gain[MOST_PLANES];
  int out, begin;           // outputs; first tile
};

struct Planes {
  PlaneInput input;
  PlaneJob job[3];
  float* parts;             // [blocks + tiles, B, 512]
  u32* arrived;             // [tiles], 0 before and after
  int jobs, rows, planes, blocks;
  int quads;                // I / 4
  int total;                // tiles of all jobs times quads: blocks have shares of this, of at most PLANE_THREADS
  int share, segments;      // quads and tiles that a block may meet
  u32 inverse;              // 2^32 / L, rounded up
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

AS_DEVICE float4 activated(int code, float4 v) {
  return make_float4(activate(code, v.x), activate(code, v.y), activate(code, v.z), activate(code, v.w));
}

AS_DEVICE float4 plane_input(const PlaneInput& in, int b, int i) {
  const i64 at = (i64)b * in.size + i;
  if (in.x) {
    const u32* const from = reinterpret_cast<const u32*>(in.x + at);
    float4 v;
    widen2(from[0], v.x, v.y);
    widen2(from[1], v.z, v.w);
    return v;
  }
  float4 v = quad_at(in.value + at, 0);
  if (in.activation != 5) v = activated(in.activation, v);
  if (in.second) {
    float4 u = quad_at(in.second + at, 0);
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

struct PlaneRoom {          // a block's shared memory
  unsigned char* ring;      // [warps, STAGES, STAGE_BYTES]
  float4* found;            // [B, threads] factors, and
  u32* depth;               // [B, threads] levels, a byte each: in the ring's place
  int* factor;              // [B, entries] of an entry
  u16* run;                 // [entries] column * L + plane, from the block's first column on
  unsigned char* mantissa;  // [columns, 8]
  int* result;              // [segments, B, 512]
  const unsigned char** base;  // [segments] the block's first column's codes, as if it were of that segment's matrix
  u32* most;                // [B, warps]
  int* count;               // [warps]
  float* unit;              // [B]
  int* before;              // [segments] entries of the segment's first warp before its own
  int* bound;               // [segments + 1] where a segment's entries begin
  int* last;                // [segments] whether this block is the last of the segment's tile
  int entries;              // room
};

AS_DEVICE PlaneRoom plane_room(const Planes& p, float* shared) {
  PlaneRoom r;
  r.entries = 4 * p.share * p.planes + 8 * p.segments;  // a multiple of eight
  r.ring = reinterpret_cast<unsigned char*>(shared);
  r.found = reinterpret_cast<float4*>(shared);
  r.depth = reinterpret_cast<u32*>(r.found + B * PLANE_THREADS);
  r.factor = reinterpret_cast<int*>(r.ring + RING_BYTES);
  r.run = reinterpret_cast<u16*>(r.factor + B * r.entries);
  r.mantissa = reinterpret_cast<unsigned char*>(r.run + r.entries);
  r.result = reinterpret_cast<int*>(r.mantissa + 32 * p.share);
  r.base = reinterpret_cast<const unsigned char**>(r.result + p.segments * B * PLANE_TILE);
  r.most = reinterpret_cast<u32*>(r.base + p.segments);
  r.count = reinterpret_cast<int*>(r.most + B * PLANE_WARPS);
  r.unit = reinterpret_cast<float*>(r.count + PLANE_WARPS);
  r.before = reinterpret_cast<int*>(r.unit + B);
  r.bound = r.before + p.segments;
  r.last = r.bound + p.segments + 1;
  return r;
}

struct PlaneShare {         // a block's columns, in quads of all tiles in a row
  int from, end, tile, segments;

  // The thread of a segment's first quad.
  AS_MEMBER int thread_of(int segment, int quads) const { return segment ? (tile + segment) * quads - from : 0; }
};

AS_DEVICE float rms_of(const PlaneInput& in, float* scratch) {
  float square = 0.0f;
  for (int q = threadIdx.x; q < in.size / 4; q += blockDim.x) {
    const float4 v = quad_at(in.value, q);
    square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  return rsqrtf(block_sum(square, scratch) / in.size + in.eps);
}

// Who is read, and how deep: lists in shared memory, eight entries a step, a segment's in whole steps.  In an eight, entries q
// and q + 4 are neighbours: what one lane reads.
AS_DEVICE int place_of_entry(int at) { return (at & ~7) | (at & 3) * 2 | (at >> 2 & 1); }

// The thread's quad of columns is column `column` of its matrix, in the block's segment `segment`.
AS_DEVICE void list_entries(const Planes& p, const PlaneJob& job, const PlaneShare& share, const PlaneRoom& room,
                            const Constants& constants, int column, int segment, bool inside, float rms) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int level[4] = {0, 0, 0, 0};
#pragma unroll 2
  for (int b = 0; b < B; ++b) {
    u32 largest = 0, packed = 0;  // as bits, so that what is no number is larger than any
    float4 factor = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (inside && b < p.rows) {
      const Depth of = depth_of(p, job, constants, plane_input(p.input, b, column), rms);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        level[e] = of.level[e] > level[e] ? of.level[e] : level[e];
        packed |= (u32)of.level[e] << 8 * e;
        const u32 size = as_bits(of.factor[e]) & 0x7fffffffu;
        if (of.level[e] && size > largest) largest = size;
      }
      factor = make_float4(of.factor[0], of.factor[1], of.factor[2], of.factor[3]);
    }
    room.found[b * PLANE_THREADS + threadIdx.x] = factor;
    room.depth[b * PLANE_THREADS + threadIdx.x] = packed;
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) room.most[b * PLANE_WARPS + warp] = largest;
  }
  const int mine = level[0] + level[1] + level[2] + level[3];
  int upto = mine;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == 31) room.count[warp] = upto;
  if (inside && column == 0) room.before[segment] = upto - mine;
  __syncthreads();
  // Entries before the first of a segment; the last one's end is that of all.
  auto begin_of = [&](int s) {
    const int thread = s < share.segments ? share.thread_of(s, p.quads) : PLANE_THREADS;
    int sum = s && s < share.segments ? room.before[s] : 0;
    for (int w = 0; w < thread >> 5; ++w) sum += room.count[w];
    return sum;
  };
  int to = upto - mine;
  for (int w = 0; w < warp; ++w) to += room.count[w];
  for (int s = 0, previous = 0; s < segment; ++s) {  // what fills earlier segments up
    const int next = begin_of(s + 1);
    to += (previous - next) & 7;
    previous = next;
  }
  if (threadIdx.x < 8) {
    int at = 0;
    for (int s = 0, previous = 0; s < share.segments; ++s) {
      if (threadIdx.x == 0) room.bound[s] = at;
      const int next = begin_of(s + 1), count = next - previous, fill = at + count + (int)threadIdx.x;
      at += (count + 7) & ~7;
      previous = next;
      if (fill < at) {
        room.run[place_of_entry(fill)] = (u16)(4 * share.thread_of(s, p.quads) * p.planes);
        for (int b = 0; b < B; ++b) room.factor[b * room.entries + place_of_entry(fill)] = 0;
      }
    }
    if (threadIdx.x == 0) room.bound[share.segments] = at;
  }
#pragma unroll 1
  for (int b = 0; b < B; ++b) {
    const u32 largest = __reduce_max_sync(0xffffffffu, lane < PLANE_WARPS ? room.most[b * PLANE_WARPS + lane] : 0u);
    const bool number = largest < 0x7f800000u;
    const float top = fmaxf(LEAST_TOP, as_float(largest)), inverse = number ? MOST_FACTOR / top : 0.0f;
    // Coefficients are factor x mantissa / 2^16, sums twice theirs.
    if (threadIdx.x == 0) room.unit[b] = number ? top / MOST_FACTOR * (65536.0f / 4.0f / 255.0f) : as_float(0x7fc00000u);
    const float4 four = room.found[b * PLANE_THREADS + threadIdx.x];
    const u32 packed = room.depth[b * PLANE_THREADS + threadIdx.x];
    int at = to;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int factor = to_integer((e == 0 ? four.x : e == 1 ? four.y : e == 2 ? four.z : four.w) * inverse);
      for (int k = 0; k < level[e]; ++k, ++at) {
        const int place = place_of_entry(at);
        if (b == 0) room.run[place] = (u16)((4 * threadIdx.x + e) * p.planes + k);
        const int rounded = k ? (factor + (1 << (2 * k - 1))) >> 2 * k : factor;
        room.factor[b * room.entries + place] = k < (int)(packed >> 8 * e & 255u) ? rounded : 0;
      }
    }
  }
}
