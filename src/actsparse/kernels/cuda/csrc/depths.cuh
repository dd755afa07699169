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
// Blocks take even shares of the columns of all tiles in a row, so a block may end one tile and begin the next, and warps even
// shares of their block's: each chooses for its own columns, has a list of its own, and begins to load while the others choose.
constexpr int RUN = 128, PLANE_TILE = 512, MOST_PLANES = 4;
constexpr int PLANE_THREADS = 256, PLANE_WARPS = PLANE_THREADS / 32;
constexpr int HALVES = B <= 2 ? 2 : 1;  // of a tile, by one warp: more rows have more sums, and two warps share their lists
constexpr int LISTS = 2 / HALVES;
constexpr int STAGES = B <= 2 ? 5 : 6;  // eights of entries whose codes a warp has under way
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
  const u16* x;             // [B, I], or of one row
  const float* value;       // [I], or
  const i64* sum;           // [I] a vector of sums, activated and multiplied by
  const i64* second;        // [I] activated
  const i64* squares;       // of sums, and
  const float* norm;        // RMSNorm weight [I]
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
  i64* sum;                 // [B, O] is added to
  float* y;                 // [B, O] receives what the sums come to, or
  u16* rounded;             // [B, O] does; neither: they are the result
  float gain[MOST_PLANES];
  int out, begin;           // outputs; first tile
  int kept;                 // whether the sums stay when y has received them; else they are zeros again
};

struct Planes {
  PlaneInput input;
  PlaneJob job[3];
  u32* arrived;             // [tiles], 0 before and after
  i64* clear;               // [cleared] becomes zeros: what the kernel before has read
  i64* squares;             // of the first job's sums
  int jobs, rows, planes, blocks;
  int quads;                // I / 4
  int even, longer;         // quads of all tiles that a block takes; the first `longer` blocks take one more
  int share, segments;      // quads and tiles that a block may meet
  int cleared;
  u32 inverse;              // 2^32 / L, rounded up
};

// The block that takes a quad.
AS_DEVICE int block_of(const Planes& p, int quad) {
  const int rest = quad - p.longer * (p.even + 1);
  return rest < 0 ? quad / (p.even + 1) : p.longer + rest / p.even;
}

AS_DEVICE int job_of(const Planes& p, int tile) {
  return p.jobs > 2 && tile >= p.job[2].begin ? 2 : p.jobs > 1 && tile >= p.job[1].begin ? 1 : 0;
}

struct PlaneRoom {          // a block's shared memory
  int* factor;              // [B, entries] of an entry; as floats first
  u16* run;                 // [entries] column * L + plane, from the block's first column on
  unsigned char* mantissa;  // [columns, 8]
  int* result;              // [segments, B, 512]
  float* start;             // [segments, 512] of tiles whose first columns the block has
  i64* x;                   // [columns] sums, or as floats values
  i64* second;              // [columns]
  float* threshold;         // [L, columns]
  float* center;            // [columns]
  float* norm;              // [columns]
  u16* scale;               // [columns]
  const unsigned char** base;  // [segments] the block's first column's codes, as if it were of that segment's matrix
  u32* most;                // [B, warps] largest factors
  float* unit;              // [B]
  int* bound;               // [warps, segments + 1] where a segment's entries begin
  int* others;              // [segments] how many other blocks have a share of the tile
  int* last;                // [segments] whether this one is the last of them to arrive
  int entries, own;         // room, and a warp's
};

AS_DEVICE PlaneRoom plane_room(const Planes& p, float* shared) {
  PlaneRoom r;
  r.own = 4 * ((p.share + PLANE_WARPS - 1) / PLANE_WARPS) * p.planes + 8 * p.segments;
  r.entries = PLANE_WARPS * r.own;
  r.factor = reinterpret_cast<int*>(shared);
  r.run = reinterpret_cast<u16*>(r.factor + B * r.entries);
  r.mantissa = reinterpret_cast<unsigned char*>(r.run + r.entries);
  r.result = reinterpret_cast<int*>(r.mantissa + 32 * p.share);
  r.start = reinterpret_cast<float*>(r.result + p.segments * B * PLANE_TILE);
  const int columns = 4 * p.share;
  r.x = reinterpret_cast<i64*>(r.start + p.segments * PLANE_TILE);
  r.second = r.x + (p.input.x ? 0 : p.input.value ? columns / 2 : columns);
  r.threshold = reinterpret_cast<float*>(r.second + (p.input.second ? columns : 0));
  r.center = r.threshold + p.planes * columns;
  r.norm = r.center + columns;
  r.scale = reinterpret_cast<u16*>(r.norm + (p.input.norm ? columns : 0));
  r.most = reinterpret_cast<u32*>(r.scale + columns);
  r.base = reinterpret_cast<const unsigned char**>(r.most + B * PLANE_WARPS);
  r.unit = reinterpret_cast<float*>(r.base + p.segments);
  r.bound = reinterpret_cast<int*>(r.unit + B);
  r.others = r.bound + PLANE_WARPS * (p.segments + 1);
  r.last = r.others + p.segments;
  return r;
}

