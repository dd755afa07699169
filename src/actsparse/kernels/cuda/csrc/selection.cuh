// What a product's block does before it multiplies: x, and who is kept.  Letters: B rows of x (AS_ROWS), I inputs, N neurons,
// S splits.
//
// Every block reads its inputs anew (residual, norm, thresholds) and compacts the kept of x for itself; neurons come as lists
// from the product before, one segment a block.  The kept entries are cut evenly, by position.
constexpr int B = AS_ROWS;
constexpr int SOURCES = B <= 2 ? 4 : 2; // candidates per thread looked at together
constexpr int BLOCKS = B <= 2 ? 2 : 1;   // resident on a multiprocessor: room for the next kernel to start early

struct Input {              // the vector x
  const u16* x;             // [B, I], or
  const float* parts;       // [S, B, I], summed
  const float* residual;    // [I] added, B = 1; not of the kernel before
  float* residual_out;      // [I] receives the sum
  const float* norm;        // RMSNorm weight [I]
  int splits, size;
  float eps;
};

struct Candidates {         // who is kept
  const float* value;       // of a list [B, size]
  const int* index;         // [size] neurons
  const int* mask;          // of a list [size] bit b: row b keeps it
  const int* counts;        // [segments] entries of a list in each segment; null: no list, every index
  int size, segments, capacity;
};

struct List {               // what a product leaves of its results: a segment of `capacity` for each block
  int* index;
  int* mask;
  float* value;             // [B, size]; null: no list
  int* counts;
  const float* threshold;   // [N]
  const float* mean;        // [N], subtracted from what passes
  int size, capacity, positive;

  AS_MEMBER bool keeps(float v, int neuron) const {
    return positive ? !(v <= 0.0f) : !(absolute(v) < (threshold ? threshold[neuron] : 0.0f));
  }

  // By all threads of a block: those with a mask come after the `passed` before them.
  AS_MEMBER int append(int passed, int neuron, int mask_bits, const float* v, int rows, int* counts_of_warps) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const u32 kept = __ballot_sync(0xffffffffu, mask_bits != 0);
    if (lane == 0) counts_of_warps[warp] = __popc(kept);
    __syncthreads();
    int at = passed + __popc(kept & ((1u << lane) - 1u));
    for (int w = 0; w < warps; ++w) {
      if (w < warp) at += counts_of_warps[w];
      passed += counts_of_warps[w];
    }
    __syncthreads();
    if (mask_bits) {
      at += blockIdx.x * capacity;
      index[at] = neuron;
      mask[at] = mask_bits;
      for (int b = 0; b < rows; ++b) value[(i64)b * size + at] = v[b];
    }
    return passed;
  }
};

AS_DEVICE int half_of(int size) { return ((size / 2 + 31) & ~31) + 16; }
AS_DEVICE int stored_size(int size) { return 2 * half_of(size); }
// x lies in shared memory with the two halves of each group of eight apart: neighbouring lanes then meet different banks.
AS_DEVICE int place_of(int i, int half) { return ((i >> 3) << 2) + (i & 3) + ((i & 4) ? half : 0); }

AS_DEVICE float4 quad_at(const float* from, int q) { return *reinterpret_cast<const float4*>(from + 4 * q); }

// What a thread needs of its first groups of four and the kernel before does not write: it is loaded while that still runs.
constexpr int EARLY = 2;
struct Early {
  float4 norm[EARLY], residual[EARLY];
};

