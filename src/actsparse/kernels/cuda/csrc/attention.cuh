// One token's attention over the cache, with the rotary embedding and the cache's new entry; and the embedding.
// Letters: K key/value heads, G query heads of one key/value head in a block (AS_GROUP), D head dimension, L cache length.
constexpr int G = AS_GROUP;

struct Attention {
  const float* q;           // [S, heads * D]
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
  float* partial;           // [K * subgroups, splits, G, D + 2]
  u32* arrived;             // [K * subgroups], 0 before and after
  int q_splits, k_splits, v_splits, heads, kv_heads, head_dim, length, window, splits, subgroups;
  float scale, q_eps, k_eps;
};

// One head by one warp: parts summed, normalised, rotated, into shared memory.
AS_DEVICE void prepare_head(const float* parts, int splits, i64 stride, const float* norm, float eps, const float* cosine,
                            const float* sine, int size, float factor, float* to) {
  const int lane = threadIdx.x & 31, half = size / 2;
  float square = 0.0f;
  for (int d = lane; d < size; d += 32) {
    float v = 0.0f;
    for (int s = 0; s < splits; ++s) v += parts[s * stride + d];
    to[d] = v;
    square += v * v;
  }
  float scale = 1.0f;
  if (norm) scale = rsqrtf(warp_sum(square) / size + eps);
  __syncwarp();
  for (int d = lane; d < half; d += 32) {
    const float a = to[d] * scale * (norm ? norm[d] : 1.0f), b = to[d + half] * scale * (norm ? norm[d + half] : 1.0f);
    const float c = cosine ? cosine[d] : 1.0f, s = cosine ? sine[d] : 0.0f;
    to[d] = (a * c - b * s) * factor;
    to[d + half] = (b * c + a * s) * factor;
  }
  __syncwarp();
}

constexpr int EARLY = 4;          // positions of a slot whose keys and values are read before the previous kernel is done
constexpr int LEAST = 256;        // positions that a block takes before another one joins

