// The two products.  Letters: B rows of x, I inputs, O outputs, S splits.  Sums have a fixed order: no atomics.
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
  Candidates candidates;
  Job job[3];
  int* list_index;          // compact results instead of y: neuron, mask, value [B, list_size], count
  int* list_mask;
  float* list_value;
  int* list_count;
  int jobs, units, mode, activation, second_activation, list_size, rows, prefetch_rows;
};

struct Columns {
  Input input;
  Candidates candidates;
  Job job[3];
  int jobs, splits, rows, slice;  // slice: most entries a block keeps
};

// sum[b] += W[row, from ...] . x[b, from ...] over at most PART inputs, this lane's share.
AS_DEVICE void dot_part(const u16* row, const float* x, int from, int size, float* sum) {
  const int lane = threadIdx.x & 31, half = half_of(size);
  Vec8 w[UNROLL];
#pragma unroll
  for (int j = 0; j < UNROLL; ++j) {
    const int k = from + j * 256 + lane * 8;
    if (k < size) w[j] = load_weights(row + k);
  }
#pragma unroll
  for (int j = 0; j < UNROLL; ++j) {
    const int k = from + j * 256 + lane * 8;
    if (k >= size) continue;
    float v[8];
#pragma unroll
    for (int e = 0; e < 4; ++e) widen2(w[j].w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      const float4 low = *reinterpret_cast<const float4*>(x + b * 2 * half + (k >> 1));
      const float4 high = *reinterpret_cast<const float4*>(x + b * 2 * half + half + (k >> 1));
      sum[b] += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w;
      sum[b] += v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
    }
  }
}

AS_DEVICE const Job& job_of(const Job* job, int jobs, int unit) {
  if (jobs > 2 && unit >= job[2].begin) return job[2];
  if (jobs > 1 && unit >= job[1].begin) return job[1];
  return job[0];
}

