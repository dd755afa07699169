// The product by columns.  Letters: B rows of x, I inputs, O outputs, S splits.
struct Columns {
  Input input;
  Job job[3];
  Passing passing;          // results instead of y: of one job, or of two side by side
  const int* column;        // [I] of each input; null: its number
  int jobs, splits, rows, bits, tiles;  // 1 << bits threads side by side in a tile, 8 outputs each; tiles: of all jobs, or of
                                        // each side by side
  int slice, staged, activation, second_activation;  // slice: most inputs of a block; staged: what is early fits the ring
};

constexpr int THREAD_BITS = 9;  // 512 threads

// Weights on their way into the ring, list after list: a thread copies what it will multiply itself.
struct Coming {
  const u16* w[2];          // this thread's outputs of the slice's first column
  const Entry* list;        // [sides, slice]
  const int* column;        // [slice] or null
  u16* ring;
  i64 stride[2];
  int count[2];
  int slice, splits, sides, bits, group;
  int side, at, left;       // what is copied next; steps until the list's end

  AS_MEMBER int count_of(int of) const { return of ? count[1] : count[0]; }
  AS_MEMBER int groups() const { return 1 << (THREAD_BITS - bits); }
  AS_MEMBER int steps(int of) const { return (count_of(of) + groups() - 1) >> (THREAD_BITS - bits); }

  AS_MEMBER void next(int slot) {
    if (left == 0 && side + 1 < sides) {
      ++side;
      at = group;
      left = steps(side);
    }
    const i64 apart = side ? stride[1] : stride[0];
    const u16* const from = side ? w[1] : w[0];
    if (from && at < count_of(side)) {
      const int i = list[side * slice + at] & 0xffff;
      copy_async(ring + slot * 256, from + (column ? column[i] : i + (i & ~31) * (splits - 1)) * apart);
    }
    close_copies();
    at += groups();
    --left;
  }
};

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
  const Slice slice{split, p.splits, p.input.size};
  const Job& job = sides > 1 ? p.job[0] : job_of(p.job, p.jobs, tile);
  const int begin = (tile - job.begin) * width;
  float* const early = shared;  // thresholds [sides, slice], residual [I], norm [I]; then the ring
  float* const scratch = shared + blockDim.x * RING * 4;
  float* const x = scratch + 4 * MOST_WARPS;                  // [slice, B]
  float* const results = x + p.slice * B;                     // [sides, warps, B, width]
  int* const column = reinterpret_cast<int*>(results + sides * MOST_WARPS * B * width);      // [slice] if any
  Entry* const list = reinterpret_cast<Entry*>(column + (p.column ? p.slice : 0));  // [sides, slice]
  const float* residual = p.input.residual;
  const float* norm = p.input.norm;
  const float* threshold[2] = {job.threshold, p.job[1].threshold};
  const bool idle = split >= p.splits;
  // What the kernel before does not write is read while that still runs, each thread what it needs itself.
  if (!idle) {
#pragma unroll 1
    for (int q = threadIdx.x; q < slice.quads(); q += blockDim.x) {
      const int input = slice.input(q);
      if (input >= p.input.size) continue;
      if (p.column) *reinterpret_cast<float4*>(column + 4 * q) = *reinterpret_cast<const float4*>(p.column + input);
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (p.staged && side < sides && threshold[side]) copy_async(early + side * p.slice + 4 * q, threshold[side] + input);
    }
    if (p.staged) {
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (threshold[side]) threshold[side] = early + side * p.slice;
      float* const staged[2] = {early + sides * p.slice, early + sides * p.slice + p.input.size};
#pragma unroll 1
      for (int q = threadIdx.x; 4 * q < p.input.size; q += blockDim.x) {
        if (residual) copy_async(staged[0] + 4 * q, residual + 4 * q);
        if (norm) copy_async(staged[1] + 4 * q, norm + 4 * q);
      }
      if (residual) residual = staged[0];
      if (norm) norm = staged[1];
    }
    close_copies();
    wait_for_copies<0>();
    if ((int)threadIdx.x < width && begin + (int)threadIdx.x < job.out) {
      touch(p.passing.threshold, begin + threadIdx.x);
      touch(p.passing.mean, begin + threadIdx.x);
      touch(job.bias, begin + threadIdx.x);
    }
  }
  wait_for_previous();
  if (idle) return linger();

  const float factor = load_quads(
      p.input, p.rows, residual, norm, norm ? p.input.size / 4 : slice.quads(), scratch,
      [&](int q) { return norm ? 4 * q : slice.input(q); },
      [&](int b, int q, int input, float4 v) {
        if (norm) {  // a sum of squares needs all; the others are not kept
          const int group = (q >> 3) / p.splits;
          if ((q >> 3) - group * p.splits != split) return;
          q = 8 * group + (q & 7);
        }
        float* const to = x + 4 * q * B + b;
        if (B == 1) *reinterpret_cast<float4*>(to) = v;
        else to[0] = v.x, to[B] = v.y, to[2 * B] = v.z, to[3 * B] = v.w;
      });
  u16* const ring = reinterpret_cast<u16*>(shared) + warp * RING * 256 + 8 * lane;
  Coming coming{{nullptr, nullptr}, list, p.column ? column : nullptr, ring, {job.stride, p.job[1].stride}, {0, 0}, p.slice,
                p.splits, sides, p.bits, (int)threadIdx.x >> p.bits, 0, 0, 0};
