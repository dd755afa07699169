// What a product's block does before it multiplies: x, and who is kept.  Letters: B rows of x (AS_ROWS), I inputs, N neurons,
// S splits.
//
// A block has a slice of the inputs, every S-th group of 32, and compacts what is kept of that for itself; shares of a few
// hundred differ by some per cent.  Neurons come from the product before as a vector with zeros for what was dropped; rows, of
// which a block takes few, are shared out evenly, by the counts that the blocks of that product left.
//
// Everybody waits for what happens here, 16 warps at once: few instructions, and few journeys to memory, one after the other.
constexpr int B = AS_ROWS;
constexpr int THREAD_BITS = 9, THREADS = 1 << THREAD_BITS;  // of a product's block
constexpr int BLOCKS = B <= 2 ? 2 : 1;  // resident on a multiprocessor: room for the next kernel to start early

struct Input {              // the vector x
  const u16* x;             // [B, I], or
  const float* parts;       // [S, B, I], summed
  const float* residual;    // [I] added, B = 1; not of the kernel before
  float* residual_out;      // [I] receives the sum
  const float* norm;        // RMSNorm weight [I], B = 1
  int splits, size;
  float eps;
};

struct Chosen {             // rows to take
  const float* value;       // [B, size] only those with a value; null: all
  const int* start;         // [segments] where the share of each block of the product before begins
  const int* count;         // [segments] values there
  const int* index;         // [size] the row of each; null: its number
  int size, segments;
};

struct Passing {            // results that pass: a vector with zeros for the others
  float* value;             // [B, size]; null: y instead
  int* start;               // [blocks]
  int* count;               // [blocks]
  const float* threshold;   // [N]
  const float* mean;        // [N], subtracted from what passes
  int size, positive;

  AS_MEMBER bool keeps(float v, int neuron) const {
    return positive ? !(v <= 0.0f) : !(absolute(v) < (threshold ? threshold[neuron] : 0.0f));
  }
  AS_MEMBER float sieve(float v, int neuron) const {
    return keeps(v, neuron) ? v - (mean ? mean[neuron] : 0.0f) : 0.0f;
  }
};

AS_DEVICE float4 quad_at(const float* from, int q) { return *reinterpret_cast<const float4*>(from + 4 * q); }
constexpr float NOTHING = 1.17549435e-38f;  // less than the least normal value adds nothing

// Inclusive sum over the lanes of a warp.
AS_DEVICE int scan_warp(int v) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

struct Before {
  int before, total;
};

// What the warps before this one counted, and all; counts holds one a warp, and none beyond them up to MOST_WARPS.  All lanes.
constexpr int MOST_WARPS = 16;
AS_DEVICE Before sum_before(const int* counts) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = lane < MOST_WARPS ? counts[lane] : 0;
  const u32 before = __reduce_add_sync(0xffffffffu, (u32)(lane < warp ? count : 0));
  return Before{(int)before, (int)__reduce_add_sync(0xffffffffu, (u32)count)};
}

// ---- x ----------------------------------------------------------------------------------------------------------------

// A block's inputs: groups of eight quads, one of every `splits`.
struct Slice {
  int split, splits, size;
  u32 inverse;              // 2^32 / splits, rounded up

  AS_MEMBER int row_of(int group) const { return splits == 1 ? group : (int)__umulhi((u32)group, inverse); }  // group / splits
  AS_MEMBER int quads() const { return 8 * row_of(((size + 31) >> 5) - split + splits - 1); }
  AS_MEMBER int input(int q) const { return 4 * (((q >> 3) * splits + split) * 8 + (q & 7)); }  // the first of local quad q
};

// Adds N parts to two quads, all loads under way together.
template <int N>
AS_DEVICE void add_parts(const float* part, i64 apart, const int* from, float4* v) {
  float4 more[N][2];
#pragma unroll
  for (int s = 0; s < N; ++s)
#pragma unroll
    for (int t = 0; t < 2; ++t) more[s][t] = quad_at(part + s * apart, from[t] >> 2);
#pragma unroll
  for (int s = 0; s < N; ++s)
#pragma unroll
    for (int t = 0; t < 2; ++t)
      v[t].x += more[s][t].x, v[t].y += more[s][t].y, v[t].z += more[s][t].z, v[t].w += more[s][t].w;
}