struct PlaneShare {         // a block's columns, in quads of all tiles in a row
  int from, end, tile, segments;

  // The block's column with which a segment begins.
  AS_MEMBER int begin_of(int segment, int quads) const { return segment ? 4 * ((tile + segment) * quads - from) : 0; }
};

struct PlaneWarp {          // a warp's columns, of the block's
  int begin, end;
};

// What does not depend on the kernel before, of a quad of columns of a matrix; `to` is its first column in the block.
AS_DEVICE void copy_constants(const Planes& p, const PlaneJob& job, const PlaneRoom& room, int column, int tile, int to) {
  const int size = p.input.size, columns = 4 * p.share;
  const unsigned char* const mantissa = job.mantissa + 8 * ((i64)(tile - job.begin) * size + column);
  copy_async(room.mantissa + 8 * to, mantissa);
  copy_async(room.mantissa + 8 * to + 16, mantissa + 16);
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int k = 0; k < p.planes; ++k)
    if (job.threshold)
      copy_async(room.threshold + k * columns + to, job.threshold + (i64)k * size + column);
    else
      *reinterpret_cast<float4*>(room.threshold + k * columns + to) = none;
  if (job.center)
    copy_async(room.center + to, job.center + column);
  else
    *reinterpret_cast<float4*>(room.center + to) = none;
  if (p.input.norm) copy_async(room.norm + to, p.input.norm + column);
  *reinterpret_cast<uint2*>(room.scale + to) = load_mantissas(reinterpret_cast<const unsigned char*>(job.scale + column));
}

// x of the warp's columns to shared memory, of one row in 32 bits or more.
AS_DEVICE void copy_inputs(const Planes& p, const PlaneShare& share, const PlaneRoom& room, const PlaneWarp& own) {
  const int lane = threadIdx.x & 31, first = 4 * (share.from - share.tile * p.quads), each = p.input.value ? 4 : 2;
#pragma unroll 1
  for (int to = own.begin + each * lane; to < own.end; to += 32 * each) {
    int at = first + to;
    while (at >= p.input.size) at -= p.input.size;
    if (p.input.value) {
      copy_async(reinterpret_cast<float*>(room.x) + to, p.input.value + at);
    } else {
      copy_async(room.x + to, p.input.sum + at);
      if (p.input.second) copy_async(room.second + to, p.input.second + at);
    }
  }
  close_copies();
}

AS_DEVICE float activated(int code, float v) {
  if (code == 5) return v;
  return code == 0 ? v / (1.0f + expf(-v)) : activate(code, v);
}

// x of a block's column `to`, which is column `at` of the matrix.
AS_DEVICE float plane_input(const Planes& p, const PlaneRoom& room, int b, int to, int at) {
  const PlaneInput& in = p.input;
  if (B > 1 || in.x) {
    float v, unused;
    widen2(b < p.rows ? in.x[(i64)b * in.size + at] : 0, v, unused);
    return v;
  }
  if (in.value) return reinterpret_cast<const float*>(room.x)[to];
  float v = activated(in.activation, from_sum(room.x[to]));
  if (in.second) v *= activated(in.second_activation, from_sum(room.second[to]));
  return v;
}

// How deep the warp's columns are read, the largest of their factors, and their list: a segment's entries in whole eights, of
// every 32 columns plane by plane.  A loop rather than rounds side by side, and constants in shared memory: instructions that
// are met once take four cycles each.
AS_DEVICE void list_entries(const Planes& p, const PlaneShare& share, const PlaneRoom& room, const PlaneWarp& own, float rms) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, columns = 4 * p.share;
  const u32 before = (1u << lane) - 1u;
  float* const factors = reinterpret_cast<float*>(room.factor);
  int* const bound = room.bound + warp * (p.segments + 1);
  int to = warp * room.own;
  u32 largest[B];           // as bits, so that what is no number is larger than any
