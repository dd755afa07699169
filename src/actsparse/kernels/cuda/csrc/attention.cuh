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

constexpr int TOGETHER = 128;  // positions whose scores are held at a time

// Grid: K * subgroups, splits.  The last block of a head to arrive adds the others' results up, in their order.
AS_KERNEL(256, 1) attention_kernel(AS_PARAMETER Attention p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, size = p.head_dim;
  const int head = blockIdx.x / p.subgroups, subgroup = blockIdx.x - head * p.subgroups;
  let_next_start();
  wait_for_previous();
  const int position = p.state[1];
  const int oldest = p.window && position + 1 > p.window ? position + 1 - p.window : 0, total = position + 1 - oldest;
  int splits = (total + 63) / 64;
  splits = splits < p.splits ? splits : p.splits;
  const int split = blockIdx.y;
  if (split >= splits) return;
  const int begin = oldest + (int)((i64)total * split / splits), end = oldest + (int)((i64)total * (split + 1) / splits);

  float* const q = shared;                                    // [G, D]
  float* const key = q + G * size;                            // [D]
  float* const score = key + size;                            // [G, TOGETHER]
  float* const top = score + G * TOGETHER;                    // [G] running maximum, then [G] sum, then [G] factor
  float* const weight = top + G;
  float* const factor = weight + G;
  u16* const fresh = reinterpret_cast<u16*>(top + 4 * ((3 * G + 3) / 4));  // [2, D] this token's key and value, rounded
  float* const gathered = reinterpret_cast<float*>(fresh + 2 * size);      // [slots, G, D]

  const float* const cosine = p.cosine ? p.cosine + (i64)position * (size / 2) : nullptr;
  const float* const sine = p.cosine ? p.sine + (i64)position * (size / 2) : nullptr;
  const int first = (head * p.subgroups + subgroup) * G;
  for (int g = warp; g <= G; g += warps) {
    if (g < G)
      prepare_head(p.q + (i64)(first + g) * size, p.q_splits, (i64)p.heads * size, p.q_norm, p.q_eps, cosine, sine, size,
                   p.scale, q + g * size);
    else
      prepare_head(p.k + (i64)head * size, p.k_splits, (i64)p.kv_heads * size, p.k_norm, p.k_eps, cosine, sine, size, 1.0f,
                   key);
  }
  __syncthreads();
  u16* const keys = p.keys + (i64)head * p.length * size;
  u16* const values = p.values + (i64)head * p.length * size;
  for (int d = threadIdx.x; d < size; d += blockDim.x) {
    float v = 0.0f;
    for (int s = 0; s < p.v_splits; ++s) v += p.v[((i64)s * p.kv_heads + head) * size + d];
    const u16 k16 = narrow(key[d]), v16 = narrow(v);
    fresh[d] = k16;
    fresh[size + d] = v16;
    if (end == position + 1 && subgroup == 0) {
      keys[(i64)position * size + d] = k16;
      values[(i64)position * size + d] = v16;
    }
  }
  if ((int)threadIdx.x < G) {
    top[threadIdx.x] = -3.0e38f;
    weight[threadIdx.x] = 0.0f;
  }
  const int chunks = size / 8;  // 16-byte pieces of a head
  int lanes = 1;
  while (lanes < chunks) lanes <<= 1;
  if (lanes > 32) lanes = 32;
  const int slots = blockDim.x / lanes, slot = threadIdx.x / lanes, piece = threadIdx.x & (lanes - 1);
  float sum[G][8];
  for (int g = 0; g < G; ++g)
    for (int e = 0; e < 8; ++e) sum[g][e] = 0.0f;
  __syncthreads();

  for (int from = begin; from < end; from += TOGETHER) {
    const int count = end - from < TOGETHER ? end - from : TOGETHER;
    for (int base = 0; base < count; base += slots) {
      const int at = base + slot;
      float dot[G];
      for (int g = 0; g < G; ++g) dot[g] = 0.0f;
      if (at < count && piece < chunks) {
        const u16* row = from + at == position ? fresh : keys + (i64)(from + at) * size;
        const Vec8 w = *reinterpret_cast<const Vec8*>(row + 8 * piece);
        float v[8];
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
        for (int g = 0; g < G; ++g)
          for (int e = 0; e < 8; ++e) dot[g] += q[g * size + 8 * piece + e] * v[e];
      }
      for (int g = 0; g < G; ++g) {
        for (int offset = lanes / 2; offset; offset >>= 1) dot[g] += __shfl_xor_sync(0xffffffffu, dot[g], offset);
        if (piece == 0 && at < count) score[g * TOGETHER + at] = dot[g];
      }
    }
    __syncthreads();
    for (int g = warp; g < G; g += warps) {
      float highest = top[g];
      for (int i = lane; i < count; i += 32) highest = fmaxf(highest, score[g * TOGETHER + i]);
      for (int offset = 16; offset; offset >>= 1)
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
      float added = 0.0f;
      for (int i = lane; i < count; i += 32) {
        const float e = expf(score[g * TOGETHER + i] - highest);
        score[g * TOGETHER + i] = e;
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
    if (piece < chunks) {
      for (int at = slot; at < count; at += slots) {
        const u16* row = from + at == position ? fresh + size : values + (i64)(from + at) * size;
        const Vec8 w = *reinterpret_cast<const Vec8*>(row + 8 * piece);
        float v[8];
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
        for (int g = 0; g < G; ++g)
          for (int e = 0; e < 8; ++e) sum[g][e] += score[g * TOGETHER + at] * v[e];
      }
    }
    __syncthreads();
  }
  if (piece < chunks)
    for (int g = 0; g < G; ++g)
      for (int e = 0; e < 8; ++e) gathered[((i64)slot * G + g) * size + 8 * piece + e] = sum[g][e];
  __syncthreads();
  float* const mine = p.partial + ((i64)blockIdx.x * p.splits + split) * G * (size + 2);
  for (int at = threadIdx.x; at < G * size; at += blockDim.x) {
    const int g = at / size, d = at - g * size;
    float v = 0.0f;
    for (int s = 0; s < slots; ++s) v += gathered[((i64)s * G + g) * size + d];
    if (splits == 1)
      p.y[(i64)(first + g) * size + d] = v / weight[g];
    else
      mine[g * (size + 2) + d] = v;
  }
  if (splits == 1) return;
  if ((int)threadIdx.x < G) {
    mine[threadIdx.x * (size + 2) + size] = top[threadIdx.x];
    mine[threadIdx.x * (size + 2) + size + 1] = weight[threadIdx.x];
  }
  __threadfence();
  __syncthreads();
  u32* const last = reinterpret_cast<u32*>(factor);
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