// x in float32, quad by quad: at(q) is the first input of quad q, of `count`; store(b, q, v) takes it.  A thread meets quads
// threadIdx.x, threadIdx.x + THREADS ...  Beyond the inputs come any values.  NEAR: the residual is in shared memory, and need
// not be asked for together with x.  Returns what the norm still has to be
// multiplied with.
template <bool NEAR, class At, class Store>
AS_DEVICE float load_quads(const Input& in, int rows, const float* residual, const float* norm, int count, float* scratch,
                           At at, Store store) {
  float square = 0.0f;
#pragma unroll 1
  for (int b = 0; b < B; ++b) {
    const int row = B > 1 && b < rows ? b : 0;  // rows that are not there are zeros
#pragma unroll 1
    for (int q = threadIdx.x; q < count; q += 2 * THREADS) {
      const bool two = q + THREADS < count;
      float4 v[2];
      int from[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int input = at(t && two ? q + THREADS : q);
        from[t] = input < in.size ? input : 0;
        v[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (B == 1 && !NEAR && residual) v[t] = quad_at(residual, from[t] >> 2);
      }
      if (in.x) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const u32* const pair = reinterpret_cast<const u32*>(in.x + (i64)row * in.size + from[t]);
          widen2(pair[0], v[t].x, v[t].y);
          widen2(pair[1], v[t].z, v[t].w);
        }
      } else {
        const float* part = in.parts + (i64)row * in.size;
        const i64 apart = (i64)rows * in.size;
        int left = in.splits;
#pragma unroll 1
        for (; left >= 4; left -= 4, part += 4 * apart) add_parts<4>(part, apart, from, v);
#pragma unroll 1
        for (; left >= 2; left -= 2, part += 2 * apart) add_parts<2>(part, apart, from, v);
        if (left) add_parts<1>(part, apart, from, v);
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (t && !two) break;
        if (B == 1 && NEAR && residual) {
          const float4 more = quad_at(residual, from[t] >> 2);
          v[t].x += more.x, v[t].y += more.y, v[t].z += more.z, v[t].w += more.w;
        }
        if (B > 1 && b >= rows) v[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (B == 1 && in.residual_out && blockIdx.x == 0) *reinterpret_cast<float4*>(in.residual_out + from[t]) = v[t];
        if (B == 1 && norm) {
          const float4 n = quad_at(norm, from[t] >> 2);
          square += v[t].x * v[t].x + v[t].y * v[t].y + v[t].z * v[t].z + v[t].w * v[t].w;
          v[t].x *= n.x, v[t].y *= n.y, v[t].z *= n.z, v[t].w *= n.w;
        }
        store(b, t ? q + THREADS : q, v[t]);
      }
    }
  }
  if (B > 1 || !norm) return 1.0f;
  square = warp_sum(square);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = square;
  __syncthreads();
  float4 sum = quad_at(scratch, 0);
#pragma unroll
  for (int w = 1; w < MOST_WARPS / 4; ++w) {
    const float4 more = quad_at(scratch, w);
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  return rsqrtf((sum.x + sum.y + (sum.z + sum.w)) / in.size + in.eps);
}

// ---- who is kept --------------------------------------------------------------------------------------------------------

// An entry of a list: the local input, and where there are several rows which of them keep it, above 16 bits.
template <int ROWS>
struct EntryOf {
  typedef u32 type;
};
template <>
struct EntryOf<1> {
  typedef u16 type;
};
typedef EntryOf<B>::type Entry;

struct Counts {
  int first, second;
};

// How many inputs a block keeps of two sides, of which a thread has the bits `first` and `second`, and how many the threads
// `before` it keep, two numbers in one.  counts: one for each warp, of MOST_WARPS.
AS_DEVICE Counts count_kept(u32 first, u32 second, int* counts, int& before) {
  const int mine = __popc(first) | __popc(second) << 16, upto = scan_warp(mine);
  if ((threadIdx.x & 31) == 31) counts[threadIdx.x >> 5] = upto;
  __syncthreads();
  const Before others = sum_before(counts);
  const Counts all{others.total & 0xffff, others.total >> 16};
  before = others.before + upto - mine;
  return all;
}

// A block's kept inputs under one or two thresholds to `list`, side after side, each from a multiple of `groups` on and in the
// order of threads; how many.  x holds the slice; `factor` times it is compared.  The threshold of local quad q is
// quad `staged ? q : its place among all` of `threshold`.
AS_DEVICE Counts keep_inputs(const Slice& slice, const float* x, float factor, const float* const* threshold, int sides,
                             bool staged, int* counts, Entry* list, int groups) {
  const int quads = slice.quads();
  const auto least_of = [&](const float* of, int q) {
    return of ? quad_at(of, staged ? q : slice.input(q) >> 2) : make_float4(NOTHING, NOTHING, NOTHING, NOTHING);
  };
  u32 kept[2] = {0, 0};
#pragma unroll 1
  for (int q = threadIdx.x, shift = 0; q < quads; q += THREADS, shift += 4) {
    if (slice.input(q) >= slice.size) continue;
    const float4 v = quad_at(x, q);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == sides) break;
      const float4 least = least_of(threshold[side], q);
      u32 four = absolute(v.x * factor) < least.x ? 0u : 1u;
      four |= absolute(v.y * factor) < least.y ? 0u : 2u;
      four |= absolute(v.z * factor) < least.z ? 0u : 4u;
      four |= absolute(v.w * factor) < least.w ? 0u : 8u;
      kept[side] |= four << shift;
    }
  }
  int before;
  const Counts all = count_kept(kept[0], kept[1], counts, before);