#pragma unroll
  for (int b = 0; b < B; ++b) largest[b] = 0;
#pragma unroll 1
  for (int s = 0; s < share.segments; ++s) {
    if (lane == 0) bound[s] = to;
    const int begin = share.begin_of(s, p.quads), next = s + 1 < share.segments ? share.begin_of(s + 1, p.quads) : own.end;
    const int low = begin < own.begin ? own.begin : begin, high = next < own.end ? next : own.end, first = to;
    if (low >= high) continue;
    const PlaneJob& job = p.job[job_of(p, share.tile + s)];
    const int shift = s ? -begin : 4 * (share.from - share.tile * p.quads);
#pragma unroll 1
    for (int base = low; base < high; base += 32) {
      const int local = base + lane < high ? base + lane : low;
      const float scale = as_float((u32)room.scale[local] << 16), center = room.center[local];
      const float norm = B == 1 && p.input.norm ? rms * room.norm[local] : 1.0f;
      float threshold[MOST_PLANES], factor[B];
#pragma unroll
      for (int k = 0; k < MOST_PLANES; ++k) threshold[k] = k < p.planes ? room.threshold[k * columns + local] : 0.0f;
      int deepest = 0;
      u32 levels = 0;       // of the rows, four bits each
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const float deviation = plane_input(p, room, b, local, local + shift) * norm - center;
        int level = 0;
        float gain = 0.0f;
#pragma unroll
        for (int k = 0; k < MOST_PLANES; ++k)
          if (k < p.planes && !(absolute(deviation) < threshold[k])) level = k + 1, gain = job.gain[k];
        if (base + lane >= high || b >= p.rows) level = 0;
        factor[b] = deviation * scale * gain;
        deepest = level > deepest ? level : deepest;
        levels |= (u32)level << 4 * b;
        const u32 bits = as_bits(factor[b]) & 0x7fffffffu;
        if (level && bits > largest[b]) largest[b] = bits;
      }
#pragma unroll
      for (int k = 0; k < MOST_PLANES; ++k) {
        if (k >= p.planes) break;
        const u32 read = __ballot_sync(0xffffffffu, deepest > k);
        if (deepest > k) {
          const int at = to + __popc(read & before);
          room.run[at] = (u16)(local * p.planes + k);
#pragma unroll
          for (int b = 0; b < B; ++b)
            factors[b * room.entries + at] =
                B == 1 || k < (int)(levels >> 4 * b & 15u) ? factor[b] * (1.0f / (float)(1 << 2 * k)) : 0.0f;
        }
        to += __popc(read);
      }
    }
    const int fill = (first - to) & 7;
    if (lane < fill) {
      room.run[to + lane] = (u16)(low * p.planes);
      for (int b = 0; b < B; ++b) factors[b * room.entries + to + lane] = 0.0f;
    }
    to += fill;
  }
  if (lane == 0) bound[share.segments] = to;
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const u32 most = __reduce_max_sync(0xffffffffu, largest[b]);
    if (lane == 0) room.most[b * PLANE_WARPS + warp] = most;
  }
  __syncwarp();
}

// The warp's factors to integers, relative to the block's largest, once all warps have chosen.
AS_DEVICE void round_factors(const PlaneShare& share, const Planes& p, const PlaneRoom& room) {
  const int warp = threadIdx.x >> 5, begin = warp * room.own, end = room.bound[warp * (p.segments + 1) + share.segments];
#pragma unroll 1
  for (int b = 0; b < B; ++b) {
    u32 largest = 0;
#pragma unroll
    for (int w = 0; w < PLANE_WARPS; ++w) {
      const u32 here = room.most[b * PLANE_WARPS + w];
      largest = here > largest ? here : largest;
    }
    const bool number = largest < 0x7f800000u;
    const float top = fmaxf(LEAST_TOP, as_float(largest)), inverse = number ? MOST_FACTOR / top : 0.0f;
    // Coefficients are factor x mantissa / 2^16, sums twice theirs.
    if (threadIdx.x == 0) room.unit[b] = number ? top / MOST_FACTOR * (65536.0f / 4.0f / 255.0f) : as_float(0x7fc00000u);
    int* const factor = room.factor + b * room.entries;
#pragma unroll 1
    for (int at = begin + ((int)threadIdx.x & 31); at < end; at += 32)
      factor[at] = to_integer(reinterpret_cast<const float*>(factor)[at] * inverse);
  }
}
