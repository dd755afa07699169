// The product by columns of several rows of x, on tensor cores.  Letters: B rows of x, I inputs, O outputs, S splits.
//
// 16 bytes of weights are an operand as they lie: 8 outputs of an input are two rows of each of four matrices, of 16 outputs by 8
// inputs.  So a step of a warp is 8 entries of the list by 64 outputs, four products of m16n8k8 in tf32, which holds 16-bit
// weights exactly; x of more bits comes in two pieces.  Neighbouring lanes copy neighbouring outputs, 128 bytes of a column
// together, and multiply what others of their warp have copied: with 16 bytes of four columns side by side the memory gave half
// as much.
//
// A single row gains nothing (TEAL's step took 3.50 ms instead of 3.47): columns.cuh.
#if AS_ROWS > 1
constexpr int SIDE_BY_SIDE = 64;  // outputs of a warp
constexpr int AT_ONCE = RING / 2;  // steps under way: two copies each
constexpr u32 ROWS_MASK = (1u << B) - 1u;

// Where 8 outputs, number `piece` of a warp's 64, of one of four columns lie: eight neighbouring lanes meet all banks, whether
// they copy or multiply.
AS_DEVICE int place_of(int column, int piece) { return 64 * column + 8 * (piece ^ 2 * column); }

// x [B, apart] in float32, a block's slice of it, and which rows keep which inputs: B bits each, a quad's in a word of `kept`
// [sides, slice / 4].  All rows of a quad are under way together.  Returns a bit for every input that any row keeps, by side,
// four a quad in the order that the thread meets them.
AS_DEVICE uint2 load_rows(const Input& in, int rows, const Slice& slice, float* x, int apart, const float* const* threshold,
                          int sides, bool staged, u32* kept, int side_size) {
  uint2 any{0, 0};
#pragma unroll 1
  for (int q = threadIdx.x, shift = 0; q < slice.quads(); q += THREADS, shift += 4) {
    const int input = slice.input(q);
    if (input >= in.size) continue;
    float4 v[B];
    const float* part = in.parts + input;
    if (in.x) {
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const u32* const pair = reinterpret_cast<const u32*>(in.x + (b < rows ? b : 0) * in.size + input);
        widen2(pair[0], v[b].x, v[b].y);
        widen2(pair[1], v[b].z, v[b].w);
      }
    } else {
#pragma unroll
      for (int b = 0; b < B; ++b) v[b] = quad_at(part + (b < rows ? b : 0) * in.size, 0);
#pragma unroll 1
      for (int s = 1; s < in.splits; ++s) {
        part += rows * in.size;
#pragma unroll
        for (int b = 0; b < B; ++b) {
          const float4 more = quad_at(part + (b < rows ? b : 0) * in.size, 0);
          v[b].x += more.x, v[b].y += more.y, v[b].z += more.z, v[b].w += more.w;
        }
      }
    }
#pragma unroll
    for (int b = 0; b < B; ++b) {
      if (b >= rows) v[b] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      *reinterpret_cast<float4*>(x + b * apart + 4 * q) = v[b];
    }
#pragma unroll 1
    for (int side = 0; side < sides; ++side) {
      const float* const of = side ? threshold[1] : threshold[0];
      const float4 least = of ? quad_at(of, staged ? q : input >> 2) : make_float4(NOTHING, NOTHING, NOTHING, NOTHING);
      u32 word = 0;
#pragma unroll
      for (int b = 0; b < B; ++b) {
        word |= absolute(v[b].x) < least.x ? 0u : 1u << b;
        word |= absolute(v[b].y) < least.y ? 0u : 1u << (B + b);
        word |= absolute(v[b].z) < least.z ? 0u : 1u << (2 * B + b);
        word |= absolute(v[b].w) < least.w ? 0u : 1u << (3 * B + b);
      }
      kept[side * side_size + q] = word;
      u32 four = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) four |= word >> (e * B) & ROWS_MASK ? 1u << e : 0u;
      if (side) any.y |= four << shift;
      else any.x |= four << shift;
    }
  }
  return any;
}

