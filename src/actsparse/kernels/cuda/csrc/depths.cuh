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
constexpr int PLANE_THREADS = 256, PLANE_WARPS = PLANE_THREADS / 32;
constexpr int ROUNDS = B == 1 ? 2 : 1;  // quads of columns that a thread looks at
constexpr int COUNTS = ROUNDS * PLANE_WARPS;
constexpr int HALVES = B <= 2 ? 2 : 1;  // of a tile, by one warp: more rows have more sums
constexpr int STAGES = B <= 2 ? 5 : 6;  // eights of entries whose codes a warp has under way
constexpr int FOUND_BYTES = B * PLANE_THREADS * 20;
constexpr float MOST_FACTOR = 8355000.0f;  // times 255 below 2^31 - 2^24
constexpr float LEAST_TOP = 1.0e-30f;

#ifndef ACTSPARSE_EMULATE
AS_DEVICE u32 as_bits(float v) { return __float_as_uint(v); }

AS_DEVICE uint2 load_codes(const unsigned char* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

AS_DEVICE uint4 load_codes16(const unsigned char* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

AS_DEVICE uint2 load_mantissas(const unsigned char* at) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

// What another block of the same launch has written.
AS_DEVICE float4 load_fresh(const float* at) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at));
  return v;
}

// One more has arrived, with what its block wrote before its last barrier; how many had.
AS_DEVICE u32 arrive(u32* at) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
  return before;
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
  int even, longer;         // quads of all tiles that a block takes; the first `longer` blocks take one more
  int share, segments;      // quads and tiles that a block may meet
  u32 inverse;              // 2^32 / L, rounded up
};

// The block that takes a quad.
AS_DEVICE int block_of(const Planes& p, int quad) {
  const int rest = quad - p.longer * (p.even + 1);
  return rest < 0 ? quad / (p.even + 1) : p.longer + rest / p.even;
}

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
  float4 v = quad_at(in.value + at, 0), u = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  if (in.second) u = quad_at(in.second + at, 0);
  if (in.activation != 5) v = activated(in.activation, v);
  if (in.second && in.second_activation != 5) u = activated(in.second_activation, u);
  return make_float4(v.x * u.x, v.y * u.y, v.z * u.z, v.w * u.w);
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
  float4* found;            // [B, threads] factors; of parts, sums
  u32* depth;               // [B, threads] levels, a byte each
  int* factor;              // [B, entries] of an entry
  u16* run;                 // [entries] column * L + plane, from the block's first column on
  unsigned char* mantissa;  // [columns, 8]
  int* result;              // [segments, B, 512]
  u32* most;                // [B, COUNTS]
  int* count;               // [COUNTS] entries of a warp in a round
  const unsigned char** base;  // [segments] the block's first column's codes, as if it were of that segment's matrix
  float* unit;              // [B]
  int* before;              // [segments] entries of the segment's first warp before its own
  int* bound;               // [segments + 1] where a segment's entries begin
  int* first;               // [segments] the first block with a share of the tile, and
  int* others;              // [segments] how many others have one
  int* last;                // [segments] whether this one is the last of them to arrive
  int entries;              // room
};

AS_DEVICE PlaneRoom plane_room(const Planes& p, float* shared) {
  PlaneRoom r;
  r.entries = 4 * p.share * p.planes + 8 * p.segments;  // a multiple of eight
  r.found = reinterpret_cast<float4*>(shared);
  r.depth = reinterpret_cast<u32*>(r.found + B * PLANE_THREADS);
  r.factor = reinterpret_cast<int*>(reinterpret_cast<unsigned char*>(shared) + FOUND_BYTES);
  r.run = reinterpret_cast<u16*>(r.factor + B * r.entries);
  r.mantissa = reinterpret_cast<unsigned char*>(r.run + r.entries);
  r.result = reinterpret_cast<int*>(r.mantissa + 32 * p.share);
  r.most = reinterpret_cast<u32*>(r.result + p.segments * B * PLANE_TILE);
  r.count = reinterpret_cast<int*>(r.most + B * COUNTS);
  r.base = reinterpret_cast<const unsigned char**>(r.count + COUNTS);
  r.unit = reinterpret_cast<float*>(r.base + p.segments);
  r.before = reinterpret_cast<int*>(r.unit + B);
  r.bound = r.before + p.segments;
  r.first = r.bound + p.segments + 1;
  r.others = r.first + p.segments;
  r.last = r.others + p.segments;
  return r;
}

