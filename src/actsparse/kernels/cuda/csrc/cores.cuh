// CoreInfer's core neurons of a text: a token's strongest ones, counted over the tokens of each part of the text.
struct Levels {
  const u16* value;       // [rows, size]
  u16* level;             // [rows] the strength of a token's weakest core neuron
  float share;            // where count is 0: of the neurons that are not 0, at least one
  int rows, size, count, positive;
};

constexpr int MOST_PARTS = 64;

struct Cores {
  const u16* value;       // [rows, size]
  const u16* level;       // [rows]
  float* sums;            // [parts, 2, size + 1] counts and strengths in units of the levels; last the number of tokens
  int size, positive, parts;
  int stops[MOST_PARTS];  // rows before the end of each part
};

// Two strengths: sizes, or what is positive.  As whole numbers they are in order.
AS_DEVICE u32 strengths_of(u32 pair, int positive) {
  const u32 size = pair & 0x7fff7fffu;
  return positive ? size & ~((pair >> 15 & 0x00010001u) * 0x7fffu) : size;
}

// How many of a block's values hold, in every thread; `mine` below 2^16 in each half of a thread's.
AS_DEVICE int count_halves(u32 mine, int* scratch) {
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const u32 both = __reduce_add_sync(0xffffffffu, (mine & 0xffffu) + (mine >> 16));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[warp] = (int)both;
  __syncthreads();
  int all = 0;
  for (int w = 0; w < warps; ++w) all += scratch[w];
  return all;
}

// A block for each token, which holds its strengths: the largest number that so many of them reach, bit by bit.
AS_KERNEL(256, 4) levels_kernel(AS_PARAMETER Levels p) {
  AS_SHARED;
  wait_for_previous();
  int* const scratch = reinterpret_cast<int*>(shared);  // [32]
  u32* const held = reinterpret_cast<u32*>(shared) + 32;  // [size / 2]
  const u32* const from = reinterpret_cast<const u32*>(p.value + (i64)blockIdx.x * p.size);
  const int pairs = p.size / 2;
  u32 active = 0;
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const u32 pair = strengths_of(from[i], p.positive);
    held[i] = pair;
    active += (pair + 0x7fff7fffu) >> 15 & 0x00010001u;
  }
  int wanted = p.count;
  if (!wanted) {
    const i64 share = to_steps((float)count_halves(active, scratch) * p.share);  // half to even
    wanted = share > 1 ? (int)share : 1;
  }
  u32 level = 0;
#pragma unroll 1
  for (int bit = 14; bit >= 0; --bit) {
    const u32 tried = level | 1u << bit, lift = (0x8000u - tried) * 0x00010001u;
    u32 reached = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) reached += (held[i] + lift) >> 15 & 0x00010001u;
    if (count_halves(reached, scratch) >= wanted) level = tried;
  }
  if (threadIdx.x == 0) p.level[blockIdx.x] = (u16)level;
}

AS_DEVICE float finite_share(float strength, float level) {
  const float share = strength / fmaxf(level, 1.17549435e-38f);
  return share != share ? 0.0f : fminf(share, 3.40282347e38f);
}

// A thread takes two neurons of a part, token after token.
AS_KERNEL(128, 8) cores_kernel(AS_PARAMETER Cores p) {
  wait_for_previous();
  const int part = blockIdx.y, begin = part ? p.stops[part - 1] : 0, end = p.stops[part];
  const int pair = blockIdx.x * blockDim.x + threadIdx.x, pairs = p.size / 2;
  float* const counts = p.sums + (i64)part * 2 * (p.size + 1);
  float* const sums = counts + p.size + 1;
  if (pair == 0) counts[p.size] = sums[p.size] = (float)(end - begin);
  if (pair >= pairs) return;
  const u32* const from = reinterpret_cast<const u32*>(p.value) + pair;
  float count[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f};
#pragma unroll 8
  for (int row = begin; row < end; ++row) {
    const u32 two = strengths_of(from[(i64)row * pairs], p.positive), least = p.level[row];
    float strength[2], level, unused;
    widen2(two, strength[0], strength[1]);
    widen2(least, level, unused);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (strength[e] >= level && strength[e] > 0.0f) count[e] += 1.0f;
      sum[e] += finite_share(strength[e], level);
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    counts[2 * pair + e] = count[e];
    sums[2 * pair + e] = fminf(sum[e], 3.40282347e38f);
  }
}
