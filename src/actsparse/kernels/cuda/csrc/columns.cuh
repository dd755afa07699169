// The product by columns.  Letters: B rows of x, I inputs, O outputs, S splits.
struct Columns {
  Input input;
  Job job[3];
  Passing passing;          // results instead of y: of one job, or of two side by side
  const int* column;        // [I] of each input; null: its number
  int jobs, splits, rows, bits, tiles;  // 1 << bits threads side by side in a tile, 8 outputs each; tiles: of all jobs, or of
                                        // each side by side
  u32 inverse;              // 2^32 / splits, rounded up
  int slice, staged, activation, second_activation;  // slice: most inputs of a block; staged: what is early fits the ring
};

// Weights on their way into the ring: a thread copies what it will multiply itself.
struct Coming {
  const int* column;        // [slice]
  bool named;               // whether columns have numbers of their own there
  int apart, limit;         // splits - 1; inputs from here on are none, and come as zeros

  AS_MEMBER void copy(u32 entry, const u16* w, u32 stride, u16* to) const {  // stride in bytes
    const int i = entry & 0xffffu;
    const u32 number = named ? column[i] : i + (i & ~31) * apart;
    copy_or_zero(to, reinterpret_cast<const char*>(w) + (unsigned long long)number * stride, i < limit);
  }
};

// What the kernel before does not write is read while that still runs: first the columns of a block's inputs and their
// thresholds, each thread what it needs itself.  `threshold` then says where those lie.
AS_DEVICE void stage_inputs(const Columns& p, const Slice& slice, int sides, int* column, float* early, const float** threshold) {
#pragma unroll 1
  for (int q = threadIdx.x; q < slice.quads(); q += THREADS) {
    const int input = slice.input(q);
    if (input >= p.input.size) continue;
    if (p.column) *reinterpret_cast<float4*>(column + 4 * q) = *reinterpret_cast<const float4*>(p.column + input);
#pragma unroll
    for (int side = 0; side < 2; ++side)
      if (p.staged && side < sides && threshold[side]) copy_async(early + side * p.slice + 4 * q, threshold[side] + input);
  }
#pragma unroll
  for (int side = 0; side < 2; ++side)
    if (p.staged && threshold[side]) threshold[side] = early + side * p.slice;
}

// Entries of nothing, to be beyond what will be kept.
AS_DEVICE void fill_list(Entry* list, int entries, u32 nothing) {
  const u32 pair = sizeof(Entry) == 2 ? nothing << 16 | nothing : nothing;
#pragma unroll 1
  for (int i = threadIdx.x; i < entries * (int)sizeof(Entry) / 16; i += THREADS)
    reinterpret_cast<Vec8*>(list)[i] = Vec8{{pair, pair, pair, pair}};
}

// [2, width] what a tile's results have to reach, and means.
AS_DEVICE void stage_bounds(const Columns& p, const Job& job, int begin, int width, float* bounds) {
  if (4 * (int)threadIdx.x < width && begin + 4 * (int)threadIdx.x < job.out) {
    if (p.passing.threshold) copy_async(bounds + 4 * threadIdx.x, p.passing.threshold + begin + 4 * threadIdx.x);
    if (p.passing.mean) copy_async(bounds + width + 4 * threadIdx.x, p.passing.mean + begin + 4 * threadIdx.x);
    touch(job.bias, begin + 4 * threadIdx.x);
  }
}