AS_DEVICE Early load_early(const Input& in) {
  Early early;
#pragma unroll
  for (int t = 0; t < EARLY; ++t) {
    const int q = t * (int)blockDim.x + (int)threadIdx.x;
    early.norm[t] = early.residual[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (4 * q >= in.size) continue;
    if (in.norm) early.norm[t] = quad_at(in.norm, q);
    if (in.residual) early.residual[t] = quad_at(in.residual, q);
  }
  return early;
}

AS_DEVICE void load_input(const Input& in, int rows, const Early& early, float* x, float* scratch) {
  const int half = half_of(in.size), quads = in.size / 4;
  float square = 0.0f;
#pragma unroll 1
  for (int b = 0; b < B; ++b) {
    float* const to = x + b * 2 * half;
    const int row = b < rows ? b : 0;  // rows that are not there are zeros
#pragma unroll 1
    for (int begin = 0; begin < quads; begin += EARLY * blockDim.x) {
      float4 v[EARLY], norm[EARLY];
      int at[EARLY];
#pragma unroll
      for (int t = 0; t < EARLY; ++t) {
        const int q = begin + t * (int)blockDim.x + (int)threadIdx.x;
        at[t] = q < quads ? q : quads - 1;
        v[t] = begin ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : early.residual[t];
        norm[t] = early.norm[t];
        if (begin && in.norm) norm[t] = quad_at(in.norm, at[t]);
        if (begin && in.residual) v[t] = quad_at(in.residual, at[t]);
      }
      if (in.x) {
#pragma unroll
        for (int t = 0; t < EARLY; ++t) {
          const u32* const from = reinterpret_cast<const u32*>(in.x + (i64)row * in.size + 4 * at[t]);
          widen2(from[0], v[t].x, v[t].y);
          widen2(from[1], v[t].z, v[t].w);
        }
      }
#pragma unroll 2
      for (int s = 0; s < in.splits; ++s) {
        const float* const from = in.parts + ((i64)s * rows + row) * in.size;
#pragma unroll
        for (int t = 0; t < EARLY; ++t) {
          const float4 part = quad_at(from, at[t]);
          v[t].x += part.x, v[t].y += part.y, v[t].z += part.z, v[t].w += part.w;
        }
      }
#pragma unroll
      for (int t = 0; t < EARLY; ++t) {
        const int q = begin + t * (int)blockDim.x + (int)threadIdx.x;
        if (q >= quads) continue;
        if (b >= rows) v[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (in.residual_out && blockIdx.x == 0) *reinterpret_cast<float4*>(in.residual_out + 4 * q) = v[t];
        if (in.norm) {
          square += v[t].x * v[t].x + v[t].y * v[t].y + v[t].z * v[t].z + v[t].w * v[t].w;
          v[t].x *= norm[t].x, v[t].y *= norm[t].y, v[t].z *= norm[t].z, v[t].w *= norm[t].w;
        }
        *reinterpret_cast<float4*>(to + place_of(4 * q, half)) = v[t];
      }
    }
  }
  if (in.norm) {
    const float scale = rsqrtf(block_sum(square, scratch) / in.size + in.eps);
#pragma unroll 1
    for (int q = threadIdx.x; q < quads; q += blockDim.x) {  // each thread its own values
      float4* const at = reinterpret_cast<float4*>(x + place_of(4 * q, half));
      const float4 v = *at;
      *at = make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
    }
  }
  __syncthreads();
}

struct Kept {
  int index, mask;  // mask 0: not kept
  float value[B];
};

struct Range {
  int begin, count, total;
};

// Positions of the kept among `count` candidates: those of slice `slice` of `slices` go to index and value [slice, B].
template <class F>
AS_DEVICE Range compact(int count, int slice, int slices, int* counts, int* index, float* value, F look) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int segment = ((count + warps - 1) / warps + 31) & ~31, begin = warp * segment;
  const int end = begin + segment < count ? begin + segment : count;
  int mine = 0;
#pragma unroll 1
  for (int i = begin; i < end; i += 32 * SOURCES) {
    Kept k[SOURCES];
#pragma unroll
    for (int s = 0; s < SOURCES; ++s) k[s] = look(i + 32 * s + lane, end);
#pragma unroll
    for (int s = 0; s < SOURCES; ++s) mine += __popc(__ballot_sync(0xffffffffu, k[s].mask != 0));
  }
  if (lane == 0) counts[warp] = mine;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before = total;
    total += counts[w];
  }
  const int low = share_of(total, slice, slices), high = share_of(total, slice + 1, slices);
  if (before < high && before + mine > low) {
#pragma unroll 1
    for (int i = begin; i < end; i += 32 * SOURCES) {
      Kept k[SOURCES];
#pragma unroll
      for (int s = 0; s < SOURCES; ++s) k[s] = look(i + 32 * s + lane, end);
#pragma unroll
      for (int s = 0; s < SOURCES; ++s) {
        const u32 kept = __ballot_sync(0xffffffffu, k[s].mask != 0);
        const int at = before + __popc(kept & ((1u << lane) - 1u));
        if (k[s].mask && at >= low && at < high) {
          index[at - low] = k[s].index;
          for (int b = 0; b < B; ++b) value[(at - low) * B + b] = k[s].value[b];
        }
        before += __popc(kept);
      }
    }
  }
  __syncthreads();
  return Range{low, high - low, total};
}

