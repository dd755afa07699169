// One token's attention over the cache, with the rotary embedding and the cache's new entry; and the embedding.
// Letters: K key/value heads, G query heads of one key/value head in a block (1 to 8), D head dimension, L cache length.
//
// A warp takes sixteen positions at a time on tensor cores: scores = keys (16 by D) times queries (D by 8 heads), results
// (D by 8 heads) = values (D by 16) times shares (16 by 8).  Queries and shares are not 16-bit numbers: each is the sum of two.
constexpr int D = AS_HEAD_DIM;
constexpr int CHUNKS = D / 8;                  // 16-byte pieces of a head
constexpr int DIM_TILES = (CHUNKS + 1) / 2;    // sixteens of its channels
constexpr int POSITIONS = 16;
constexpr int MOST_GROUP = 8, MOST_SPLITS = 32;
constexpr int HELD_TILES = AS_LOT / (POSITIONS * D);
constexpr int ATTENTION_WARPS = HELD_TILES < 1 ? 1 : HELD_TILES < 12 ? HELD_TILES : 12;
// Eight rows of one piece each lie in different banks: by turns, or because rows are an odd number of pieces long.
constexpr int SWIZZLE = CHUNKS % 8 ? 0 : 7;
constexpr int PITCH = CHUNKS % 8 && CHUNKS % 2 == 0 ? D + 8 : D;
constexpr int PAIRS = (D / 4 + 31) / 32;       // neighbours, and those that they are rotated with, of each lane
constexpr int RESULT = D + 4;                  // floats from one head's results to the next one's
constexpr float LEAST_SCORE = -3.0e38f;
constexpr int ATTENTION_LINGERS = 4000;        // cycles that a block without work stays

struct Attention {
  const float* q;           // [S, heads * D]; where S is 0, one vector of sums
  const float* k;           // [S, K * D]
  const float* v;
  const float* q_norm;      // RMSNorm weights [D], or null
  const float* k_norm;
  const float* cosine;      // [L, D / 2], or null
  const float* sine;
  const int* state;         // token, position
  u16* keys;                // [K, L, D]
  u16* values;
  float* y;                 // [heads * D]
  float* partial;           // [K * subgroups, splits, G * (D + 4)]: results, then maximum and sum of each head
  u32* arrived;             // [K * subgroups], 0 before and after
  int q_splits, k_splits, v_splits, heads, kv_heads, length, window, splits, subgroups, group;
  float scale, q_eps, k_eps;
};

struct alignas(8) FloatPair {
  float low, high;
};

AS_DEVICE u32 narrow2(float low, float high) { return (u32)narrow(low) | (u32)narrow(high) << 16; }

// Two numbers and, in 16 bits, what is left of them.
AS_DEVICE u32 rest2(u32 rounded, float low, float high) {
  float a, b;
  widen2(rounded, a, b);
  return narrow2(low - a, high - b);
}

struct Row {                // of pieces, in a block's shared memory
  int at, turned;

  AS_MEMBER int piece(int number, int zeros) const {
    return CHUNKS % 2 && number == CHUNKS ? zeros : at + 8 * (number ^ turned);
  }
};

AS_DEVICE Row row_of(int rows, int number) { return Row{rows + number * PITCH, number & SWIZZLE}; }

// Sixteen positions' keys or values, by one warp.
AS_DEVICE void copy_positions(u16* to, const u16* from, int positions) {
#pragma unroll 4
  for (int i = threadIdx.x & 31; i < POSITIONS * CHUNKS; i += 32) {
    const int row = i / CHUNKS, piece = i - row * CHUNKS;
    if (row < positions) copy_async(to + row * PITCH + 8 * (piece ^ (row & SWIZZLE)), from + 8 * i);
  }
}

// Of a block's shared memory, in 16-bit values: where each warp's keys and values lie [2, 16, PITCH], the queries [2, G, PITCH],
// 16 bits of each and what is left, this token's key and value [2, D], zeros [D], and floats.
constexpr int OWN = 2 * POSITIONS * PITCH, QUERIES = ATTENTION_WARPS * OWN;
struct Places {
  int fresh, zeros, floats;

  AS_MEMBER explicit Places(int group)
      : fresh(QUERIES + 2 * group * PITCH), zeros(fresh + 2 * D), floats(zeros + D) {}
};