// Grid: K * subgroups, splits.  Slots of lanes take positions in turns and keep their own maximum and sum.  The last block of
// a head to arrive adds the others' results up, in their order.
AS_KERNEL(256, 2) attention_kernel(AS_PARAMETER Attention p) {
  AS_SHARED;
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, size = p.head_dim;
  const int head = blockIdx.x / p.subgroups, subgroup = blockIdx.x - head * p.subgroups;
  let_next_start();
  // Token and position come from the host, older keys and values from earlier steps: none of this needs to wait.
  const int position = p.state[1];
  const int oldest = p.window && position + 1 > p.window ? position + 1 - p.window : 0, total = position + 1 - oldest;
  int splits = (total + LEAST - 1) / LEAST;
  splits = splits < p.splits ? splits : p.splits;
  const int split = blockIdx.y;
  if (split >= splits) return;
  const int begin = oldest + (int)((i64)total * split / splits), end = oldest + (int)((i64)total * (split + 1) / splits);
  const int chunks = size / 8;  // 16-byte pieces of a head
  int lanes = 1;
  while (lanes < chunks) lanes <<= 1;
  const int slots = blockDim.x / lanes, slot = threadIdx.x / lanes, piece = threadIdx.x & (lanes - 1);

  float* const q = shared;                                    // [G, D]
  float* const key = q + G * size;                            // [D]
  u16* const fresh = reinterpret_cast<u16*>(key + size);      // [2, D] this token's key and value, rounded
  float* const gathered = key + 2 * size;                     // [slots, G, D]
  float* const top = gathered + slots * G * size;             // [slots, G] maximum, then [slots, G] sum
  float* const weight = top + slots * G;
  u16* const keys = p.keys + (i64)head * p.length * size;
  u16* const values = p.values + (i64)head * p.length * size;
  Vec8 early[2 * EARLY];
#pragma unroll
  for (int n = 0; n < EARLY; ++n) {
    const int at = begin + n * slots + slot;
    if (at < end && at < position && piece < chunks) {
      early[n] = *reinterpret_cast<const Vec8*>(keys + (i64)at * size + 8 * piece);
      early[EARLY + n] = *reinterpret_cast<const Vec8*>(values + (i64)at * size + 8 * piece);
    }
  }
  const float* const cosine = p.cosine ? p.cosine + (i64)position * (size / 2) : nullptr;
  const float* const sine = p.cosine ? p.sine + (i64)position * (size / 2) : nullptr;
  const int first = (head * p.subgroups + subgroup) * G;
  wait_for_previous();
  for (int g = warp; g <= G + 1; g += warps) {
    if (g < G) {
      prepare_head(p.q + (i64)(first + g) * size, p.q_splits, (i64)p.heads * size, p.q_norm, p.q_eps, cosine, sine, size,
                   p.scale, q + g * size);
    } else if (g == G) {
      prepare_head(p.k + (i64)head * size, p.k_splits, (i64)p.kv_heads * size, p.k_norm, p.k_eps, cosine, sine, size, 1.0f,
                   key);
      for (int d = threadIdx.x & 31; d < size; d += 32) fresh[d] = narrow(key[d]);
    } else {
      for (int d = threadIdx.x & 31; d < size; d += 32) {
        float v = 0.0f;
        for (int s = 0; s < p.v_splits; ++s) v += p.v[((i64)s * p.kv_heads + head) * size + d];
        fresh[size + d] = narrow(v);
      }
    }
  }
  __syncthreads();
  if (end == position + 1 && subgroup == 0)
    for (int d = threadIdx.x; d < size; d += blockDim.x) {
      keys[(i64)position * size + d] = fresh[d];
      values[(i64)position * size + d] = fresh[size + d];
    }
  float sum[G][8], highest[G], added[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    highest[g] = -3.0e38f;
    added[g] = 0.0f;
    for (int e = 0; e < 8; ++e) sum[g][e] = 0.0f;
  }
  const int turns = (end - begin + slots - 1) / slots;
#pragma unroll 4
  for (int n = 0; n < turns; ++n) {
    const int at = begin + n * slots + slot;
    const bool there = at < end && piece < chunks;
    Vec8 k, v;
    for (int e = 0; e < 4; ++e) k.w[e] = v.w[e] = 0;
    if (there) {
      if (at == position) {
        k = *reinterpret_cast<const Vec8*>(fresh + 8 * piece);
        v = *reinterpret_cast<const Vec8*>(fresh + size + 8 * piece);
      } else if (n < EARLY) {
#pragma unroll
        for (int m = 0; m < EARLY; ++m)
          if (m == n) k = early[m], v = early[EARLY + m];
      } else {
        k = *reinterpret_cast<const Vec8*>(keys + (i64)at * size + 8 * piece);
        v = *reinterpret_cast<const Vec8*>(values + (i64)at * size + 8 * piece);
      }
    }
    float wide[8];
    for (int e = 0; e < 4; ++e) widen2(k.w[e], wide[2 * e], wide[2 * e + 1]);
    float dot[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      dot[g] = 0.0f;
      if (there)
        for (int e = 0; e < 8; ++e) dot[g] += q[g * size + 8 * piece + e] * wide[e];
      for (int offset = lanes / 2; offset; offset >>= 1) dot[g] += __shfl_xor_sync(0xffffffffu, dot[g], offset);
    }
    if (at >= end) continue;
    for (int e = 0; e < 4; ++e) widen2(v.w[e], wide[2 * e], wide[2 * e + 1]);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float higher = fmaxf(highest[g], dot[g]), factor = expf(highest[g] - higher), e0 = expf(dot[g] - higher);
      highest[g] = higher;
      added[g] = added[g] * factor + e0;
      for (int e = 0; e < 8; ++e) sum[g][e] = sum[g][e] * factor + e0 * wide[e];
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (piece < chunks)
      for (int e = 0; e < 8; ++e) gathered[((i64)slot * G + g) * size + 8 * piece + e] = sum[g][e];
    if (piece == 0) {
      top[slot * G + g] = highest[g];
      weight[slot * G + g] = added[g];
    }
  }
  __syncthreads();
  float* const mine = p.partial + ((i64)blockIdx.x * p.splits + split) * G * (size + 2);
  for (int at = threadIdx.x; at < G * size; at += blockDim.x) {
    const int g = at / size, d = at - g * size;
    float most = -3.0e38f, numerator = 0.0f, denominator = 0.0f;
    for (int s = 0; s < slots; ++s) most = fmaxf(most, top[s * G + g]);
    for (int s = 0; s < slots; ++s) {
      const float e = expf(top[s * G + g] - most);
      numerator += e * gathered[((i64)s * G + g) * size + d];
      denominator += e * weight[s * G + g];
    }
    if (splits == 1) {
      p.y[(i64)(first + g) * size + d] = numerator / denominator;
    } else {
      mine[g * (size + 2) + d] = numerator;
      if (d == 0) {
        mine[g * (size + 2) + size] = most;
        mine[g * (size + 2) + size + 1] = denominator;
      }
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  u32* const last = reinterpret_cast<u32*>(q);
  if (threadIdx.x == 0) *last = atomicAdd(p.arrived + blockIdx.x, 1u) == (u32)splits - 1u;
  __syncthreads();
  if (!*last) return;
  __threadfence();
  const volatile float* const all = p.partial + (i64)blockIdx.x * p.splits * G * (size + 2);
  for (int at = threadIdx.x; at < G * size; at += blockDim.x) {
    const int g = at / size, d = at - g * size;
    float highest = -3.0e38f, numerator = 0.0f, denominator = 0.0f;
    for (int s = 0; s < splits; ++s) highest = fmaxf(highest, all[((i64)s * G + g) * (size + 2) + size]);
    for (int s = 0; s < splits; ++s) {
      const volatile float* const one = all + ((i64)s * G + g) * (size + 2);
      const float e = expf(one[size] - highest);
      numerator += e * one[d];
      denominator += e * one[size + 1];
    }
    p.y[(i64)(first + g) * size + d] = numerator / denominator;
  }
  if (threadIdx.x == 0) p.arrived[blockIdx.x] = 0u;
}

struct Embedding {
  const u16* w;             // [V, stride]
  const int* state;
  float* y;                 // [H]
  i64 stride;
  int size;
};

AS_KERNEL(256, 1) embedding_kernel(AS_PARAMETER Embedding p) {
  let_next_start();
  wait_for_previous();
  const u32* const row = reinterpret_cast<const u32*>(p.w + (i64)p.state[0] * p.stride);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (2 * i < p.size) widen2(row[i], p.y[2 * i], p.y[2 * i + 1]);
}