// One row of x: each thread looks at groups of four candidates and remembers one bit each.  The list's order is by thread, then
// by candidate.  look(i0, i1) examines the groups at i0 and i1 and returns their bits; value_at(i) is what was found.
constexpr int MOST_SINGLE = 16 * 4 * 512;  // candidates that the bits of a block of 512 threads can stand for

template <class Look, class Value>
AS_DEVICE Range compact_one(int count, int slice, int slices, int* counts, int* index, float* value, Look look,
                            Value value_at) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, stride = 4 * blockDim.x;
  const int groups = (count + stride - 1) / stride;
  unsigned long long kept = 0;
#pragma unroll 1
  for (int j = 0; j < groups; j += 2) {
    const int i = j * stride + 4 * threadIdx.x;
    kept |= (unsigned long long)look(i, i + stride) << 4 * j;
  }
  const int mine = __popc((u32)kept) + __popc((u32)(kept >> 32));
  int upto = mine;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == 31) counts[warp] = upto;
  __syncthreads();
  int at = upto - mine, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) at += counts[w];
    total += counts[w];
  }
  const int low = share_of(total, slice, slices), high = share_of(total, slice + 1, slices);
  if (at < high && at + mine > low)
#pragma unroll 1
    for (int j = 0; j < groups; ++j) {
      const u32 four = (u32)(kept >> 4 * j) & 15u;
      for (int e = 0; e < 4; ++e)
        if (four >> e & 1) {
          if (at >= low && at < high) {
            const int i = j * stride + 4 * threadIdx.x + e;
            index[at - low] = i;
            value[at - low] = value_at(i);
          }
          ++at;
        }
    }
  __syncthreads();
  return Range{low, high - low, total};
}

// This block's even share of a list in segments; prefix holds one more than there are segments.
AS_DEVICE Range gather(const Candidates& c, int rows, int slice, int slices, int* counts, int* index, int* mask, float* value,
                       int* prefix) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, t = threadIdx.x;
  const int mine = t < c.segments ? c.counts[t] : 0;
  int upto = mine;
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == 31) counts[warp] = upto;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) upto += counts[w];
    total += counts[w];
  }
  if (t <= c.segments) prefix[t] = upto - mine;
  __syncthreads();
  const int low = share_of(total, slice, slices), high = share_of(total, slice + 1, slices);
#pragma unroll 1
  for (int i = low + t; i < high; i += blockDim.x) {
    int segment = 0, past = c.segments;  // prefix[segment] <= i < prefix[past]
    while (past - segment > 1) {
      const int middle = (segment + past) >> 1;
      if (prefix[middle] <= i) segment = middle;
      else past = middle;
    }
    const int at = segment * c.capacity + i - prefix[segment];
    index[i - low] = c.index[at];
    if (mask) mask[i - low] = c.mask[at];
    for (int b = 0; b < B; ++b) value[(i - low) * B + b] = b < rows ? c.value[(i64)b * c.size + at] : 0.0f;
  }
  __syncthreads();
  return Range{low, high - low, total};
}

// This block's even share of those named, by a list that a product left or by indices alone.
AS_DEVICE Range named(const Candidates& c, int rows, int slice, int slices, int* counts, int* index, int* mask, float* value,
                      float* found) {
  if (c.counts)
    return gather(c, rows, slice, slices, counts, index, mask, value, reinterpret_cast<int*>(found));
  const int low = share_of(c.size, slice, slices), high = share_of(c.size, slice + 1, slices);
  for (int i = low + threadIdx.x; i < high; i += blockDim.x) {
    index[i - low] = c.index[i];
    if (mask) mask[i - low] = (1 << rows) - 1;
  }
  __syncthreads();
  return Range{low, high - low, c.size};
}