// Where a warp finds a head: a query's, or the key's or value's that come after those.
struct Source {
  const float* from;        // parts or sums
  const float* norm;
  int number, splits, stride;
};

AS_DEVICE Source source_of(const Attention& p, int which, int first, int head) {
  const bool asks = which < p.group, key = which == p.group;
  const int splits = asks ? p.q_splits : key ? p.k_splits : p.v_splits, at = D * (asks ? first + which : head);
  const float* const from = asks ? p.q : key ? p.k : p.v;
  return Source{hidden(from + (splits ? at : 2 * at)), hidden(asks ? p.q_norm : key ? p.k_norm : nullptr), which,
                hidden(splits), hidden(D * (asks ? p.heads : p.kv_heads))};
}

// A head summed, normalised and rotated by one warp: a query, or the new key or value, which goes into the cache
// too, at `cached` unless that is negative.
AS_DEVICE void make_head(const Attention& p, u16* held, const Source& source, const float (&turn)[PAIRS][4], i64 cached) {
  const int lane = threadIdx.x & 31, which = source.number, splits = source.splits;
  const bool asks = which < p.group, key = which == p.group;
  float a[PAIRS][2], b[PAIRS][2], square = 0.0f;
  FloatPair weight[PAIRS][2];
#pragma unroll
  for (int u = 0; u < PAIRS; ++u) {
    const int at = 2 * (lane + 32 * u);
    const bool inside = at < D / 2;
    FloatPair x{0.0f, 0.0f}, z{0.0f, 0.0f};
    weight[u][0] = weight[u][1] = FloatPair{1.0f, 1.0f};
    if (inside && source.norm) {
      weight[u][0] = *reinterpret_cast<const FloatPair*>(source.norm + at);
      weight[u][1] = *reinterpret_cast<const FloatPair*>(source.norm + at + D / 2);
    }
    if (inside && splits == 0) {
      const i64* const sums = reinterpret_cast<const i64*>(source.from) + at;
      const SumPair low = load_sums(sums), high = load_sums(sums + D / 2);
      x = FloatPair{from_sum(low.low), from_sum(low.high)}, z = FloatPair{from_sum(high.low), from_sum(high.high)};
    }
    if (inside)
#pragma unroll 4
      for (int s = 0; s < splits; ++s) {
        const float* const part = source.from + (i64)s * source.stride + at;
        const FloatPair low = *reinterpret_cast<const FloatPair*>(part);
        const FloatPair high = *reinterpret_cast<const FloatPair*>(part + D / 2);
        x.low += low.low, x.high += low.high, z.low += high.low, z.high += high.high;
      }
    a[u][0] = x.low, a[u][1] = x.high, b[u][0] = z.low, b[u][1] = z.high;
    square += x.low * x.low + x.high * x.high + z.low * z.low + z.high * z.high;
  }
  const float rms = source.norm ? rsqrtf(warp_sum(square) / D + (asks ? p.q_eps : p.k_eps)) : 1.0f;
  const float scale = asks ? p.scale : 1.0f;
#pragma unroll
  for (int u = 0; u < PAIRS; ++u) {
    const int at = 2 * (lane + 32 * u);
    if (at >= D / 2) continue;
    float x[2], z[2];
    for (int e = 0; e < 2; ++e) {
      const float low = a[u][e] * rms * (e ? weight[u][0].high : weight[u][0].low);
      const float high = b[u][e] * rms * (e ? weight[u][1].high : weight[u][1].low);
      const float c = asks || key ? turn[u][e] : 1.0f, s = asks || key ? turn[u][2 + e] : 0.0f;
      x[e] = (low * c - high * s) * scale;
      z[e] = (high * c + low * s) * scale;
    }
    for (int part = 0; part < 2; ++part) {
      const int channel = at + part * (D / 2);
      const float v0 = part ? z[0] : x[0], v1 = part ? z[1] : x[1];
      const u32 rounded = narrow2(v0, v1);
      if (asks) {
        const int place = which * PITCH + 8 * (channel / 8 ^ (which & SWIZZLE)) + channel % 8;
        *reinterpret_cast<u32*>(held + QUERIES + place) = rounded;
        *reinterpret_cast<u32*>(held + QUERIES + p.group * PITCH + place) = rest2(rounded, v0, v1);
      } else {
        *reinterpret_cast<u32*>(held + Places(p.group).fresh + (key ? 0 : D) + channel) = rounded;
        if (cached >= 0) *reinterpret_cast<u32*>((key ? p.keys : p.values) + cached + channel) = rounded;
      }
    }
  }
}

