// What a product's block does before it multiplies: x, and who is kept.  Letters: B rows of x (AS_ROWS), I inputs, N neurons,
// S splits.
//
// Every block reads its inputs anew (residual, norm, thresholds) and compacts the kept indices for itself: that costs less
// than one more kernel.  The kept entries are cut evenly, by position.
constexpr int B = AS_ROWS;
constexpr int UNROLL = B <= 2 ? 8 : 4;  // 16-byte loads in flight per thread
constexpr int PART = UNROLL * 256;      // inputs of a row that one warp takes at a time
constexpr int SOURCES = B <= 2 ? 4 : 2; // candidates per thread looked at together
constexpr int BLOCKS = B <= 2 ? 2 : 1;   // resident on a multiprocessor: room for the next kernel to start early

struct Input {              // the vector x
  const u16* x;             // [B, I], or
  const float* parts;       // [S, B, I], summed
  const float* residual;    // [I] added, B = 1
  float* residual_out;      // [I] receives the sum
  const float* norm;        // RMSNorm weight [I]
  int splits, size;
  float eps;
};

struct Candidates {         // who may be kept
  const float* value;       // [S, B, size]
  const float* second;      // [S, B, size], multiplied in
  const int* index;         // [size] neuron of each; null: itself
  const int* mask;          // [size] bit b: row b keeps it; null: all
  const int* count;         // how many there are; null: size
  const float* threshold;   // [N], by neuron
  const float* mean;        // [N], subtracted from what is kept
  int size, splits, second_splits, activation, second_activation, positive;
};

AS_DEVICE int half_of(int size) { return ((size / 2 + 31) & ~31) + 16; }
AS_DEVICE int stored_size(int size) { return 2 * half_of(size); }
// x lies in shared memory with the two halves of each group of eight apart: neighbouring lanes then meet different banks.
AS_DEVICE int place_of(int i, int half) { return ((i >> 3) << 2) + (i & 3) + ((i & 4) ? half : 0); }

AS_DEVICE float4 quad_at(const float* from, int q) { return *reinterpret_cast<const float4*>(from + 4 * q); }

