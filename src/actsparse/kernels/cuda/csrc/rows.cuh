// The product by rows.  Letters: B rows of x, I inputs, N neurons, O outputs.  Sums have a fixed order: no atomics.
enum Mode { RAW = 0, ACTIVATED = 1, PAIRED = 2, TIMES_SOURCE = 3 };

struct Job {                // one matrix
  const u16* w;             // [O, stride] by rows or [I, stride] by columns
  const float* bias;        // [O]
  const float* threshold;   // [I], by columns only
  float* y;                 // [S, B, O]
  u16* rounded;             // [B, O] instead of y
  i64 stride;
  int out, begin;           // outputs; first unit of work (row or tile)
};

struct Rows {
  Input input;
  Chosen chosen;
  Job job[3];
  Passing passing;          // results instead of y
  int jobs, units, mode, activation, second_activation, rows, prefetch_rows, beside;
  int known;                // x does not depend on the kernel before
};

constexpr int RING = AS_RING;  // 16-byte copies under way per thread
constexpr int PART = 2048;     // inputs of a row that one warp takes at a time

AS_DEVICE const Job& job_of(const Job* job, int jobs, int unit) {
  if (jobs > 2 && unit >= job[2].begin) return job[2];
  if (jobs > 1 && unit >= job[1].begin) return job[1];
  return job[0];
}

// What a block's warps multiply: items are parts of rows.  `chosen` null: rows begin, begin + 1, ...
struct Items {
  const Rows& p;
  const int* chosen;
  int begin, count, parts, per_unit;

  // Where the lane's first values of an item lie in its row, and where the row begins.
  AS_MEMBER const u16* row_of(int item, int& from) const {
    const int unit = item / per_unit, rest = item - unit * per_unit;
    const int matrix = rest >= parts ? 1 : 0;
    const int number = chosen ? chosen[unit] : begin + unit;
    from = (rest - matrix * parts) * PART + 8 * (threadIdx.x & 31);
    const bool paired = p.mode == PAIRED;
    const Job& job = paired ? p.job[matrix] : job_of(p.job, p.jobs, number);
    return job.w + (i64)(number - (paired ? 0 : job.begin)) * job.stride;
  }
};

// A warp's weights, copied ahead of their use into its ring: each lane copies what it will multiply itself.
struct Ahead {
  u16* ring;                // this lane's 16 bytes of the first stage
  const u16* row;
  int item, from, slot;

  AS_MEMBER void next(const Items& items, int size) {
    if (item < items.count * items.per_unit) {
      if (!row) row = items.row_of(item, from);
      if (from < size) copy_async(ring + slot * 256, row + from);
      from += 256;
      const int past = from - 8 * (int)(threadIdx.x & 31);
      if (past >= size || past % PART == 0) {
        row = nullptr;
        item += blockDim.x >> 5;
      }
    }
    close_copies();
    slot = (slot + 1) % RING;
  }
};

// x lies in shared memory with the two halves of each group of eight apart: neighbouring lanes then meet different banks.
AS_DEVICE int half_of(int size) { return ((size / 2 + 31) & ~31) + 16; }