AS_DEVICE float over_positions(float v, bool highest) {  // of the lanes with the same heads
#pragma unroll
  for (int offset = 4; offset < 32; offset <<= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = highest ? fmaxf(v, other) : v + other;
  }
  return v;
}

// A block for every group of query heads and split of the positions, whose warps have their own positions and meet in the
// end; the last block of a group to arrive adds the others' results up, in their order.
// Registers belong to the four parts of a multiprocessor: each has to have as many left as if its warps were a quarter.
AS_KERNEL((ATTENTION_WARPS + 3) / 4 * 128, 2) attention_kernel(AS_PARAMETER Attention p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2, column = lane & 3;
  const int groups = p.kv_heads * p.subgroups, number = blockIdx.x % groups, split = blockIdx.x / groups;
  const int head = number / p.subgroups, subgroup = number - head * p.subgroups;
  // Neither the position nor what the cache holds comes from the kernel before: both are read while that still runs.
  const int position = p.state[1];
  const int oldest = p.window && position + 1 > p.window ? position + 1 - p.window : 0, total = position + 1 - oldest;
  int splits = (total + ATTENTION_WARPS * POSITIONS - 1) / (ATTENTION_WARPS * POSITIONS);
  splits = splits < p.splits ? splits : p.splits;
  const bool idle = split >= splits;
  const int begin = oldest + share_of(total, split, splits), end = oldest + share_of(total, split + 1, splits);

  u16* const held = reinterpret_cast<u16*>(shared);
  const Places places(p.group);
  const int own = warp * OWN;
  float* const tops = reinterpret_cast<float*>(held + places.floats);  // [warps, 2, 8] maxima, sums; then [G, splits] shares
  u32* const last = reinterpret_cast<u32*>(tops + MOST_GROUP * MOST_SPLITS);
  const i64 cache = (i64)head * p.length * D;
  int from = begin + warp * POSITIONS;
  float turn[PAIRS][4];
  for (int u = 0; u < PAIRS; ++u) turn[u][0] = turn[u][1] = 1.0f, turn[u][2] = turn[u][3] = 0.0f;
  if (!idle) {
    copy_positions(held + own, p.keys + cache + (i64)from * D, end - from);
    close_copies();
    copy_positions(held + own + OWN / 2, p.values + cache + (i64)from * D, end - from);
    close_copies();
    for (int u = 0; u < PAIRS; ++u) {
      const int at = 2 * (lane + 32 * u);
      if (!p.cosine || at >= D / 2) continue;
      const FloatPair c = *reinterpret_cast<const FloatPair*>(p.cosine + (i64)position * (D / 2) + at);
      const FloatPair s = *reinterpret_cast<const FloatPair*>(p.sine + (i64)position * (D / 2) + at);
      turn[u][0] = c.low, turn[u][1] = c.high, turn[u][2] = s.low, turn[u][3] = s.high;
    }
    for (int i = threadIdx.x; i < D / 2; i += blockDim.x) reinterpret_cast<u32*>(held + places.zeros)[i] = 0u;
  }
  const int first = number * p.group;
  Source source = source_of(p, warp, first, head);  // hidden, lest it is found where it is used
  wait_for_previous();
  if (idle) return linger(ATTENTION_LINGERS);
  const i64 cached = end == position + 1 && subgroup == 0 ? cache + (i64)position * D : -1;
#pragma unroll 1
  while (source.number < p.group + 2) {
    make_head(p, held, source, turn, cached);
    source = source_of(p, source.number + ATTENTION_WARPS, first, head);
  }
  __syncthreads();

  const Row zero{places.zeros, 0};
  const int asked = lane & 7;
  Row query = asked < p.group ? row_of(QUERIES, asked) : zero;
  if (asked < p.group && lane >= 16) query.at += p.group * PITCH;
  float top[2] = {LEAST_SCORE, LEAST_SCORE}, weight[2] = {0.0f, 0.0f}, sum[DIM_TILES][4];
#pragma unroll
  for (int t = 0; t < DIM_TILES; ++t)
    for (int e = 0; e < 4; ++e) sum[t][e] = 0.0f;
#pragma unroll 1
  for (; from < end; from += ATTENTION_WARPS * POSITIONS) {
    const int next = from + ATTENTION_WARPS * POSITIONS;
    const auto held_row = [&](int rows, int fresh, int number) {
      const int at = from + number;
      return at >= end ? zero : at == position ? Row{fresh, 0} : row_of(rows, number);
    };
    wait_for_copies<1>();  // keys
    __syncwarp();
    const Row key = held_row(own, places.fresh, lane & 15);
    float score[4] = {0.0f, 0.0f, 0.0f, 0.0f}, rest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int t = 0; t < DIM_TILES; t += 2) {
      u32 a[2][4], b[2][4];
      for (int u = 0; u < 2; ++u) {
        if (DIM_TILES % 2 && t + u == DIM_TILES) continue;
        load_matrices(a[u], held + key.piece(2 * (t + u) + (lane >> 4), places.zeros));
        load_matrices(b[u], held + query.piece(2 * (t + u) + (lane >> 3 & 1), places.zeros));
      }
      for (int u = 0; u < 2; ++u) {
        if (DIM_TILES % 2 && t + u == DIM_TILES) continue;
        multiply_sixteen(score, a[u], b[u][0], b[u][1]);
        multiply_sixteen(rest, a[u], b[u][2], b[u][3]);
      }
    }
    __syncwarp();
    if (next < end) copy_positions(held + own, p.keys + cache + (i64)next * D, end - next);
    close_copies();
    float share[4], factor[2];
    const bool there[2] = {from + row < end, from + row + 8 < end};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float s0 = score[j] + rest[j], s1 = score[2 + j] + rest[2 + j];
      float highest = fmaxf(there[0] ? s0 : LEAST_SCORE, there[1] ? s1 : LEAST_SCORE);
      highest = fmaxf(top[j], over_positions(highest, true));
      factor[j] = expf(top[j] - highest);
      share[j] = there[0] ? expf(s0 - highest) : 0.0f;
      share[2 + j] = there[1] ? expf(s1 - highest) : 0.0f;
      weight[j] = weight[j] * factor[j] + share[j] + share[2 + j];
      top[j] = highest;
    }
    u32 b[4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const u32 rounded = narrow2(share[2 * e], share[2 * e + 1]);
      b[e] = transposed(rounded);
      b[2 + e] = transposed(rest2(rounded, share[2 * e], share[2 * e + 1]));
    }
    wait_for_copies<1>();  // values
    __syncwarp();
    const Row value = held_row(own + OWN / 2, places.fresh + D, (lane & 7) + (lane >> 4) * 8);