#pragma unroll 1
  for (int side = 0; side < sides; ++side) {
    u32 bits = side ? kept[1] : kept[0];
    Entry* to = side ? list + ((all.first + groups - 1) & ~(groups - 1)) + (before >> 16) : list + (before & 0xffff);
#pragma unroll 1
    for (int q = threadIdx.x; bits; q += THREADS, bits >>= 4) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (bits >> e & 1u) *to++ = (Entry)(4 * q + e);
    }
  }
  return all;
}

// This block's even share of those with a value: their rows, places and values [share, B]; where the share begins.  What lies
// between them becomes zero in `zeros`, if given.  The share of a block ends where the next one's begins.
struct Share {
  int count, start;
};

AS_DEVICE Share share_of_chosen(const Chosen& c, int rows, int* counts, int* chosen, int* place, float* source,
                                  float* zeros) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = threadIdx.x, blocks = gridDim.x;
  const int mine = t < c.segments ? c.count[t] : 0, start = t < c.segments ? c.start[t] : 0;
  // Of a product of all rows the segments lie evenly, and this share probably in those about its number: these values come
  // with the counts.
  const int guess = (int)blockIdx.x > 2 ? blockIdx.x - 2 : 0, guessed = share_of(c.size, guess, blocks);
  float v[B];
  const auto look = [&](int number, int end) {
#pragma unroll
    for (int b = 0; b < B; ++b) v[b] = b < rows && number < end ? c.value[(i64)b * c.size + number] : 0.0f;
  };
  look(guessed + t, c.size);
  const int scanned = scan_warp(mine);
  if (lane == 31) counts[warp] = scanned;
  __syncthreads();
  const Before others = sum_before(counts);
  const int upto = others.before + scanned, total = others.total;
  const int low = share_of(total, blockIdx.x, blocks), high = share_of(total, blockIdx.x + 1, blocks);
  // Those before the first belong to it; where there is none, each block has a share of all.
  int position = total ? 0 : share_of(c.size, blockIdx.x, blocks), before = 0;
  const int end = total ? c.size : share_of(c.size, blockIdx.x + 1, blocks);
  int* const found = counts + MOST_WARPS;
  if (low && upto - mine <= low && low < upto) found[0] = start, found[1] = upto - mine;
  if (t == guess) found[2] = start == guessed ? upto - mine : total;
  __syncthreads();
  bool there = low && guess < c.segments && found[2] <= low;
  if (there) position = guessed, before = found[2];
  else if (low) position = found[0], before = found[1];
  if (total && low == high) return Share{0, position};
  const int first = position;
#pragma unroll 1
  for (; position < end && before <= high; position += blockDim.x, there = false) {
    const int number = position + t;
    if (!there) look(number, end);
    bool kept = false;
#pragma unroll
    for (int b = 0; b < B; ++b) kept = kept || v[b] != 0.0f;
    const u32 ballot = __ballot_sync(0xffffffffu, kept);
    __syncthreads();  // counts and found have been read
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    const Before in = sum_before(counts);
    const int rank = before + in.before + __popc(ballot & ((1u << lane) - 1u));
    const int owner = kept ? rank : rank ? rank - 1 : 0;  // who owns a zero: the one before it
    if (number < end && (!total || (owner >= low && owner < high))) {
      if (kept) {
        place[rank - low] = number;
        chosen[rank - low] = c.index ? c.index[number] : number;
#pragma unroll
        for (int b = 0; b < B; ++b) source[(rank - low) * B + b] = v[b];
      } else if (zeros) {
        for (int b = 0; b < rows; ++b) zeros[(i64)b * c.size + number] = 0.0f;
      }
    }
    before += in.total;
  }
  __syncthreads();
  return Share{high - low, low ? place[0] : first};
}
