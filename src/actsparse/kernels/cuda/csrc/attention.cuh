// One token's attention over the cache, with the rotary embedding and the cache's new entry; and the embedding.
// Letters: K key/value heads, G query heads of one key/value head in a block (AS_GROUP), D head dimension, L cache length.
constexpr int G = AS_GROUP;
constexpr int HELD = G < 4 ? G : 4;  // heads whose queries are in registers

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
  float* partial;           // [K * subgroups, splits, G, D + 2], at most 32 splits
  u32* arrived;             // [K * subgroups], 0 before and after
  int q_splits, k_splits, v_splits, heads, kv_heads, head_dim, length, window, splits, subgroups;
  float scale, q_eps, k_eps;
};

// One head by one warp: parts summed into shared memory.  A lane takes four neighbours, all loads of theirs under way together.
// `first` is the head's first value.
AS_DEVICE void sum_head(const float* from, i64 first, int splits, i64 stride, int size, float* to) {
  if (splits == 0) {
    const i64* const sums = reinterpret_cast<const i64*>(from) + first;
    for (int q = threadIdx.x & 31; q < size / 4; q += 32) {
      const SumPair a = load_sums(sums + 4 * q), b = load_sums(sums + 4 * q + 2);
      reinterpret_cast<float4*>(to)[q] = make_float4(from_sum(a.low), from_sum(a.high), from_sum(b.low), from_sum(b.high));
    }
    return __syncwarp();
  }
  const float* const parts = from + first;
  for (int q = threadIdx.x & 31; q < size / 4; q += 32) {
    float4 v = quad_at(parts, q);
#pragma unroll 4
    for (int s = 1; s < splits; ++s) {
      const float4 part = quad_at(parts + s * stride, q);
      v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
    }
    reinterpret_cast<float4*>(to)[q] = v;
  }
  __syncwarp();
}

// Then normalised and rotated.
AS_DEVICE void turn_head(const float* norm, float eps, const float* cosine, const float* sine, int size, float scale, float* to) {
  const int lane = threadIdx.x & 31, half = size / 2;
  if (norm) {
    float square = 0.0f;
    for (int d = lane; d < size; d += 32) square += to[d] * to[d];
    const float rms = rsqrtf(warp_sum(square) / size + eps);
    for (int d = lane; d < size; d += 32) to[d] *= rms * norm[d];
    __syncwarp();
  }
  for (int d = lane; d < half; d += 32) {
    const float a = to[d], b = to[d + half], c = cosine ? cosine[d] : 1.0f, s = cosine ? sine[d] : 0.0f;
    to[d] = (a * c - b * s) * scale;
    to[d + half] = (b * c + a * s) * scale;
  }
  __syncwarp();
}

// Positions whose keys and values are held at a time, twice over: while one lot is used, the next comes in.  Up to twice as many
// are one lot.
AS_DEVICE int together_of(int size) { return AS_LOT / size; }

struct Lots {               // a block's positions, in lots
  const u16* keys;
  const u16* values;
  u16* to;                  // [2 buffers, keys and values, together, D]
  int begin, end, size, together;

  AS_MEMBER int count() const { return (end - begin + together - 1) / together; }
  AS_MEMBER u16* buffer(int lot) const { return to + (i64)(lot & 1) * 2 * together * size; }

  AS_MEMBER void copy(int lot) const {
    if (lot < count()) {
      const int from = begin + lot * together, positions = end - from < together ? end - from : together;
      u16* const k = buffer(lot);
#pragma unroll 1
      for (int i = threadIdx.x; i < positions * size / 8; i += blockDim.x) {
        copy_async(k + 8 * i, keys + (i64)from * size + 8 * i);
        copy_async(k + together * size + 8 * i, values + (i64)from * size + 8 * i);
      }
    }
    close_copies();
  }
};

AS_DEVICE void copy_floats(float* to, const float* from, int count) {  // a multiple of four
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x) copy_async(to + 4 * i, from + 4 * i);
}