struct PlaneShare {         // a block's columns, in quads of all tiles in a row
  int from, end, tile, segments;

  // Where a segment begins.
  AS_MEMBER int begin_of(int segment, int quads) const { return segment ? (tile + segment) * quads - from : 0; }
};

AS_DEVICE float rms_of(const PlaneInput& in, float* scratch) {
  float square = 0.0f;
#pragma unroll 8
  for (int q = threadIdx.x; q < in.size / 4; q += PLANE_THREADS) {
    const float4 v = quad_at(in.value, q);
    square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  return rsqrtf(block_sum(square, scratch) / in.size + in.eps);
}

struct PlaneQuad {          // four columns of a thread
  int tile, column;
  bool inside;
  Constants constants;
  float4 found;             // factors of one row; of more in shared memory
  int level[4];             // of any row
  int upto;                 // entries of the warp up to this thread
};

// How deep a quad is read; its warp's count and largest factor.
AS_DEVICE void choose_levels(const Planes& p, const PlaneJob& job, const PlaneRoom& room, int round, float rms, PlaneQuad& quad) {
  const int lane = threadIdx.x & 31, number = round * PLANE_WARPS + (threadIdx.x >> 5);
#pragma unroll 2
  for (int b = 0; b < B; ++b) {
    u32 largest = 0, packed = 0;  // as bits, so that what is no number is larger than any
    quad.found = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (quad.inside && b < p.rows) {
      const Depth of = depth_of(p, job, quad.constants, plane_input(p.input, b, quad.column), rms);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        quad.level[e] = of.level[e] > quad.level[e] ? of.level[e] : quad.level[e];
        packed |= (u32)of.level[e] << 8 * e;
        const u32 size = as_bits(of.factor[e]) & 0x7fffffffu;
        if (of.level[e] && size > largest) largest = size;
      }
      quad.found = make_float4(of.factor[0], of.factor[1], of.factor[2], of.factor[3]);
    }
    if (B > 1) {
      room.found[b * PLANE_THREADS + threadIdx.x] = quad.found;
      room.depth[b * PLANE_THREADS + threadIdx.x] = packed;
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) room.most[b * COUNTS + number] = largest;
  }
  quad.upto = quad.level[0] + quad.level[1] + quad.level[2] + quad.level[3];
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, quad.upto, offset);
    if (lane >= offset) quad.upto += other;
  }
  if (lane == 31) room.count[number] = quad.upto;
}

// Its entries' place in the list is `to`.
AS_DEVICE void write_entries(const Planes& p, const PlaneRoom& room, int round, const PlaneQuad& quad, const float (&inverse)[B],
                             int to) {
  const int first = 4 * (round * PLANE_THREADS + (int)threadIdx.x);
#pragma unroll 1
  for (int b = 0; b < B; ++b) {
    const float4 found = B > 1 ? room.found[b * PLANE_THREADS + threadIdx.x] : quad.found;
    const u32 packed = B > 1 ? room.depth[b * PLANE_THREADS + threadIdx.x] : 0u;
    int* factors = room.factor + b * room.entries + to;
    u16* runs = room.run + to;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int factor = to_integer((e == 0 ? found.x : e == 1 ? found.y : e == 2 ? found.z : found.w) * inverse[b]);
#pragma unroll
      for (int k = 0; k < MOST_PLANES; ++k)
        if (k < quad.level[e]) {
          if (b == 0) runs[k] = (u16)((first + e) * p.planes + k);
          const int rounded = k ? (factor + (1 << 2 * k >> 1)) >> 2 * k : factor;
          factors[k] = B == 1 || k < (int)(packed >> 8 * e & 255u) ? rounded : 0;
        }
      runs += quad.level[e], factors += quad.level[e];
    }
  }
}