// The inputs that any row keeps to `list`, as keep_inputs does; above 16 bits of an entry, which rows.
AS_DEVICE Counts list_inputs(uint2 any, const u32* kept, int side_size, int sides, int* counts, Entry* list, int step) {
  int before;
  const Counts all = count_kept(any.x, any.y, counts, before);
#pragma unroll 1
  for (int side = 0; side < sides; ++side) {
    u32 left = side ? any.y : any.x;
    Entry* to = side ? list + ((all.first + step - 1) & ~(step - 1)) + (before >> 16) : list + (before & 0xffff);
#pragma unroll 1
    for (int q = threadIdx.x; left; q += THREADS, left >>= 4) {
      if (!(left & 15u)) continue;
      const u32 word = kept[side * side_size + q];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const u32 rows = word >> (e * B) & ROWS_MASK;
        if (rows) *to++ = rows << 16 | (u32)(4 * q + e);
      }
    }
  }
  return all;
}

// y = sum over kept i of x_i W[:, i] for every row of x, W stored [I, O]: a block takes one tile of outputs and one slice of the
// inputs.  No norm and no residual.
AS_KERNEL(512, B <= 4 ? 2 : 1) columns_kernel(AS_PARAMETER Columns p) {
  AS_SHARED;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, width = 8 << p.bits, beside = p.bits - 3;
  const int split = blockIdx.x / p.tiles, tile = blockIdx.x - split * p.tiles;
  const int sides = p.passing.value ? p.jobs : 1, apart = p.slice + 4;  // other banks for each row
  const Slice slice{split, p.splits, p.input.size, p.inverse};
  const Job& job = sides > 1 ? p.job[0] : job_of(p.job, p.jobs, tile);
  const int begin = (tile - job.begin) * width, member = warp >> beside, members = MOST_WARPS >> beside;
  const int row = width + 4, side_size = members * B * row;  // of a side's results [members, B, width]
  // The last side's results take the place of the thresholds and then the ring.
  const int head = THREADS * RING * 4 > side_size ? THREADS * RING * 4 : side_size;
  float* const early = shared;                                // thresholds [sides, slice]
  float* const scratch = shared + head;
  float* const bounds = scratch + 4 * MOST_WARPS;             // [2, width] what results have to reach, means
  float* const x = bounds + 2 * width;                        // [B, apart]
  float* const results = x + B * apart;                       // of the first of two sides
  u32* const kept = reinterpret_cast<u32*>(results + (sides - 1) * side_size);  // [sides, slice / 4]
  // Hidden, lest they are worked out again wherever they are used.
  const int named = hidden((int)(reinterpret_cast<float*>(kept) - shared) + sides * (p.slice / 4));
  int* const column = reinterpret_cast<int*>(shared + named);  // [slice] if any
  Entry* const list = reinterpret_cast<Entry*>(shared + hidden(named + (p.column ? p.slice : 0)));  // side after side
  const float* threshold[2] = {job.threshold, p.job[1].threshold};
  const bool idle = split >= p.splits;
  const int groups = hidden(1 << (THREAD_BITS - p.bits));     // entries that are copied at a time; a step multiplies two each
  const int group = 4 * member + (lane & 3), copied = 4 * member + (lane >> 3);  // of what a lane multiplies and copies
  const int first = SIDE_BY_SIDE * (warp & ((1 << beside) - 1));
  if (!idle) {
    stage_inputs(p, slice, sides, column, early, threshold);
    fill_list(list, sides * (p.slice + 2 * groups) + RING * groups, (u32)p.slice);
    stage_bounds(p, job, begin, width, bounds);
    close_copies();
    wait_for_copies<0>();
  }
  const int from = begin + first + 8 * (lane & 7), skipped = p.column ? 0 : 32 * split;
  const u16* w = hidden(job.w + from + skipped * job.stride);
  u32 stride = (u32)hidden((int)(2 * job.stride));
  const Coming coming{column, p.column != nullptr, hidden(p.splits - 1), hidden(from < job.out ? p.slice : 0)};
  wait_for_previous();
  if (idle) return linger();

  const uint2 any = load_rows(p.input, p.rows, slice, x, apart, threshold, sides, p.staged, kept, p.slice / 4);
  const Counts count = list_inputs(any, kept, p.slice / 4, sides, reinterpret_cast<int*>(scratch), list, 2 * groups);
  const int step_bits = THREAD_BITS - p.bits + 1;
  const int first_steps = (count.first + 2 * groups - 1) >> step_bits;
  const int all_steps = first_steps + ((count.second + 2 * groups - 1) >> step_bits);
  constexpr int APART = 256;                                  // places of one copy from those of the next
  u16* const ring = reinterpret_cast<u16*>(shared) + warp * RING * APART + place_of(lane >> 3, lane & 7);
  const int operand = place_of(lane & 3, lane >> 2) - place_of(lane >> 3, lane & 7);
  const bool exact = p.input.x != nullptr;                    // x has 16 bits, and needs one piece
  const float* const of = x + (lane >> 2) * apart;
  const auto next = [&](const Entry* at, u16* place) {
    coming.copy(at[0], w, stride, place);
    coming.copy(at[groups], w, stride, place + APART);
    close_copies();
  };
  const auto turn = [&] { w = p.job[1].w + from, stride = (u32)(2 * p.job[1].stride); };
  __syncthreads();
#pragma unroll 1
  for (int s = 0; s < AT_ONCE; ++s) {
    if (s == first_steps && sides > 1) turn();
    next(list + s * 2 * groups + copied, ring + 2 * s * APART);
  }
  float sum[4][4];
  int step = 0;
#pragma unroll 1
  for (int part = 0; part <= sides; ++part) {  // the first side's but the last, its last while the second's come in, the second's
    const int end = part == 0 ? first_steps - AT_ONCE : part == 1 ? first_steps : all_steps;
    if (part != 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
    }
    if (part == 1 && sides > 1) turn();
    const Entry* at = list + step * 2 * groups + group;
    const Entry* ahead = list + (2 * step + RING) * groups + copied;
#pragma unroll 1
    for (; step < end; ++step, at += 2 * groups, ahead += 2 * groups) {
      wait_for_copies<AT_ONCE - 1>();
      __syncwarp();
      u16* const place = ring + (2 * step & (RING - 1)) * APART;
      const Vec8 held[2] = {*reinterpret_cast<const Vec8*>(place + operand),
                            *reinterpret_cast<const Vec8*>(place + operand + APART)};
      float value[2], rest[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const u32 entry = at[t * groups];
        value[t] = entry >> (16 + (lane >> 2)) & 1u ? of[entry & 0xffffu] : 0.0f;
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        rest[t] = exact || !(absolute(value[t]) < 3.0e38f) ? 0.0f : value[t] - head_of(value[t]);
        value[t] = exact ? value[t] : head_of(value[t]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float a[4];
        widen2(held[0].w[j], a[0], a[1]);
        widen2(held[1].w[j], a[2], a[3]);
        multiply_heads(sum[j], a, value);
        if (!exact) multiply_heads(sum[j], a, rest);
      }
      __syncwarp();
      next(ahead, place);
    }
    if (part == 0) continue;
    const bool last = part == sides;
    if (last) {
      wait_for_copies<0>();
      __syncthreads();
    }
    float* const to = (last ? shared : results) + member * B * row + first + 8 * (lane >> 2);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int b = 2 * (lane & 3) + n;
      if (b >= B) break;
#pragma unroll
      for (int t = 0; t < 2; ++t)
        *reinterpret_cast<float4*>(to + b * row + 4 * t) =
            make_float4(sum[2 * t][n], sum[2 * t][2 + n], sum[2 * t + 1][n], sum[2 * t + 1][2 + n]);
    }
  }
  __syncthreads();
  give_results(p, job, split, begin, width, bounds, [&](int side, int b, int place) {
    const float* from = (side == sides - 1 ? shared : results) + b * row + place;
    float y = 0.0f;
#pragma unroll 4
    for (int m = 0; m < members; ++m) y += from[m * B * row];
    return y;
  });
}
#endif
