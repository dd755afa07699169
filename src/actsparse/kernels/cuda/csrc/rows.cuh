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

// What a block's warps multiply: items are parts of rows, of `some` that are chosen or of begin, begin + 1, ...
struct Items {
  const Rows& p;
  const int* chosen;
  bool some;
  int begin, count, parts, per_unit;

  // Where the lane's first values of an item lie in its row, and where the row begins.
  AS_MEMBER const u16* row_of(int item, int& from) const {
    const int unit = item / per_unit, rest = item - unit * per_unit;
    const int matrix = rest >= parts ? 1 : 0;
    const int number = some ? chosen[unit] : begin + unit;
    from = (rest - matrix * parts) * PART + 8 * (threadIdx.x & 31);
    const bool paired = p.mode == PAIRED;
    const Job& job = paired ? p.job[matrix] : job_of(p.job, p.jobs, number);
    return job.w + (i64)(number - (paired ? 0 : job.begin)) * job.stride;
  }
};

// A warp's weights, copied ahead of their use into its ring: each lane copies what it will multiply itself.
struct Ahead {
  const Items& items;
  int size, item;
  const u16* from;          // this lane's next values
  int room, left;           // values from there to the row's end; steps to the part's end

  AS_MEMBER void begin() {  // an item
    left = 1 << 30;
    room = 0;
    if (item >= items.count * items.per_unit) return;
    int at;
    from = items.row_of(item, at);
    from += at;
    room = size - at;
    left = steps_of(at - 8 * (int)(threadIdx.x & 31), size);
  }
  AS_MEMBER static int steps_of(int at, int size) { return ((size - at < PART ? size - at : PART) + 255) >> 8; }
  AS_MEMBER void next(u16* to) {
    copy_or_zero(to, from, room > 0);
    close_copies();
    from += 256;
    room -= 256;
    if (--left) return;
    item += blockDim.x >> 5;
    begin();
  }
};

// x lies in shared memory with the two halves of each group of eight apart: neighbouring lanes then meet different banks.  Zeros
// up to whole steps.
AS_DEVICE int half_of(int size) { return ((size + 255) & ~255) / 2 + 16; }

// y = W x by rows: all of them, or those chosen.  PAIRED: jobs 0 and 1 side by side, one unit each.
AS_KERNEL(512, BLOCKS) rows_kernel(AS_PARAMETER Rows p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, blocks = gridDim.x;
  const bool some = p.chosen.size > 0, valued = p.chosen.value, paired = p.mode == PAIRED;
  const int size = p.input.size, parts = (size + PART - 1) / PART, per_unit = paired ? 2 * parts : parts;
  const int half = half_of(size), most = ((p.units + blocks - 1) / blocks + 4) & ~3;
  u16* const ring = reinterpret_cast<u16*>(shared) + warp * RING * 256 + 8 * lane;  // this lane's first place
  float* const x = shared + warps * RING * 128;
  float* const scratch = x + B * 2 * half;
  float* const results = scratch + 4 * MOST_WARPS;
  float* const source = results + (i64)most * per_unit * B;
  int* const chosen = reinterpret_cast<int*>(source + most * B);
  int* const place = chosen + most;
  const int first = share_of(p.units, blockIdx.x, blocks);
  Items items{p, chosen, some, first, share_of(p.units, blockIdx.x + 1, blocks) - first, parts, per_unit};
  Ahead ahead{items, size, warp, p.job[0].w, 0, 0};
  int start = first;
  if (some && !valued) {
#pragma unroll 1
    for (int i = threadIdx.x; i < items.count; i += blockDim.x) chosen[i] = p.chosen.index[first + i];
    __syncthreads();
  }
  for (int at = 32 * threadIdx.x; at < size; at += 32 * blockDim.x) {  // the lines of 128 bytes
    touch(p.input.norm, at);
    touch(p.input.residual, at);
  }
  // Weights depend on nothing: the first ones come in while the kernel before is still running.
  if (!valued) {
    ahead.begin();
#pragma unroll 1
    for (int s = 0; s < RING; ++s) ahead.next(ring + s * 256);
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
        ahead.begin();
#pragma unroll 1
        for (int s = 0; s < RING; ++s) ahead.next(ring + s * 256);
      }
    }
    if (waited == p.known) continue;
    for (int k = size + threadIdx.x; k < 2 * (half - 16); k += blockDim.x)  // a whole group of eight
      for (int b = 0; b < B; ++b) x[b * 2 * half + (k >> 3) * 4 + (k & 3) + (k & 4 ? half : 0)] = 0.0f;
    factor = load_quads<false>(
        p.input, p.rows, p.input.residual, p.input.norm, size / 4, scratch + 3 * MOST_WARPS, [](int q) { return 4 * q; },
        [&](int b, int q, float4 v) {
          *reinterpret_cast<float4*>(x + b * 2 * half + ((q >> 1) << 2) + (q & 1 ? half : 0)) = v;
        });
    if (B > 1 || !p.input.norm) __syncthreads();
  }
  if ((int)threadIdx.x < items.count) {
    const int number = some ? chosen[threadIdx.x] : first + (int)threadIdx.x;
    touch(p.passing.threshold, number);
    touch(p.passing.mean, number);
    touch(paired ? p.job[0].bias : nullptr, number);
  }
  int step = 0, part = warp % parts;
#pragma unroll 1
  for (int item = warp; item < items.count * per_unit; item += warps) {
    const float* of = x + part * (PART / 2) + 4 * lane;
    const int end = step + Ahead::steps_of(part * PART, size);
    part = (part + warps) % parts;
    float sum[B];
    for (int b = 0; b < B; ++b) sum[b] = 0.0f;
#pragma unroll 1
    for (; step < end; ++step, of += 128) {
      wait_for_copies<RING - 1>();
      u16* const place = ring + (step & (RING - 1)) * 256;
      const Vec8 w = *reinterpret_cast<const Vec8*>(place);
      float v[8];
#pragma unroll
      for (int e = 0; e < 4; ++e) widen2(w.w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const float4 low = *reinterpret_cast<const float4*>(of + b * 2 * half);
        const float4 high = *reinterpret_cast<const float4*>(of + b * 2 * half + half);
        sum[b] += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w;
        sum[b] += v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
      }
      ahead.next(place);
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
    const int total = sum_before(counts).total;
    if (threadIdx.x == 0) {
      p.passing.start[blockIdx.x] = start;
      p.passing.count[blockIdx.x] = total;
    }
  }
  if (!items.count) linger();
}
