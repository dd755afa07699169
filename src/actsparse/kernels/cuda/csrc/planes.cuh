// The product with packed columns, on the lists of depths.cuh; its prologue and what unpacks.
struct PlaneSums {
  float of[4][4][4];        // [group][two of the word's eight codes][row r: x, x; row r + 8: x, x]
  float factors[4][4];      // [group], every row: the sum of its factors
};

// 16 of a warp's entries, four to each lane's quarter: half a tile of outputs.
struct PlaneWords {
  uint2 code[4];
  u32 mantissa[4];
  uint2 factor;
};

// A warp's ring of stages, filled by copies that run ahead: 32 entries each, 64 bytes of codes and four mantissas of an entry.
// Entry 4 q + e lies in row 16 (q / 4) + 4 e + q % 4: lanes that read together meet different banks.
constexpr int STAGES = 5, STAGE = 32, STAGE_BYTES = STAGE * (RUN / 2 + 4);

AS_DEVICE void fill_stage(unsigned char* stage, uint4 run, const unsigned char* codes, const unsigned char* mantissa,
                          u32 inverse) {
  const int lane = threadIdx.x & 31, quad = lane >> 2, chunk = lane & 3;
  const u32 runs[4] = {run.x, run.y, run.z, run.w};
  unsigned char* const to = stage + ((quad >> 2) * 16 + (quad & 3)) * (RUN / 2) + chunk * 16;
#pragma unroll
  for (int e = 0; e < 4; ++e) copy_ahead16(to + e * 4 * (RUN / 2), codes + (unsigned long long)runs[e] * RUN);
  const u32 mine = chunk == 0 ? run.x : chunk == 1 ? run.y : chunk == 2 ? run.z : run.w;
  copy_ahead4(stage + STAGE * (RUN / 2) + lane * 4, mantissa + (unsigned long long)high_product(mine, inverse) * 8);
}

AS_DEVICE void take_words(const unsigned char* stage, int step, int r, int t, PlaneWords& w) {
  const unsigned char* const from = stage + (step * 16 + t) * (RUN / 2) + r * 8;
#pragma unroll
  for (int e = 0; e < 4; ++e) w.code[e] = *reinterpret_cast<const uint2*>(from + e * 4 * (RUN / 2));
  const uint4 four = *reinterpret_cast<const uint4*>(stage + STAGE * (RUN / 2) + (step * 4 + t) * 16);
  w.mantissa[0] = four.x, w.mantissa[1] = four.y, w.mantissa[2] = four.z, w.mantissa[3] = four.w;
}

AS_DEVICE void multiply_words(const PlaneWords& w, PlaneSums& sums) {
  constexpr u32 ONES = 0x3c003c00u;
  const u32 factor[2] = {w.factor.x, w.factor.y};
  u32 shifted[2], mixed[2][2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    shifted[q] = half2_multiply(factor[q], 0xe400e400u);  // -1024
    // Two entries' mantissas of two groups.
    mixed[q][0] = select_bytes(w.mantissa[2 * q], w.mantissa[2 * q + 1], 0x5140u);
    mixed[q][1] = select_bytes(w.mantissa[2 * q], w.mantissa[2 * q + 1], 0x7362u);
  }
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    u32 word[2], b[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const uint2 first = w.code[2 * q], second = w.code[2 * q + 1];
      word[q] = select_bytes(g < 2 ? first.x : first.y, g < 2 ? second.x : second.y, g & 1 ? 0x7632u : 0x5410u);
      // Mantissas as halves: 1024 + m is 0x6400 | m.
      b[q] = half2_fma(select_bytes(mixed[q][g >> 1], 0x64646464u, g & 1 ? 0x4342u : 0x4140u), factor[q], shifted[q]);
    }
    const u32 x = word[0], y = word[1], high_x = x >> 10, high_y = y >> 10;
    multiply_tile(sums.factors[g], ONES, ONES, ONES, ONES, b[0], b[1]);
    multiply_tile(sums.of[g][0], x & 0x00030003u, x & 0x000c000cu, y & 0x00030003u, y & 0x000c000cu, b[0], b[1]);
    multiply_tile(sums.of[g][1], x & 0x00300030u, x & 0x00c000c0u, y & 0x00300030u, y & 0x00c000c0u, b[0], b[1]);
    multiply_tile(sums.of[g][2], x & 0x03000300u, high_x & 0x00030003u, y & 0x03000300u, high_y & 0x00030003u, b[0], b[1]);
    multiply_tile(sums.of[g][3], high_x & 0x000c000cu, high_x & 0x00300030u, high_y & 0x000c000cu, high_y & 0x00300030u, b[0],
                  b[1]);
  }
}