// y = W x by rows: all of them, or those that pass the candidates' rule.  PAIRED: jobs 0 and 1 side by side, one unit each.
AS_KERNEL(512, BLOCKS) rows_kernel(AS_PARAMETER Rows p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, blocks = gridDim.x;
  const bool listed = p.candidates.size > 0, paired = p.mode == PAIRED;
  const int size = p.input.size, parts = (size + PART - 1) / PART, per_unit = paired ? 2 * parts : parts;
  int begin = (int)((i64)p.units * blockIdx.x / blocks), count = (int)((i64)p.units * (blockIdx.x + 1) / blocks) - begin;
  let_next_start();
  if (!listed && (int)threadIdx.x < p.prefetch_rows) {
    const int matrix = paired ? threadIdx.x & 1 : 0, unit = begin + (paired ? threadIdx.x >> 1 : threadIdx.x);
    if (unit < begin + count) {
      const Job& job = paired ? p.job[matrix] : job_of(p.job, p.jobs, unit);
      prefetch(job.w + (i64)(unit - (paired ? 0 : job.begin)) * job.stride, (u32)size * 2);
    }
  }
  wait_for_previous();
  float* const x = shared;
  float* const scratch = x + B * stored_size(size);
  load_input(p.input, p.rows, x, scratch);
  const int most = ((p.units + blocks - 1) / blocks + 4) & ~3;
  float* const results = scratch + 32;
  float* const source = results + (i64)most * per_unit * B;
  int* const chosen = reinterpret_cast<int*>(source + most * B);
  int* const masks = chosen + most;
  if (listed) {
    const Range range =
        choose(p.candidates, p.rows, blockIdx.x, blocks, reinterpret_cast<int*>(scratch), chosen, masks, source,
                               reinterpret_cast<float*>(masks + most));
    begin = range.begin;
    count = range.count;
    if (blockIdx.x == 0 && threadIdx.x == 0 && p.list_count) *p.list_count = range.total;
  }
  const int items = count * per_unit;
  for (int item = warp; item < items; item += warps) {
    const int unit = item / per_unit, rest = item - unit * per_unit;
    const int matrix = rest >= parts ? 1 : 0, part = rest - matrix * parts;
    const int number = listed ? chosen[unit] : begin + unit;
    const Job& job = paired ? p.job[matrix] : job_of(p.job, p.jobs, number);
    const u16* const row = job.w + (i64)(number - (paired ? 0 : job.begin)) * job.stride;
    float sum[B];
    for (int b = 0; b < B; ++b) sum[b] = 0.0f;
    dot_part(row, x, part * PART, size, sum);
    for (int b = 0; b < B; ++b) {
      const float whole = warp_sum(sum[b]);
      if (lane == 0) results[item * B + b] = whole;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < count * p.rows; at += blockDim.x) {
    const int b = at / count, unit = at - b * count;
    const int number = listed ? chosen[unit] : begin + unit;
    const Job& job = paired ? p.job[0] : job_of(p.job, p.jobs, number);
    const int row = number - (paired ? 0 : job.begin);
    float r = 0.0f, second = 0.0f;
    for (int part = 0; part < parts; ++part) r += results[(unit * per_unit + part) * B + b];
    if (job.bias) r += job.bias[row];
    if (paired) {
      for (int part = 0; part < parts; ++part) second += results[(unit * per_unit + parts + part) * B + b];
      if (p.job[1].bias) second += p.job[1].bias[row];
    }
    if (p.mode == TIMES_SOURCE) {
      r = source[unit * B + b] * activate(p.second_activation, r);
    } else if (p.mode != RAW) {
      r = activate(p.activation, r);
      if (paired) r *= activate(p.second_activation, second);
    }
    if (p.list_value) {
      p.list_value[(i64)b * p.list_size + begin + unit] = r;
      if (b == 0) {
        p.list_index[begin + unit] = number;
        p.list_mask[begin + unit] = masks[unit];
      }
    } else if (job.rounded) {
      job.rounded[(i64)b * job.out + row] = narrow(r);
    } else {
      job.y[(i64)b * job.out + row] = r;
    }
  }
}

// y = sum over kept i of x_i W[:, i], W stored [I, O]: blockIdx.x is a tile of outputs, blockIdx.y a split of the kept.
template <int TILE>
AS_DEVICE void columns(const Columns& p, float* shared) {
  constexpr int LANES = TILE / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const Job& job = job_of(p.job, p.jobs, blockIdx.x);
  let_next_start();
  wait_for_previous();
  float* const scratch = shared;
  float* const value = scratch + 32;
  int* const index = reinterpret_cast<int*>(value + p.slice * B);
  float* const x = value + p.slice * (B + 1);
  Range range;
  if (p.candidates.size > 0) {
    range = choose(p.candidates, p.rows, blockIdx.y, p.splits, reinterpret_cast<int*>(scratch), index, nullptr, value, x);
  } else {
    const int half = half_of(p.input.size);
    const float* const threshold = job.threshold;
    load_input(p.input, p.rows, x, scratch);
    if (B == 1 && p.input.size <= MOST_SINGLE)
      range = compact_one(p.input.size, blockIdx.y, p.splits, reinterpret_cast<int*>(scratch), index, nullptr, value,
                          [&](int i, int next) {
                            u32 kept = 0;
                            for (int j = 0; j < 8; j += 4, i = next) {
                              if (i >= p.input.size) continue;
                              const float4 v = *reinterpret_cast<const float4*>(x + place_of(i, half));
                              const float4 t = threshold ? quad_at(threshold, i / 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                              kept |= absolute(v.x) < t.x ? 0u : 1u << j;
                              kept |= absolute(v.y) < t.y ? 0u : 2u << j;
                              kept |= absolute(v.z) < t.z ? 0u : 4u << j;
                              kept |= absolute(v.w) < t.w ? 0u : 8u << j;
                            }
                            return kept;
                          },
                          [&](int i) { return x[place_of(i, half)]; });
    else
      range = compact(p.input.size, blockIdx.y, p.splits, reinterpret_cast<int*>(scratch), index, nullptr, value,
                    [&](int i, int end) {
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
  const int groups = warps * (32 / LANES), group = threadIdx.x / LANES, first = (threadIdx.x % LANES) * 8;
  const int column = (blockIdx.x - job.begin) * TILE + first;
  float sum[B][8];
  for (int b = 0; b < B; ++b)
    for (int e = 0; e < 8; ++e) sum[b][e] = 0.0f;
  if (column < job.out) {
    const u16* const at = job.w + column;
    for (int k = group; k < range.count; k += groups * UNROLL) {
      Vec8 w[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (k + u * groups < range.count) w[u] = load_weights(at + index[k + u * groups] * job.stride);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (k + u * groups >= range.count) break;
        float v[8];
#pragma unroll
        for (int e = 0; e < 4; ++e) widen2(w[u].w[e], v[2 * e], v[2 * e + 1]);
#pragma unroll
        for (int b = 0; b < B; ++b) {
          const float factor = value[(k + u * groups) * B + b];
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[b][e] += factor * v[e];
        }
      }
    }
  }
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
  for (int at = threadIdx.x; at < TILE * p.rows; at += blockDim.x) {
    const int b = at / TILE, output = (blockIdx.x - job.begin) * TILE + at % TILE;
    if (output >= job.out) continue;
    float y = blockIdx.y == 0 && job.bias ? job.bias[output] : 0.0f;
    for (int w = 0; w < warps; ++w) y += results[(w * B + b) * TILE + at % TILE];
    if (job.rounded)
      job.rounded[(i64)b * job.out + output] = narrow(y);
    else
      job.y[((i64)blockIdx.y * p.rows + b) * job.out + output] = y;
  }
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

AS_KERNEL(256, 1) finish_kernel(AS_PARAMETER Finish p) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  let_next_start();
  wait_for_previous();
  if (i >= p.size) return;
  float y = 0.0f;
  for (int s = 0; s < p.splits; ++s) y += p.parts[s * p.size + i];
  p.y[i] = narrow(y);
}