// y = W x by rows: all of them, or those chosen.  PAIRED: jobs 0 and 1 side by side, one unit each.
AS_KERNEL(512, BLOCKS) rows_kernel(AS_PARAMETER Rows p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, blocks = gridDim.x;
  const bool some = p.chosen.size > 0, valued = p.chosen.value, paired = p.mode == PAIRED;
  const int size = p.input.size, parts = (size + PART - 1) / PART, per_unit = paired ? 2 * parts : parts;
  const int half = half_of(size), most = ((p.units + blocks - 1) / blocks + 4) & ~3;
  u16* const ring = reinterpret_cast<u16*>(shared);
  float* const x = shared + warps * RING * 128;
  float* const scratch = x + B * 2 * half;
  float* const results = scratch + 4 * MOST_WARPS;
  float* const source = results + (i64)most * per_unit * B;
  int* const chosen = reinterpret_cast<int*>(source + most * B);
  int* const place = chosen + most;
  const int first = share_of(p.units, blockIdx.x, blocks);
  Items items{p, some ? chosen : nullptr, first, share_of(p.units, blockIdx.x + 1, blocks) - first, parts, per_unit};
  Ahead ahead{ring + warp * RING * 256 + 8 * lane, nullptr, warp, 0, 0};
  int start = first;
  if (some && !valued) {
#pragma unroll 1
    for (int i = threadIdx.x; i < items.count; i += blockDim.x) chosen[i] = p.chosen.index[first + i];
    __syncthreads();
  }
  // Weights depend on nothing: the first ones come in while the kernel before is still running.
  if (!valued) {
#pragma unroll 1
    for (int s = 0; s < RING; ++s) ahead.next(items, size);
    const int unit = first + warps / per_unit + (int)threadIdx.x;  // after those in the ring
    if ((int)threadIdx.x < p.prefetch_rows && unit < first + items.count && !paired) {
      const Job& job = job_of(p.job, p.jobs, unit);
      prefetch(job.w + (i64)(unit - job.begin) * job.stride, (u32)size * 2);
    }
  }
  float factor = 1.0f;
#pragma unroll 1
  for (int waited = 0; waited < 2; ++waited) {
    if (waited) {
      if (p.beside) let_next_start();
      else wait_for_previous();
      if (valued) {
        const Share share =
            share_of_chosen(p.chosen, p.rows, reinterpret_cast<int*>(scratch), chosen, place, source, p.passing.value);
        items.count = share.count;
        start = share.start;
#pragma unroll 1
        for (int s = 0; s < RING; ++s) ahead.next(items, size);
      }
    }
    if (waited == p.known) continue;
    factor = load_quads(
        p.input, p.rows, p.input.residual, p.input.norm, size / 4, scratch, [](int q) { return 4 * q; },
        [&](int b, int q, int, float4 v) {
          *reinterpret_cast<float4*>(x + b * 2 * half + ((q >> 1) << 2) + (q & 1 ? half : 0)) = v;
        });
  }
  if ((int)threadIdx.x < items.count) {
    const int number = some ? chosen[threadIdx.x] : first + (int)threadIdx.x;
    touch(p.passing.threshold, number);
    touch(p.passing.mean, number);
    touch(paired ? p.job[0].bias : nullptr, number);
  }
  int slot = 0;
#pragma unroll 1
  for (int item = warp; item < items.count * per_unit; item += warps) {
    const int from = (item % parts) * PART + 8 * lane;
    float sum[B];
    for (int b = 0; b < B; ++b) sum[b] = 0.0f;
#pragma unroll 1
    for (int k = from; k - 8 * lane < size && k < from + PART; k += 256) {
      wait_for_copies<RING - 1>();
      const Vec8 w = *reinterpret_cast<const Vec8*>(ring + (warp * RING + slot) * 256 + 8 * lane);
      if (k < size) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
        for (int b = 0; b < B; ++b) {
          const float4 low = *reinterpret_cast<const float4*>(x + b * 2 * half + (k >> 1));
          const float4 high = *reinterpret_cast<const float4*>(x + b * 2 * half + half + (k >> 1));
          sum[b] += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w;
          sum[b] += v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
        }
      }
      ahead.next(items, size);
      slot = (slot + 1) % RING;
    }
    for (int b = 0; b < B; ++b) {
      const float whole = factor * warp_sum(sum[b]);
      if (lane == 0) results[item * B + b] = whole;
    }
  }
  __syncthreads();
  if (p.beside) wait_beside();
  // One unit a thread.
  int passed = 0;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < items.count; unit += blockDim.x) {
    const int number = some ? chosen[unit] : first + unit;
    const Job& job = paired ? p.job[0] : job_of(p.job, p.jobs, number);
    const int row = number - (paired ? 0 : job.begin);
    bool any = false;
#pragma unroll 1
    for (int b = 0; b < p.rows; ++b) {
      float r = job.bias ? job.bias[row] : 0.0f, second = paired && p.job[1].bias ? p.job[1].bias[row] : 0.0f;
      const float* const of = results + unit * per_unit * B + b;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        r += of[part * B];
        if (paired) second += of[(parts + part) * B];
      }
      if (p.mode == TIMES_SOURCE) {
        r = source[unit * B + b] * activate(p.second_activation, r);
      } else if (p.mode != RAW) {
        r = activate(p.activation, r);
        if (paired) r *= activate(p.second_activation, second);
      }
      if (p.passing.value) {
        r = valued && source[unit * B + b] == 0.0f ? 0.0f : p.passing.sieve(r, number);
        p.passing.value[(i64)b * p.passing.size + (valued ? place[unit] : first + unit)] = r;
        any = any || r != 0.0f;
      } else if (job.rounded) {
        job.rounded[(i64)b * job.out + row] = narrow(r);
      } else {
        job.y[(i64)b * job.out + row] = r;
      }
    }
    passed += any;
  }
  if (p.passing.value && blockIdx.x == gridDim.x - 1)  // up to whole groups of four
    for (int at = p.units + threadIdx.x; at < p.passing.size; at += blockDim.x)
      for (int b = 0; b < p.rows; ++b) p.passing.value[(i64)b * p.passing.size + at] = 0.0f;
  if (p.passing.count) {
    const int counted = scan_warp(passed);
    int* const counts = reinterpret_cast<int*>(scratch);
    if (lane == 31) counts[warp] = counted;
    __syncthreads();
    if (threadIdx.x == 0) {
      p.passing.start[blockIdx.x] = start;
      p.passing.count[blockIdx.x] = sum_before(counts).total;
    }
  }
  if (!items.count) linger();
}