#pragma unroll 1
  for (int side = 0; side < sides; ++side) {
    const int count = keep_inputs(slice, x, factor, side ? threshold[1] : threshold[0], p.staged,
                                  reinterpret_cast<int*>(scratch) + MOST_WARPS * (1 + side), list + side * p.slice);
    if (side) coming.count[1] = count;
    else coming.count[0] = count;
  }
  if (begin + first < job.out) {
    const i64 skipped = p.column ? 0 : 32 * split;
    coming.w[0] = job.w + begin + first + skipped * job.stride;
    coming.w[1] = p.job[1].w + begin + first + skipped * p.job[1].stride;
  }
  __syncthreads();
  coming.at = coming.group;
  coming.left = coming.steps(0);
#pragma unroll 1
  for (int s = 0; s < RING; ++s) coming.next(s);
  int slot = 0;
#pragma unroll 1
  for (int side = 0; side < sides; ++side) {
    const int steps = coming.steps(side);
    float sum[B][8];
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[b][e] = 0.0f;
    const Entry* at = list + side * p.slice + coming.group;
    const Entry* const end = list + side * p.slice + coming.count_of(side);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at += coming.groups()) {
      wait_for_copies<RING - 1>();
      if (at < end && coming.w[0]) {
        const Vec8 w = *reinterpret_cast<const Vec8*>(coming.ring + slot * 256);
        const u32 entry = *at;
        const float* const of = x + (entry & 0xffffu) * B;
        float v[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
        for (int b = 0; b < B; ++b) {
          const float by = B == 1 || entry >> (16 + b) & 1u ? of[b] : 0.0f;
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[b][e] += by * v[e];
        }
      }
      coming.next(slot);
      slot = (slot + 1) & (RING - 1);
    }
#pragma unroll
    for (int b = 0; b < B; ++b) {
#pragma unroll 1
      for (int offset = lanes; offset < 32; offset <<= 1)
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[b][e] += __shfl_xor_sync(0xffffffffu, sum[b][e], offset);
      float* const to = results + ((side * MOST_WARPS + warp) * B + b) * width + first;
      if (lane < lanes) {
        *reinterpret_cast<float4*>(to) = make_float4(sum[b][0], sum[b][1], sum[b][2], sum[b][3]);
        *reinterpret_cast<float4*>(to + 4) = make_float4(sum[b][4], sum[b][5], sum[b][6], sum[b][7]);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < width * p.rows; at += blockDim.x) {
    const int b = B == 1 ? 0 : at / width, place = at - b * width, output = begin + place;
    if (output >= job.out) continue;
    const float* const from = results + b * width + place;
    float y = factor * sum_of_warps(from, B * width);
    if (split == 0 && job.bias) y += job.bias[output];
    if (p.passing.value) {
      y = activate(p.activation, y);
      if (sides > 1) {
        float second = factor * sum_of_warps(from + MOST_WARPS * B * width, B * width);
        if (p.job[1].bias) second += p.job[1].bias[output];
        y *= activate(p.second_activation, second);
      }
      p.passing.value[(i64)b * p.passing.size + output] = p.passing.sieve(y, output);
    } else if (job.rounded) {
      job.rounded[(i64)b * job.out + output] = narrow(y);
    } else {
      job.y[((i64)split * p.rows + b) * job.out + output] = y;
    }
  }
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