// blockIdx.x is a tile, blockIdx.y a split of the columns.  Two of a block's six warps share a tile, three its entries.
AS_KERNEL(192, 2) planes_kernel(AS_PARAMETER Planes p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half = warp & 1, share = warp >> 1, r = lane >> 2, t = lane & 3;
  const PlaneJob& job = plane_job_of(p, blockIdx.x);
  const int tile = blockIdx.x - job.begin, size = p.input.size, split = blockIdx.y;
  // Copies read 16 bytes a lane.
  const unsigned char* const codes =
      settled(job.codes + (i64)tile * size * p.planes * RUN + half * (RUN / 2) + (lane & 3) * 16);
  const unsigned char* const mantissa = settled(job.mantissa + (i64)tile * size * 8 + half * 4);
  const u32* const run = job.run + (i64)split * p.room;
  const u16* const factor = job.factor + ((i64)split * B + (r < B ? r : 0)) * p.room;
  const bool used = tile * PLANE_TILE + half * (PLANE_TILE / 2) < job.out;
  PlaneSums sums;
#pragma unroll
  for (int e = 0; e < 16; ++e) sums.factors[e / 4][e % 4] = 0.0f;
#pragma unroll
  for (int e = 0; e < 64; ++e) sums.of[e / 16][e / 4 % 4][e % 4] = 0.0f;
  // While kernels before this one run, the memory is idle: most columns' first plane will be needed.
  const int first = split * p.slice, columns = first + p.slice < size ? p.slice : size - first;
  const i64 record = (i64)tile * size + first;
  for (int c = threadIdx.x; c < columns; c += blockDim.x) prefetch(job.codes + (record + c) * p.planes * RUN, RUN);
  if (threadIdx.x == 0) prefetch(job.mantissa + record * 8, (u32)columns * 8);
  wait_for_previous();
  const int fours = job.count[split] >> 2, from = fours * share / SHARES, to = fours * (share + 1) / SHARES;
  if (used && from < to) {
    unsigned char* const ring = reinterpret_cast<unsigned char*>(shared) + warp * STAGES * STAGE_BYTES;
    // Lanes beyond the end take the last four again, with factors of zero.
    auto place = [&](int at) { return at < to ? 4 * at : 4 * (to - 1); };
    auto fill = [&](int at, uint4 runs) {
      if (at < to) fill_stage(ring + (at - from) / 8 % STAGES * STAGE_BYTES, runs, codes, mantissa, p.inverse);
      end_copies();
    };
    auto runs_at = [&](int at) { return *reinterpret_cast<const uint4*>(run + place(at + (lane >> 2))); };
    auto factors_at = [&](int at) { return *reinterpret_cast<const uint2*>(factor + place(at + t)); };
    uint4 ahead = runs_at(from);
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      const uint4 now = ahead;
      ahead = runs_at(from + 8 * (stage + 1));
      fill(from + 8 * stage, now);
    }
    uint2 factors[2] = {factors_at(from), factors_at(from + 4)};
#pragma unroll 1
    for (int at = from; at < to; at += 8) {
      fill(at + 8 * (STAGES - 1), ahead);
      ahead = runs_at(at + 8 * STAGES);
      const uint2 now[2] = {factors[0], factors[1]};
      factors[0] = factors_at(at + 8), factors[1] = factors_at(at + 12);
      await_copies<STAGES - 1>();
      __syncwarp();
      const unsigned char* const stage = ring + (at - from) / 8 % STAGES * STAGE_BYTES;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        if (at + 4 * step >= to) break;
        PlaneWords words;
        take_words(stage, step, r, t, words);
        const bool inside = at + 4 * step + t < to;
        words.factor.x = inside ? now[step].x : 0u, words.factor.y = inside ? now[step].y : 0u;
        multiply_words(words, sums);
      }
      __syncwarp();
    }
  }
  __syncthreads();
  float* const results = shared;  // [share, B, 512]
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      // Code j of a word stands at bit 2 j, or 2 (j - 5) after the shift.
      const int j = e / 4 * 2 + (e >> 1 & 1), b = 2 * t + (e & 1);
      const float power = 16777216.0f / (float)(1 << 2 * (j < 5 ? j : j - 5));
      if (b < B)
        results[(share * B + b) * PLANE_TILE + half * 256 + g * 64 + 16 * (j & 3) + 2 * r + (j >> 2)] =
            sums.of[g][e / 4][e % 4] * power - 1.5f * sums.factors[g][e & 1];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < PLANE_TILE * p.rows; at += blockDim.x) {
    const int b = at / PLANE_TILE, output = tile * PLANE_TILE + at % PLANE_TILE;
    if (output >= job.out) continue;
    float y = 0.0f;
    for (int s = 0; s < SHARES; ++s) y += results[s * B * PLANE_TILE + at];
    y *= job.unit[split * B + b] * (0.5f / 255.0f);
    if (split == 0 && job.start) y += job.start[output];
    job.y[((i64)split * p.rows + b) * job.stride + output] = y;
  }
}