// A tile's results to where they belong; sum(side, b, place) is one.
template <class Sum>
AS_DEVICE void give_results(const Columns& p, const Job& job, int split, int begin, int width, const float* bounds, Sum sum) {
  const Passing near{
      nullptr, nullptr, nullptr, p.passing.threshold ? bounds : nullptr, p.passing.mean ? bounds + width : nullptr, 0,
      p.passing.positive};
#pragma unroll 1
  for (int at = threadIdx.x; at < width * p.rows; at += THREADS) {
    const int b = B == 1 ? 0 : at / width, place = at - b * width, output = begin + place;
    if (output >= job.out) continue;
    float y = sum(0, b, place);
    if (split == 0 && job.bias) y += job.bias[output];
    if (p.passing.value) {
      y = activate(p.activation, y);
      if (p.jobs > 1) {
        float second = sum(1, b, place);
        if (p.job[1].bias) second += p.job[1].bias[output];
        y *= activate(p.second_activation, second);
      }
      p.passing.value[(i64)b * p.passing.size + output] = near.sieve(y, place);
    } else if (job.rounded) {
      job.rounded[(i64)b * job.out + output] = narrow(y);
    } else {
      job.y[((i64)split * p.rows + b) * job.out + output] = y;
    }
  }
}

#if AS_ROWS == 1

AS_DEVICE float sum_of_warps(const float* results, int apart) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < MOST_WARPS; ++w) sum += results[w * apart];
  return sum;
}

// y = sum over kept i of x_i W[:, i], W stored [I, O]: a block takes one tile of outputs and one slice of the inputs.
AS_KERNEL(512, BLOCKS) columns_kernel(AS_PARAMETER Columns p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, lanes = 1 << p.bits, width = 8 * lanes;
  const int split = blockIdx.x / p.tiles, tile = blockIdx.x - split * p.tiles, first = (threadIdx.x & (lanes - 1)) * 8;
  const int sides = p.passing.value ? p.jobs : 1;
  const Slice slice{split, p.splits, p.input.size, p.inverse};
  const Job& job = sides > 1 ? p.job[0] : job_of(p.job, p.jobs, tile);
  const int begin = (tile - job.begin) * width;
  float* const early = shared;  // thresholds [sides, slice], residual [I], norm [I]; then the ring
  float* const scratch = shared + THREADS * RING * 4;
  float* const bounds = scratch + 4 * MOST_WARPS;             // [2, width] what results have to reach, means
  float* const x = bounds + 2 * width;                        // [slice + 4], zeros behind the slice
  float* const results = x + p.slice + 4;                     // [sides, warps, width]
  int* const column = reinterpret_cast<int*>(results + sides * MOST_WARPS * width);  // [slice] if any
  const int listed = (int)(reinterpret_cast<float*>(column) - shared) + (p.column ? p.slice : 0);
  Entry* const list = reinterpret_cast<Entry*>(shared + hidden(listed));  // side after side
  const float* residual = p.input.residual;
  const float* norm = p.input.norm;
  const float* threshold[2] = {job.threshold, p.job[1].threshold};
  const bool idle = split >= p.splits;
  const int groups = hidden(1 << (THREAD_BITS - p.bits)), group = threadIdx.x >> p.bits;  // threads of a group share a column
  const int nothing = p.slice;  // an entry that adds zero times zero
  if (!idle) {
    stage_inputs(p, slice, sides, column, early, threshold);
    fill_list(list, sides * (p.slice + groups) + RING * groups, (u32)nothing);
    if (threadIdx.x == 0) x[nothing] = 0.0f;
    if (p.staged) {
      float* const staged[2] = {early + sides * p.slice, early + sides * p.slice + p.input.size};
#pragma unroll 1
      for (int q = threadIdx.x; 4 * q < p.input.size; q += THREADS) {
        if (residual) copy_async(staged[0] + 4 * q, residual + 4 * q);
        if (norm) copy_async(staged[1] + 4 * q, norm + 4 * q);
      }
      if (residual) residual = staged[0];
      if (norm) norm = staged[1];
    }
    stage_bounds(p, job, begin, width, bounds);
    close_copies();
    wait_for_copies<0>();
  }
  // Worked out while the kernel before runs: hidden, lest it is done where it is used.
  const int from = begin + first, skipped = p.column ? 0 : 32 * split;
  const u16* w = hidden(job.w + from + skipped * job.stride);
  u32 stride = (u32)hidden((int)(2 * job.stride));
  const Coming coming{column, p.column != nullptr, hidden(p.splits - 1), hidden(from < job.out ? nothing : 0)};
  wait_for_previous();
  if (idle) return linger();

  const float factor = load_quads<true>(
      p.input, p.rows, residual, norm, norm ? p.input.size / 4 : slice.quads(), scratch,
      [&](int q) { return norm ? 4 * q : slice.input(q); },
      [&](int, int q, float4 v) {
        if (norm && p.splits > 1) {  // a sum of squares needs all; the others are not kept
          const int row = slice.row_of(q >> 3);
          if ((q >> 3) - row * p.splits != split) return;
          q = 8 * row + (q & 7);
        }
        *reinterpret_cast<float4*>(x + 4 * q) = v;
      });
  constexpr int APART = 256;                                  // places of one step from those of the next
  u16* const ring = reinterpret_cast<u16*>(shared) + warp * RING * APART + 8 * lane;
  const Counts count =
      keep_inputs(slice, x, factor, threshold, sides, p.staged, reinterpret_cast<int*>(scratch) + MOST_WARPS, list, groups);
  const int first_steps = (count.first + groups - 1) >> (THREAD_BITS - p.bits);
  const int all_steps = first_steps + ((count.second + groups - 1) >> (THREAD_BITS - p.bits));
  __syncthreads();
  {
    const Entry* at = list + group;
    u16* to = ring;
#pragma unroll 1
    for (int s = 0; s < RING; ++s, at += groups, to += APART) {
      if (s == first_steps && sides > 1) w = p.job[1].w + from, stride = (u32)(2 * p.job[1].stride);
      coming.copy(*at, w, stride, to);
      close_copies();
    }
  }
  float sum[8];
  int step = 0;
#pragma unroll 1
  for (int part = 0; part <= sides; ++part) {  // the first side's but the last, its last while the second's come in, the second's
    const int end = part == 0 ? first_steps - RING : part == 1 ? first_steps : all_steps;
    if (part != 1) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] = 0.0f;
    }
    if (part == 1 && sides > 1) w = p.job[1].w + from, stride = (u32)(2 * p.job[1].stride);
    const Entry* at = list + step * groups + group;
    const Entry* ahead = at + RING * groups;
