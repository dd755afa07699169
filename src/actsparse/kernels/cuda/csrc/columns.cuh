// The product by columns.  Letters: B rows of x, I inputs, O outputs, S splits.  Sums have a fixed order: no atomics.
struct Columns {
  Input input;
  Candidates candidates;
  Job job[3];
  List list;                // results instead of y: of one job, or of two side by side
  int jobs, splits, rows, slice, tiles;  // slice: most entries a block keeps; tiles: of all jobs, or of each side by side
  int activation, second_activation;
};

// The kept of x under a threshold: this block's even share.
struct Least {              // of a thread's first groups of four inputs, loaded early; here a thread looks at the same ones
  float4 of[EARLY];
};

AS_DEVICE Least load_least(const float* threshold, int size) {
  Least least;
#pragma unroll
  for (int t = 0; t < EARLY; ++t) {
    const int q = t * (int)blockDim.x + (int)threadIdx.x;
    least.of[t] = threshold && 4 * q < size ? quad_at(threshold, q) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  return least;
}

AS_DEVICE Range kept_of_input(const Columns& p, const float* threshold, const Least& early, int split, int* counts, int* index,
                              float* value, const float* x) {
  const int size = p.input.size, half = half_of(size);
  if (B == 1 && size <= MOST_SINGLE)
    return compact_one(size, split, p.splits, counts, index, value,
                       [&](int i, int next) {
                         u32 kept = 0;
#pragma unroll
                         for (int j = 0; j < 8; j += 4, i = next) {
                           if (i >= size) continue;
                           const bool first = i < EARLY * 4 * (int)blockDim.x;
                           const float4 v = *reinterpret_cast<const float4*>(x + place_of(i, half));
                           const float4 t = first || !threshold ? early.of[j / 4] : quad_at(threshold, i / 4);
                           kept |= absolute(v.x) < t.x ? 0u : 1u << j;
                           kept |= absolute(v.y) < t.y ? 0u : 2u << j;
                           kept |= absolute(v.z) < t.z ? 0u : 4u << j;
                           kept |= absolute(v.w) < t.w ? 0u : 8u << j;
                         }
                         return kept;
                       },
                       [&](int i) { return x[place_of(i, half)]; });
  return compact(size, split, p.splits, counts, index, value, [&](int i, int end) {
    Kept k;
    k.index = i;
    k.mask = 0;
    const float least = i < end && threshold ? threshold[i] : 0.0f;
    for (int b = 0; b < B; ++b) {
      const float v = i < end ? x[b * 2 * half + place_of(i, half)] : 0.0f;
      const bool keep = i < end && b < p.rows && !(absolute(v) < least);
      k.value[b] = keep ? v : 0.0f;
      if (keep) k.mask |= 1 << b;
    }
    return k;
  });
}

// sum[b] += this thread's share of the entries times 8 outputs of their columns, which begin at `at`.
template <int TILE>
AS_DEVICE void multiply_entries(const u16* at, i64 stride, const int* index, const float* value, int count, u16* ring,
                                float (&sum)[B][8]) {
  const int groups = blockDim.x / (TILE / 8), group = threadIdx.x / (TILE / 8);
  int ahead = group;
#pragma unroll
  for (int s = 0; s < RING; ++s, ahead += groups) {
    if (ahead < count) copy_async(ring + s * 256, at + index[ahead] * stride);
    close_copies();
  }
#pragma unroll 1
  for (int k = group; k < count; k += RING * groups) {
#pragma unroll
    for (int s = 0; s < RING; ++s, ahead += groups) {
      const int now = k + s * groups;
      wait_for_copies<RING - 1>();
      if (now < count) {
        const Vec8 w = *reinterpret_cast<const Vec8*>(ring + s * 256);
        float v[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
        for (int b = 0; b < B; ++b) {
          const float factor = value[now * B + b];
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[b][e] += factor * v[e];
        }
      }
      if (ahead < count) copy_async(ring + s * 256, at + index[ahead] * stride);
      close_copies();
    }
  }
}

// y = sum over kept i of x_i W[:, i], W stored [I, O]: a block takes one tile of outputs and one split of the kept.
template <int TILE>
AS_DEVICE void columns(const Columns& p, float* shared) {
  constexpr int LANES = TILE / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, first = (threadIdx.x % LANES) * 8;
  const int tile = blockIdx.x % p.tiles, split = blockIdx.x / p.tiles;
  const bool listed = p.list.value;
  Early early;
  Least least, second;
  if (p.candidates.size == 0) {
    early = load_early(p.input);
    least = load_least(listed ? p.job[0].threshold : job_of(p.job, p.jobs, tile).threshold, p.input.size);
    second = load_least(listed && p.jobs > 1 ? p.job[1].threshold : nullptr, p.input.size);
  }
  wait_for_previous();
  if (split >= p.splits) return linger();
  u16* const ring = reinterpret_cast<u16*>(shared) + warp * RING * 256 + 8 * lane;
  float* const scratch = shared + warps * RING * 128;
  float* const sides = scratch + 32;                          // [2, B, TILE] where results form a list
  float* const value = sides + (listed ? 2 * B * TILE : 0);
  int* const index = reinterpret_cast<int*>(value + p.slice * B);
  const int entries = p.slice * (B + 1), sums = warps * B * TILE;  // of a list; of what follows in its place
  float* const x = value + (entries > sums ? entries : sums);
  Range range;
  if (p.candidates.size > 0)
    range = named(p.candidates, p.rows, split, p.splits, reinterpret_cast<int*>(scratch), index, nullptr, value, x);
  else
    load_input(p.input, p.rows, early, x, scratch);
#pragma unroll 1
  for (int side = 0; side < (listed ? p.jobs : 1); ++side) {
    const Job& job = listed ? p.job[side] : job_of(p.job, p.jobs, tile);
    const int begin = (tile - (listed ? 0 : job.begin)) * TILE;
    if (p.candidates.size == 0)
      range = kept_of_input(p, job.threshold, side ? second : least, split, reinterpret_cast<int*>(scratch), index, value, x);
    float sum[B][8];
    for (int b = 0; b < B; ++b)
      for (int e = 0; e < 8; ++e) sum[b][e] = 0.0f;
    if (begin + first < job.out)
      multiply_entries<TILE>(job.w + begin + first, job.stride, index, value, range.count, ring, sum);
    __syncthreads();  // the list is used up: its place holds the warps' sums
    float* const results = value;
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float v = sum[b][e];
        for (int offset = LANES; offset < 32; offset <<= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
        if (lane < LANES) results[(warp * B + b) * TILE + first + e] = v;
      }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < TILE * p.rows; at += blockDim.x) {
      const int b = at / TILE, output = begin + at % TILE;
      if (output >= job.out) continue;
      float y = split == 0 && job.bias ? job.bias[output] : 0.0f;
      for (int w = 0; w < warps; ++w) y += results[(w * B + b) * TILE + at % TILE];
      if (listed)
        sides[(side * B + b) * TILE + at % TILE] = y;
      else if (job.rounded)
        job.rounded[(i64)b * job.out + output] = narrow(y);
      else
        job.y[((i64)split * p.rows + b) * job.out + output] = y;
    }
    if (listed) __syncthreads();
  }
  if (!listed) return;
  const int number = tile * TILE + (int)threadIdx.x;
  float v[B];
  int mask = 0;
  for (int b = 0; b < B; ++b) {
    v[b] = 0.0f;
    if ((int)threadIdx.x >= TILE || number >= p.job[0].out || b >= p.rows) continue;
    float r = activate(p.activation, sides[b * TILE + threadIdx.x]);
    if (p.jobs > 1) r *= activate(p.second_activation, sides[(B + b) * TILE + threadIdx.x]);
    if (!p.list.keeps(r, number)) continue;
    mask |= 1 << b;
    v[b] = r - (p.list.mean ? p.list.mean[number] : 0.0f);
  }
  const int passed = p.list.append(0, number, mask, v, p.rows, reinterpret_cast<int*>(scratch));
  if (threadIdx.x == 0) p.list.counts[blockIdx.x] = passed;
}

AS_KERNEL(512, BLOCKS) columns32_kernel(AS_PARAMETER Columns p) {
  AS_SHARED;
  columns<32>(p, shared);
}
AS_KERNEL(512, BLOCKS) columns64_kernel(AS_PARAMETER Columns p) {
  AS_SHARED;
  columns<64>(p, shared);
}
AS_KERNEL(512, BLOCKS) columns128_kernel(AS_PARAMETER Columns p) {
  AS_SHARED;
  columns<128>(p, shared);
}
AS_KERNEL(512, BLOCKS) columns256_kernel(AS_PARAMETER Columns p) {
  AS_SHARED;
  columns<256>(p, shared);
}

// Adds the splits up and rounds: [S, rows, O] to [rows, O].
struct Finish {
  const float* parts;
  u16* y;
  i64 size;
  int splits;
};

AS_KERNEL(256, 2) finish_kernel(AS_PARAMETER Finish p) {
  wait_for_previous();
  const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  for (i64 i = first; i < p.size; i += gridDim.x * blockDim.x) {
    float y = 0.0f;
    for (int s = 0; s < p.splits; ++s) y += p.parts[s * p.size + i];
    p.y[i] = narrow(y);
  }
  if (blockIdx.x * blockDim.x >= p.size) linger();
}