// A block for every group of query heads and split of the positions; the last block of a group to arrive adds the others'
// results up, in their order.
AS_KERNEL(256, 2) attention_kernel(AS_PARAMETER Attention p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, size = p.head_dim, half = size / 2;
  const int groups = p.kv_heads * p.subgroups, number = blockIdx.x % groups, split = blockIdx.x / groups;
  const int head = number / p.subgroups, subgroup = number - head * p.subgroups;
  // Neither the position nor what the cache holds comes from the kernel before: both are read while that still runs.
  const int position = p.state[1], lot_size = together_of(size);
  const int oldest = p.window && position + 1 > p.window ? position + 1 - p.window : 0, total = position + 1 - oldest;
  int splits = (total + 2 * lot_size - 1) / (2 * lot_size);
  splits = splits < p.splits ? splits : p.splits;
  const bool idle = split >= splits;
  const int begin = oldest + share_of(total, split, splits), end = oldest + share_of(total, split + 1, splits);
  const int together = end - begin <= 2 * lot_size ? 2 * lot_size : lot_size;

  float* const q = shared;                                    // [G, D]
  float* const key = q + G * size;                            // [D] this token's
  float* const value = key + size;                            // [D]
  float* const angles = value + size;                         // [2, D / 2] cosines, sines
  float* const norms = angles + size;                         // [2, D] of queries, of keys
  float* const score = norms + 2 * size;                      // [G, 2 lot_size]
  float* const top = score + G * 2 * lot_size;                // [G] running maximum, then [G] sum, then [G] factor
  float* const weight = top + G;
  float* const factor = weight + G;
  float* const gathered = top + 4 * ((3 * G + 3) / 4);        // [warps, G, D]
  u16* const fresh = reinterpret_cast<u16*>(gathered + warps * G * size);  // [2, D] this token's key and value, rounded
  u16* const keys = p.keys + (i64)head * p.length * size;
  u16* const values = p.values + (i64)head * p.length * size;
  const Lots lots{keys, values, fresh + 2 * size, begin, end, size, together};
  if (!idle) {
    if (p.cosine) {
      copy_floats(angles, p.cosine + (i64)position * half, half);
      copy_floats(angles + half, p.sine + (i64)position * half, half);
    }
    if (p.q_norm) copy_floats(norms, p.q_norm, size);
    if (p.k_norm) copy_floats(norms + size, p.k_norm, size);
    lots.copy(0);
    lots.copy(1);
  }
  wait_for_previous();
  if (idle) return linger();
  wait_for_copies<1>();  // all but the second lot
  __syncthreads();

  const int first = number * G;
  const float* const cosine = p.cosine ? angles : nullptr;
#pragma unroll 1
  for (int g = warp; g < G + 2; g += warps) {
    if (hidden(g) < G) {  // hidden: no jump by a table
      sum_head(p.q, (i64)(first + g) * size, p.q_splits, (i64)p.heads * size, size, q + g * size);
      turn_head(p.q_norm ? norms : nullptr, p.q_eps, cosine, angles + half, size, p.scale, q + g * size);
    } else if (hidden(g) == G) {
      sum_head(p.k, (i64)head * size, p.k_splits, (i64)p.kv_heads * size, size, key);
      turn_head(p.k_norm ? norms + size : nullptr, p.k_eps, cosine, angles + half, size, 1.0f, key);
    } else {
      sum_head(p.v, (i64)head * size, p.v_splits, (i64)p.kv_heads * size, size, value);
    }
  }
  if ((int)threadIdx.x < G) {
    top[threadIdx.x] = -3.0e38f;
    weight[threadIdx.x] = 0.0f;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < size; d += blockDim.x) {
    const u16 k16 = narrow(key[d]), v16 = narrow(value[d]);
    fresh[d] = k16;
    fresh[size + d] = v16;
    if (end == position + 1 && subgroup == 0) {
      keys[(i64)position * size + d] = k16;
      values[(i64)position * size + d] = v16;
    }
  }
  const int chunks = size / 8;  // 16-byte pieces of a head
  int lanes = 1;
  while (lanes < chunks) lanes <<= 1;
  const int slots = blockDim.x / lanes, slot = threadIdx.x / lanes, piece = threadIdx.x & (lanes - 1);
  const bool inside = piece < chunks;
  float mine[HELD][8], sum[G][8];
  for (int g = 0; g < HELD; ++g)
    for (int e = 0; e < 8; ++e) mine[g][e] = inside ? q[g * size + 8 * piece + e] : 0.0f;
  for (int g = 0; g < G; ++g)
    for (int e = 0; e < 8; ++e) sum[g][e] = 0.0f;
  __syncthreads();

#pragma unroll 1
  for (int lot = 0; lot < lots.count(); ++lot) {
    const int from = begin + lot * together, count = end - from < together ? end - from : together;
    const u16* const held = lots.buffer(lot);
    if (lot) {
      wait_for_copies<1>();
      __syncthreads();
    }
#pragma unroll 2
    for (int base = 0; base < count; base += slots) {
      const int at = base + slot;
      float dot[G];
      for (int g = 0; g < G; ++g) dot[g] = 0.0f;
      if (at < count && inside) {
        const Vec8 w = *reinterpret_cast<const Vec8*>((from + at == position ? fresh : held + at * size) + 8 * piece);
        float v[8];
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
        for (int g = 0; g < G; ++g)
          for (int e = 0; e < 8; ++e) dot[g] += (g < HELD ? mine[g][e] : q[g * size + 8 * piece + e]) * v[e];
      }
      for (int g = 0; g < G; ++g) {
        for (int offset = lanes / 2; offset; offset >>= 1) dot[g] += __shfl_xor_sync(0xffffffffu, dot[g], offset);
        if (piece == 0 && at < count) score[g * together + at] = dot[g];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int g = warp; g < G; g += warps) {
      float highest = top[g];
      for (int i = lane; i < count; i += 32) highest = fmaxf(highest, score[g * together + i]);
      for (int offset = 16; offset; offset >>= 1)
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
      float added = 0.0f;
      for (int i = lane; i < count; i += 32) {
        const float e = expf(score[g * together + i] - highest);
        score[g * together + i] = e;
        added += e;
      }
      added = warp_sum(added);
      if (lane == 0) {
        factor[g] = expf(top[g] - highest);
        weight[g] = weight[g] * factor[g] + added;
        top[g] = highest;
      }
    }
    __syncthreads();
    for (int g = 0; g < G; ++g)
      for (int e = 0; e < 8; ++e) sum[g][e] *= factor[g];
    if (inside)
#pragma unroll 2
      for (int at = slot; at < count; at += slots) {
        const u16* const row = from + at == position ? fresh + size : held + (together + at) * size;
        const Vec8 w = *reinterpret_cast<const Vec8*>(row + 8 * piece);
        float v[8];
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
        for (int g = 0; g < G; ++g)
          for (int e = 0; e < 8; ++e) sum[g][e] += score[g * together + at] * v[e];
      }
    __syncthreads();
    lots.copy(lot + 2);
  }
  for (int g = 0; g < G; ++g)
    for (int e = 0; e < 8; ++e) {
      float v = sum[g][e];
      for (int offset = lanes; offset < 32; offset <<= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
      if (lane < lanes && inside) gathered[(warp * G + g) * size + 8 * piece + e] = v;
    }
  __syncthreads();
  float* const left = p.partial + ((i64)number * p.splits + split) * G * (size + 2);
  for (int at = threadIdx.x; at < G * size; at += blockDim.x) {
    const int g = at / size, d = at - g * size;
    float v = 0.0f;
    for (int w = 0; w < warps; ++w) v += gathered[(w * G + g) * size + d];
    if (splits == 1)
      p.y[(i64)first * size + at] = v / weight[g];
    else
      left[g * (size + 2) + d] = v;
  }
  if (splits == 1) return;
  if ((int)threadIdx.x < G) {
    left[threadIdx.x * (size + 2) + size] = top[threadIdx.x];
    left[threadIdx.x * (size + 2) + size + 1] = weight[threadIdx.x];
  }
  __threadfence();
  __syncthreads();
  u32* const last = reinterpret_cast<u32*>(factor);
  if (threadIdx.x == 0) *last = atomicAdd(p.arrived + number, 1u) == (u32)splits - 1u;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  // Shares of the splits in each head, then the sums.
  const volatile float* const all = p.partial + (i64)number * p.splits * G * (size + 2);
  float* const share = score;  // [G, splits]
  for (int g = warp; g < G; g += warps) {
    const bool there = lane < splits;
    const float highest_here = there ? all[((i64)lane * G + g) * (size + 2) + size] : -3.0e38f;
    float highest = highest_here;
    for (int offset = 16; offset; offset >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
    const float e = there ? expf(highest_here - highest) : 0.0f;
    const float denominator = warp_sum(there ? e * all[((i64)lane * G + g) * (size + 2) + size + 1] : 0.0f);
    if (there) share[g * splits + lane] = e / denominator;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < G * size; at += blockDim.x) {
    const int g = at / size, d = at - g * size;
    float v = 0.0f;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) v += share[g * splits + s] * all[((i64)s * G + g) * (size + 2) + d];
    p.y[(i64)first * size + at] = v;
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