#pragma unroll 1
    for (; step < end; ++step, at += groups, ahead += groups) {
      wait_for_copies<RING - 1>();
      u16* const place = ring + (step & (RING - 1)) * APART;
      const Vec8 held = *reinterpret_cast<const Vec8*>(place);
      const u32 entry = *at, after = *ahead;
      const float by = x[entry];
      float v[8];
#pragma unroll
      for (int e = 0; e < 4; ++e) widen2(held.w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += by * v[e];
      coming.copy(after, w, stride, place);
      close_copies();
    }
    if (part == 0) continue;
    const int side = part - 1;
#pragma unroll 1
    for (int offset = lanes; offset < 32; offset <<= 1)
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], offset);
    float* const to = results + (side * MOST_WARPS + warp) * width + first;
    if (lane < lanes) {
      *reinterpret_cast<float4*>(to) = make_float4(sum[0], sum[1], sum[2], sum[3]);
      *reinterpret_cast<float4*>(to + 4) = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
  }
  __syncthreads();
  give_results(p, job, split, begin, width, bounds, [&](int side, int, int place) {
    return factor * sum_of_warps(results + side * MOST_WARPS * width + place, width);
  });
}
#endif

// Adds the splits up and rounds: [S, rows, O] to [rows, O].
struct Finish {
  const float* parts;
  u16* y;
  i64 size;
  int splits;
};

// Every block has a share: one without work would have to linger, and the next kernel to wait for that.
AS_KERNEL(256, 2) finish_kernel(AS_PARAMETER Finish p) {
  wait_for_previous();
  const int end = share_of((int)p.size, blockIdx.x + 1, gridDim.x);
#pragma unroll 1
  for (int i = share_of((int)p.size, blockIdx.x, gridDim.x) + threadIdx.x; i < end; i += blockDim.x) {
    float y = 0.0f;
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) y += p.parts[s * p.size + i];
    p.y[i] = narrow(y);
  }
}