AS_DEVICE void load_input(const Input& in, int rows, float* x, float* scratch) {
  constexpr int TOGETHER = 4;  // groups of four per thread whose loads are all under way before the first is used
  const int half = half_of(in.size), quads = in.size / 4;
  float square = 0.0f;
  for (int b = 0; b < B; ++b) {
    float* const to = x + b * 2 * half;
    const int row = b < rows ? b : 0;  // rows that are not there are zeros
    for (int begin = 0; begin < quads; begin += TOGETHER * blockDim.x) {
      float4 v[TOGETHER];
      int at[TOGETHER];
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        const int q = begin + t * (int)blockDim.x + (int)threadIdx.x;
        at[t] = q < quads ? q : quads - 1;
        v[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
      if (in.x) {
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
          const u32* const from = reinterpret_cast<const u32*>(in.x + (i64)row * in.size + 4 * at[t]);
          widen2(from[0], v[t].x, v[t].y);
          widen2(from[1], v[t].z, v[t].w);
        }
      }
      if (in.residual) {
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) v[t] = quad_at(in.residual, at[t]);
      }
      for (int s = 0; s < in.splits; ++s) {
        const float* const from = in.parts + ((i64)s * rows + row) * in.size;
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
          const float4 part = quad_at(from, at[t]);
          v[t].x += part.x, v[t].y += part.y, v[t].z += part.z, v[t].w += part.w;
        }
      }
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        const int q = begin + t * (int)blockDim.x + (int)threadIdx.x;
        if (q >= quads) continue;
        if (b >= rows) v[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (in.residual_out && blockIdx.x == 0 && blockIdx.y == 0)
          *reinterpret_cast<float4*>(in.residual_out + 4 * q) = v[t];
        if (in.norm) {
          square += v[t].x * v[t].x + v[t].y * v[t].y + v[t].z * v[t].z + v[t].w * v[t].w;
          const float4 w = quad_at(in.norm, q);
          v[t].x *= w.x, v[t].y *= w.y, v[t].z *= w.z, v[t].w *= w.w;
        }
        *reinterpret_cast<float4*>(to + place_of(4 * q, half)) = v[t];
      }
    }
  }
  if (in.norm) {
    const float scale = rsqrtf(block_sum(square, scratch) / in.size + in.eps);
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

AS_DEVICE Kept examine(const Candidates& c, int rows, int i, int count) {
  Kept k;
  k.mask = 0;
  k.index = 0;
  for (int b = 0; b < B; ++b) k.value[b] = 0.0f;
  if (i >= count) return k;
  k.index = c.index ? c.index[i] : i;
  const int allowed = c.mask ? c.mask[i] : ~0;
  const float least = c.threshold ? c.threshold[k.index] : 0.0f;
  const float mean = c.mean ? c.mean[k.index] : 0.0f;
  for (int b = 0; b < B; ++b) {
    if (b >= rows) break;
    float v = 0.0f;
    if (c.value) {
      for (int s = 0; s < c.splits; ++s) v += c.value[((i64)s * rows + b) * c.size + i];
      v = activate(c.activation, v);
    }
    if (c.second) {
      float u = 0.0f;
      for (int s = 0; s < c.second_splits; ++s) u += c.second[((i64)s * rows + b) * c.size + i];
      v *= activate(c.second_activation, u);
    }
    const bool keep = c.positive ? !(v <= 0.0f) : !(absolute(v) < least);
    if (keep && (allowed >> b & 1)) {
      k.mask |= 1 << b;
      k.value[b] = v - mean;
    }
  }
  return k;
}

struct Range {
  int begin, count, total;
};

// Positions of the kept among `count` candidates: those of slice `slice` of `slices` go to index, mask and value [slice, B].
template <class F>
AS_DEVICE Range compact(int count, int slice, int slices, int* counts, int* index, int* mask, float* value, F look) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int segment = ((count + warps - 1) / warps + 31) & ~31, begin = warp * segment;
  const int end = begin + segment < count ? begin + segment : count;
  int mine = 0;
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
  const int low = (int)((i64)total * slice / slices), high = (int)((i64)total * (slice + 1) / slices);
  if (before < high && before + mine > low) {
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
          if (mask) mask[at - low] = k[s].mask;
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
AS_DEVICE Range compact_one(int count, int slice, int slices, int* counts, int* index, int* mask, float* value, Look look,
                            Value value_at) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, stride = 4 * blockDim.x;
  const int groups = (count + stride - 1) / stride;
  unsigned long long kept = 0;
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
  const int low = (int)((i64)total * slice / slices), high = (int)((i64)total * (slice + 1) / slices);
  if (at < high && at + mine > low)
    for (int j = 0; j < groups; ++j) {
      const u32 four = (u32)(kept >> 4 * j) & 15u;
      for (int e = 0; e < 4; ++e)
        if (four >> e & 1) {
          if (at >= low && at < high) {
            const int i = j * stride + 4 * threadIdx.x + e;
            index[at - low] = i;
            value[at - low] = value_at(i);
            if (mask) mask[at - low] = 1;
          }
          ++at;
        }
    }
  __syncthreads();
  return Range{low, high - low, total};
}

// Eight of one row's candidates; their values go to found.  Sizes are multiples of four.
AS_DEVICE u32 look_at_candidates(const Candidates& c, int count, const int (&i)[2], float* found) {
  float4 value[2], second[2], least[2];
  int q[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) q[j] = i[j] < c.size ? i[j] / 4 : 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    value[j] = quad_at(c.value, q[j]);
    second[j] = least[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  if (c.second) {
#pragma unroll
    for (int j = 0; j < 2; ++j) second[j] = quad_at(c.second, q[j]);
  }
  if (c.threshold && !c.index) {
#pragma unroll
    for (int j = 0; j < 2; ++j) least[j] = quad_at(c.threshold, q[j]);
  } else if (c.threshold) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int neuron[4];
      for (int e = 0; e < 4; ++e) neuron[e] = i[j] + e < count ? c.index[i[j] + e] : 0;
      least[j] = make_float4(c.threshold[neuron[0]], c.threshold[neuron[1]], c.threshold[neuron[2]], c.threshold[neuron[3]]);
    }
  }
  for (int s = 1; s < c.splits; ++s)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 part = quad_at(c.value + (i64)s * c.size, q[j]);
      value[j].x += part.x, value[j].y += part.y, value[j].z += part.z, value[j].w += part.w;
    }
  for (int s = 1; s < c.second_splits; ++s)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 part = quad_at(c.second + (i64)s * c.size, q[j]);
      second[j].x += part.x, second[j].y += part.y, second[j].z += part.z, second[j].w += part.w;
    }
  u32 kept = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float v[4] = {value[j].x, value[j].y, value[j].z, value[j].w};
    const float u[4] = {second[j].x, second[j].y, second[j].z, second[j].w};
    const float t[4] = {least[j].x, least[j].y, least[j].z, least[j].w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (c.activation != 5) v[e] = activate(c.activation, v[e]);
      if (c.second) v[e] *= c.second_activation == 5 ? u[e] : activate(c.second_activation, u[e]);
      const bool keep = c.positive ? !(v[e] <= 0.0f) : !(absolute(v[e]) < t[e]);
      if (i[j] + e < count && keep) kept |= 1u << (4 * j + e);
    }
    if (i[j] < c.size) *reinterpret_cast<float4*>(found + i[j]) = make_float4(v[0], v[1], v[2], v[3]);
  }
  return kept;
}

// The kept among the candidates: this block's even share, neurons in index.
AS_DEVICE Range choose(const Candidates& c, int rows, int slice, int slices, int* counts, int* index, int* mask, float* value,
                       float* found) {
  const int count = c.count ? *c.count : c.size;
  if (B > 1 || c.size > MOST_SINGLE)
    return compact(count, slice, slices, counts, index, mask, value,
                   [&](int i, int end) { return examine(c, rows, i, end); });
  if (!c.threshold && !c.positive && !c.second && c.splits < 2 && c.activation == 5) {  // all of them
    const int low = (int)((i64)count * slice / slices), high = (int)((i64)count * (slice + 1) / slices);
    for (int i = low + threadIdx.x; i < high; i += blockDim.x) {
      const int neuron = c.index ? c.index[i] : i;
      index[i - low] = neuron;
      value[i - low] = (c.value ? c.value[i] : 0.0f) - (c.mean ? c.mean[neuron] : 0.0f);
      if (mask) mask[i - low] = 1;
    }
    __syncthreads();
    return Range{low, high - low, count};
  }
  const Range range =
      compact_one(count, slice, slices, counts, index, mask, value,
                  [&](int first, int next) {
                    const int i[2] = {first, next};
                    return look_at_candidates(c, count, i, found);
                  },
                  [&](int i) { return found[i]; });
  if (c.index || c.mean) {
    for (int i = threadIdx.x; i < range.count; i += blockDim.x) {
      if (c.index) index[i] = c.index[index[i]];
      if (c.mean) value[i] -= c.mean[index[i]];
    }
    __syncthreads();
  }
  return range;
}