#pragma unroll
    for (int t = 0; t < DIM_TILES; t += 2) {
      u32 a[2][4];
      for (int u = 0; u < 2 && t + u < DIM_TILES; ++u) {
        load_transposed(a[u], held + value.piece(2 * (t + u) + (lane >> 3 & 1), places.zeros));
        for (int e = 0; e < 4; ++e) sum[t + u][e] *= factor[e & 1];
      }
      for (int part = 0; part < 2; ++part)
        for (int u = 0; u < 2 && t + u < DIM_TILES; ++u) multiply_sixteen(sum[t + u], a[u], b[2 * part], b[2 * part + 1]);
    }
    __syncwarp();
    if (next < end) copy_positions(held + own + OWN / 2, p.values + cache + (i64)next * D, end - next);
    close_copies();
  }
  // Each warp's results take the place of its keys and values.
  const int warps = (end - begin + POSITIONS - 1) / POSITIONS, active = warps < ATTENTION_WARPS ? warps : ATTENTION_WARPS;
  if (warp < active) {
    float* const result = reinterpret_cast<float*>(held + own);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int g = 2 * column + j;
      weight[j] = over_positions(weight[j], false);
      if (row == 0) {
        tops[warp * 2 * MOST_GROUP + g] = top[j];
        tops[warp * 2 * MOST_GROUP + MOST_GROUP + g] = weight[j];
      }
      if (g < p.group)
#pragma unroll
        for (int t = 0; t < DIM_TILES; ++t) {
          result[g * RESULT + 16 * t + row] = sum[t][j];
          if (CHUNKS % 2 == 0 || t + 1 < DIM_TILES) result[g * RESULT + 16 * t + row + 8] = sum[t][2 + j];
        }
    }
  }
  __syncthreads();
  float* const left = p.partial + ((i64)number * p.splits + split) * p.group * RESULT;
  for (int i = threadIdx.x; i < p.group * (D / 4); i += blockDim.x) {
    const int g = i / (D / 4), quad = i - g * (D / 4);
    float highest = LEAST_SCORE, denominator = 0.0f;
#pragma unroll 4
    for (int w = 0; w < active; ++w) highest = fmaxf(highest, tops[w * 2 * MOST_GROUP + g]);
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int w = 0; w < active; ++w) {
      const float* const other = reinterpret_cast<const float*>(held + w * OWN);
      const float4 part = quad_at(other + g * RESULT, quad);
      const float factor = expf(tops[w * 2 * MOST_GROUP + g] - highest);
      denominator += factor * tops[w * 2 * MOST_GROUP + MOST_GROUP + g];
      v.x += factor * part.x, v.y += factor * part.y, v.z += factor * part.z, v.w += factor * part.w;
    }
    if (splits == 1) {
      const float by = 1.0f / denominator;
      reinterpret_cast<float4*>(p.y + (i64)first * D)[i] = make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
      continue;
    }
    reinterpret_cast<float4*>(left)[i] = v;
    if (quad == 0) left[p.group * D + 2 * g] = highest, left[p.group * D + 2 * g + 1] = denominator;
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(p.arrived + number, 1u) == (u32)splits - 1u;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  // Shares of the splits in each head, then the sums.
  const float* const all = p.partial + (i64)number * p.splits * p.group * RESULT;
  for (int g = warp; g < p.group; g += ATTENTION_WARPS) {
    const bool there = lane < splits;
    const volatile float* const ends = all + ((i64)lane * RESULT + D) * p.group + 2 * g;
    const float highest_here = there ? ends[0] : LEAST_SCORE, weight_here = there ? ends[1] : 0.0f;
    float highest = highest_here;
    for (int offset = 16; offset; offset >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
    const float e = there ? expf(highest_here - highest) : 0.0f, denominator = warp_sum(e * weight_here);
    if (there) tops[g * splits + lane] = e / denominator;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.group * (D / 4); i += blockDim.x) {
    const float* const share = tops + i / (D / 4) * splits;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float4 part = load_others(all + (i64)s * p.group * RESULT + 4 * i);
      v.x += share[s] * part.x, v.y += share[s] * part.y, v.z += share[s] * part.z, v.w += share[s] * part.w;
    }
    reinterpret_cast<float4*>(p.y + (i64)first * D)[i] = v;
  }
  if (threadIdx.x == 0) p.arrived[number] = 0u;
}