struct Join {               // y = residual + the parts' sum, in 128 values a block
  const float* parts;       // [S, size]
  const float* residual;
  float* y;
  float* squares;           // [blocks] sums of squares, or null
  int splits, size;
};

AS_KERNEL(256, 1) join_kernel(AS_PARAMETER Join p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = blockIdx.x * 32 + lane;
  const bool inside = 4 * quad < p.size;
  wait_for_previous();
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (inside)
#pragma unroll 4
    for (int s = warp; s < p.splits; s += 8) {
      const float4 part = quad_at(p.parts + (i64)s * p.size, quad);
      v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
    }
  reinterpret_cast<float4*>(shared)[threadIdx.x] = v;
  __syncthreads();
  if (warp) return;
  v = inside && p.residual ? quad_at(p.residual, quad) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int s = 0; s < 8; ++s) {
    const float4 part = reinterpret_cast<float4*>(shared)[s * 32 + lane];
    v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
  }
  if (inside) reinterpret_cast<float4*>(p.y)[quad] = v;
  const float square = warp_sum(v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w);
  if (p.squares && lane == 0) p.squares[blockIdx.x] = square;
}

struct Unpack {             // W [I, O] read to so many planes, in 16 bits
  const unsigned char* codes;
  const unsigned char* mantissa;
  const u16* scale;
  u16* w;                   // [columns, O]
  i64 columns;
  int out, planes, read, inputs, begin;
  float gain;
};

// A block has 16 columns of a tile, blockIdx.y; a thread one column, half and r.
AS_KERNEL(256, 4) unpack_kernel(AS_PARAMETER Unpack p) {
  AS_SHARED;
  constexpr int ROOM = PLANE_TILE + 8;
  const int r = threadIdx.x & 7, half = threadIdx.x >> 3 & 1, own = threadIdx.x >> 4, tile = blockIdx.y;
  const int first = tile * PLANE_TILE, outputs = p.out - first < PLANE_TILE ? p.out - first : PLANE_TILE;
  const i64 begin = (i64)blockIdx.x * 16;
  u16* const values = reinterpret_cast<u16*>(shared);  // [16, ROOM]
  if (begin + own < p.columns) {
    const i64 from = (i64)tile * p.inputs + p.begin + begin + own;
    const unsigned char* const codes = p.codes + from * p.planes * RUN + half * (RUN / 2) + r * 8;
    uint2 word[MOST_PLANES];
#pragma unroll
    for (int q = 0; q < MOST_PLANES; ++q)
      if (q < p.read) word[q] = load_codes(codes + q * RUN);
    const u32 mantissas = load_mantissas(p.mantissa + from * 8 + half * 4);
    const float base = as_float((u32)p.scale[p.begin + begin + own] << 16) * p.gain / 255.0f;
    const float step = 1.0f / (float)(1 << (2 * p.read - 1)), low = 0.5f * step - 1.0f;
    u32* const to = reinterpret_cast<u32*>(values + own * ROOM + half * (PLANE_TILE / 2)) + r;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int two = 0; two < 2; ++two) {  // a word has two groups, and of each two outputs with the same k
        u32 code = 0;
#pragma unroll
        for (int q = 0; q < MOST_PLANES; ++q)
          if (q < p.read) code = code << 2 | ((two ? word[q].y : word[q].x) >> 2 * k & 0x03030303u);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float size = base * (float)(mantissas >> 8 * (2 * two + e) & 255u);
          const u32 here = code >> 16 * e;
          to[((2 * two + e) * 64 + 16 * k) / 2] =
              (u32)narrow(size * ((float)(here & 255u) * step + low)) |
              (u32)narrow(size * ((float)(here >> 8 & 255u) * step + low)) << 16;
        }
      }
  }
  __syncthreads();
  const int columns = p.columns - begin < 16 ? (int)(p.columns - begin) : 16;
  u16* const w = p.w + begin * p.out + first;
  if (p.out % 8 == 0) {
    const int pieces = outputs / 8;
    for (int at = threadIdx.x; at < columns * pieces; at += blockDim.x) {
      const int column = at / pieces, piece = at - column * pieces;
      *reinterpret_cast<uint4*>(w + (i64)column * p.out + 8 * piece) =
          *reinterpret_cast<const uint4*>(values + column * ROOM + 8 * piece);
    }
  } else {
    for (int at = threadIdx.x; at < columns * outputs; at += blockDim.x) {
      const int column = at / outputs, output = at - column * outputs;
      w[(i64)column * p.out + output] = values[column * ROOM + output];
    }
  }
}