struct PlaneCounts {
  int of[COUNTS];

  AS_MEMBER int before(int number) const {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < COUNTS; ++w) sum += w < number ? of[w] : 0;
    return sum;
  }
};

// Who is read, and how deep: lists in shared memory, a segment's in whole eights.
AS_DEVICE void list_entries(const Planes& p, const PlaneShare& share, const PlaneRoom& room, PlaneQuad (&quad)[ROUNDS],
                            float rms) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  bool some[ROUNDS];        // of the warp's quads are columns
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    some[r] = share.from + r * PLANE_THREADS + 32 * warp < share.end;
    quad[r].level[0] = quad[r].level[1] = quad[r].level[2] = quad[r].level[3] = quad[r].upto = 0;
    if (some[r]) {
      choose_levels(p, plane_job_of(p, quad[r].tile), room, r, rms, quad[r]);
    } else if (lane < B) {
      room.most[lane * COUNTS + r * PLANE_WARPS + warp] = 0u;
      room.count[r * PLANE_WARPS + warp] = 0;
    }
    if (quad[r].inside && quad[r].column == 0)
      room.before[quad[r].tile - share.tile] =
          quad[r].upto - (quad[r].level[0] + quad[r].level[1] + quad[r].level[2] + quad[r].level[3]);
  }
  __syncthreads();
  if (!some[0]) return;
  PlaneCounts counts;
#pragma unroll
  for (int w = 0; w < COUNTS; w += 4) {
    const int4 four = *reinterpret_cast<const int4*>(room.count + w);
    counts.of[w] = four.x, counts.of[w + 1] = four.y, counts.of[w + 2] = four.z, counts.of[w + 3] = four.w;
  }
  // Entries before the first of a segment; the last one's end is that of all.
  auto begin_of = [&](int s) {
    if (s == share.segments) return counts.before(COUNTS);
    return s ? counts.before(share.begin_of(s, p.quads) >> 5) + room.before[s] : 0;
  };
  if (threadIdx.x < 8) {
    int at = 0;
#pragma unroll 1
    for (int s = 0, previous = 0; s < share.segments; ++s) {
      if (threadIdx.x == 0) room.bound[s] = at;
      const int next = begin_of(s + 1), count = next - previous, fill = at + count + (int)threadIdx.x;
      at += (count + 7) & ~7;
      previous = next;
      if (fill < at) {
        room.run[fill] = (u16)(4 * share.begin_of(s, p.quads) * p.planes);
        for (int b = 0; b < B; ++b) room.factor[b * room.entries + fill] = 0;
      }
    }
    if (threadIdx.x == 0) room.bound[share.segments] = at;
  }
  float inverse[B];
#pragma unroll
  for (int b = 0; b < B; ++b) {
    u32 largest = 0;
#pragma unroll
    for (int w = 0; w < COUNTS; w += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(room.most + b * COUNTS + w);
      const u32 two = four.x > four.y ? four.x : four.y, other = four.z > four.w ? four.z : four.w;
      const u32 here = two > other ? two : other;
      largest = here > largest ? here : largest;
    }
    const bool number = largest < 0x7f800000u;
    const float top = fmaxf(LEAST_TOP, as_float(largest));
    inverse[b] = number ? MOST_FACTOR / top : 0.0f;
    // Coefficients are factor x mantissa / 2^16, sums twice theirs.
    if (threadIdx.x == 0) room.unit[b] = number ? top / MOST_FACTOR * (65536.0f / 4.0f / 255.0f) : as_float(0x7fc00000u);
  }
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    if (!some[r]) break;
    const int segment = quad[r].tile - share.tile;
    int to = counts.before(r * PLANE_WARPS + warp) + quad[r].upto -
             (quad[r].level[0] + quad[r].level[1] + quad[r].level[2] + quad[r].level[3]);
#pragma unroll 1
    for (int s = 0, previous = 0; s < segment; ++s) {  // what fills earlier segments up
      const int next = begin_of(s + 1);
      to += (previous - next) & 7;
      previous = next;
    }
    if (quad[r].inside) write_entries(p, room, r, quad[r], inverse, to);
  }
}