struct Embedding {
  const u16* w;             // [V, stride]
  const int* state;
  float* y;                 // [H], or
  i64* sum;                 // [H] a vector of sums, with
  i64* squares;             // [places, 2], and a flag
  i64 stride;
  int size;
};

AS_KERNEL(256, 2) embedding_kernel(AS_PARAMETER Embedding p) {
  wait_for_previous();
  const u32* const row = reinterpret_cast<const u32*>(p.w + (i64)p.state[0] * p.stride);
  const int end = share_of(p.size / 2, blockIdx.x + 1, gridDim.x);
#pragma unroll 1
  for (int i = share_of(p.size / 2, blockIdx.x, gridDim.x) + threadIdx.x; i < end; i += blockDim.x) {
    float low, high;
    widen2(row[i], low, high);
    if (p.sum)
      p.sum[2 * i] = sum_of(low), p.sum[2 * i + 1] = sum_of(high);
    else
      p.y[2 * i] = low, p.y[2 * i + 1] = high;
  }
  if (p.sum && blockIdx.x == 0) {
    SumPair squares{0, 0};
    bool broken = false;
    for (int i = threadIdx.x; 2 * i < p.size; i += blockDim.x) {
      float value[2];
      widen2(row[i], value[0], value[1]);
      for (int e = 0; e < 2; ++e) {
        const i64 sum = sum_of(value[e]);
        grow(squares, square_of(sum), SumPair{0, 0});
        broken |= !has_square(sum);
      }
    }
    squares = warp_total(squares);
    const int at = threadIdx.x, warps = blockDim.x >> 5;
    if ((at & 31) == 0) *reinterpret_cast<SumPair*>(p.squares + at / 16) = squares;
    if (at < 2 * (SQUARE_PLACES - warps) + 1) p.squares[2 * warps + at] = 0;
    __syncthreads();
    if (broken) p.squares[2 * SQUARE_PLACES] = 1;
  }
}
