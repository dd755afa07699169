// The product with packed columns, on the lists of depths.cuh.
struct PlaneSums {
  int of[B][HALVES][4][4];  // [row][half][code of a byte]: words of the half x high and low byte of coefficients
  int factor[B][HALVES];    // of the lane's columns: the sum of its coefficients' bytes
};

// What a lane needs to make coefficients: one byte of a product at the place of byte j', or zero.
struct PlaneLane {
  u32 rounding, selector;
};

AS_DEVICE PlaneLane plane_lane(int lane) {
  const u32 j = lane >> 3, high = lane >> 2 & 1;
  // The high byte belongs to a low byte that has a sign.
  return {high ? 0x808000u : 0x8000u, 0x4444u ^ ((4u ^ (2u + high)) << 4 * j)};
}

AS_DEVICE u32 coefficient(PlaneLane lane, int factor, u32 mantissa) {
  return select_bytes((u32)factor * mantissa + lane.rounding, 0u, lane.selector);
}

// A warp's eight entries: words of entries t and t + 4, of each half the lane's two; their mantissas and factors.
AS_DEVICE void multiply_entries(const u32 (&word)[2][HALVES][2], const u32 (&mantissa)[2][HALVES], const int (&factor)[B][2],
                                PlaneLane lane, PlaneSums& sums) {
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    u32 first[B], second[B];
#pragma unroll
    for (int b = 0; b < B; ++b) {
      first[b] = coefficient(lane, factor[b][0], mantissa[0][h]);
      second[b] = coefficient(lane, factor[b][1], mantissa[1][h]);
      sums.factor[b][h] = add_bytes(second[b], add_bytes(first[b], sums.factor[b][h]));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 mask = 0x03030303u << 2 * k;
      const u32 a0 = word[0][h][0] & mask, a1 = word[0][h][1] & mask, a2 = word[1][h][0] & mask, a3 = word[1][h][1] & mask;
#pragma unroll
      for (int b = 0; b < B; ++b) multiply_tile(sums.of[b][h][k], a0, a1, a2, a3, first[b], second[b]);
    }
  }
}

// Where a tile's output lies among a block's results: lanes that add together meet different banks.
AS_DEVICE int place_of_result(int output) {
  const int half = output >> 8, j = output >> 6 & 3, k = output >> 4 & 3, g = output >> 1 & 7, e = output & 1;
  return ((half * 4 + k) * 2 + e) * 32 + g * 4 + j;
}

// Adds a warp's sums to the block's: twice the code less three, times the coefficient, in integers.
AS_DEVICE void add_sums(const PlaneSums& sums, int half, int* result) {
  const int lane = threadIdx.x & 31, t = lane & 3;
#pragma unroll
  for (int b = 0; b < B; ++b)
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      int all = sums.factor[b][h];
      all += __shfl_xor_sync(0xffffffffu, all, 1);
      all += __shfl_xor_sync(0xffffffffu, all, 2);
      const int low = __shfl_sync(0xffffffffu, all, 8 * t), high = __shfl_sync(0xffffffffu, all, 8 * t + 4);
      const int coefficients = 3 * (256 * high + low);
      int* const to = result + b * PLANE_TILE + (half + h) * (PLANE_TILE / 2) + lane;
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // codes stand 2 k bits high: the sums are multiples of 4^k
          const int sum = 256 * (sums.of[b][h][k][2 * e + 1] >> 2 * k) + (sums.of[b][h][k][2 * e] >> 2 * k);
          atomicAdd(to + (2 * k + e) * 32, 2 * sum - coefficients);
        }
    }
}

// What a warp has under way of an eight of entries: the lane's words of entries t and t + 4.
struct PlaneWords {
#if AS_ROWS <= 2
  uint4 of[2];
#else
  uint2 of[2];
#endif

  AS_MEMBER void load(const unsigned char* codes, const u16* run) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const unsigned char* const from = codes + (u32)run[4 * q] * RUN;
#if AS_ROWS <= 2
      of[q] = load_codes16(from);
#else
      of[q] = load_codes(from);
#endif
    }
  }
};

AS_DEVICE void load_ahead(const unsigned char* codes, const u16* run, int at, int end, PlaneWords (&words)[STAGES]) {
#pragma unroll
  for (int s = 0; s < STAGES; ++s)
    if (at + 8 * s < end) words[s].load(codes, run + at + 8 * s);
}

// Products of a lane's entries of a list; the first eights have been loaded.  Codes come into registers, well ahead:
// asynchronous copies into shared memory reach two thirds of the bandwidth here.
AS_DEVICE void multiply_list(const Planes& p, const PlaneRoom& room, const unsigned char* codes, int half, int at, int end,
                             PlaneWords (&words)[STAGES], PlaneSums& sums) {
  const int lane = threadIdx.x & 31;
  const unsigned char* const mantissas = room.mantissa + (lane >> 3) * 2 + half;
  const PlaneLane constants = plane_lane(lane);
  while (at < end) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      if (at >= end) break;
      u32 word[2][HALVES][2], mantissa[2][HALVES];
      int factor[B][2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const unsigned char* const of = mantissas + high_product(room.run[at + 4 * q], p.inverse) * 8;
#if AS_ROWS <= 2
        const u32 pair = *reinterpret_cast<const u16*>(of);
        mantissa[q][0] = pair & 255u, mantissa[q][1] = pair >> 8;
        word[q][0][0] = words[s].of[q].x, word[q][0][1] = words[s].of[q].y;
        word[q][1][0] = words[s].of[q].z, word[q][1][1] = words[s].of[q].w;
#else
        mantissa[q][0] = *of;
        word[q][0][0] = words[s].of[q].x, word[q][0][1] = words[s].of[q].y;
#endif
#pragma unroll
        for (int b = 0; b < B; ++b) factor[b][q] = room.factor[b * room.entries + at + 4 * q];
      }
      multiply_entries(word, mantissa, factor, constants, sums);
      if (at + 8 * STAGES < end) words[s].load(codes, room.run + at + 8 * STAGES);
      at += 8;
    }
  }
}

// From the warps' lists to the block's results, in shared memory; `ahead` is the segment whose first codes are under way.
AS_DEVICE void multiply_share(const Planes& p, const PlaneShare& share, const PlaneRoom& room, int ahead,
                              PlaneWords (&words)[STAGES]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half = HALVES == 2 ? 0 : warp & 1;
  bool fresh = true;  // no other list's codes have come into the registers since
#pragma unroll 1
  for (int segment = 0; segment < share.segments; ++segment) {
    const unsigned char* const codes = room.base[segment] + (lane >> 2) * 16 + half * 8;
    bool some = false;
    PlaneSums sums;
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        sums.factor[b][h] = 0;
#pragma unroll
        for (int e = 0; e < 16; ++e) sums.of[b][h][e / 4][e % 4] = 0;
      }
#pragma unroll 1
    for (int l = 0; l < LISTS; ++l) {
      const int* const bound = room.bound + (warp ^ l) * (p.segments + 1) + segment;
      const int at = bound[0] + (lane & 3), end = bound[1];  // the lane's entries are this one and the fourth from it
      if (at >= end) continue;
      // Of several lists a partner's may begin before the warp's own does.
      if (l || segment != ahead || (LISTS > 1 && !fresh)) load_ahead(codes, room.run, at, end, words);
      fresh = false;
      multiply_list(p, room, codes, half, at, end, words, sums);
      some = true;
    }
    if (some) add_sums(sums, half, room.result + segment * B * PLANE_TILE);
  }
}

AS_DEVICE void store_plane(const PlaneJob& job, i64 at, float y) {
  if (job.y)
    job.y[at] = y;
  else
    job.rounded[at] = narrow(y);
}

AS_KERNEL(PLANE_THREADS, B == 1 ? 2 : 1) planes_kernel(AS_PARAMETER Planes p) {
  AS_SHARED;
  const int block = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (block >= p.blocks) {
    wait_for_previous();
    return linger();
  }
  const PlaneRoom room = plane_room(p, shared);
  const int from = block * p.even + (block < p.longer ? block : p.longer), end = from + p.even + (block < p.longer);
  const int tile = from / p.quads;
  const PlaneShare share{from, end, tile, (end - 1) / p.quads - tile + 1};
  const PlaneWarp own{4 * share_of(end - from, warp, PLANE_WARPS), 4 * share_of(end - from, warp + 1, PLANE_WARPS)};
#pragma unroll 1
  for (int s = 0; s < share.segments; ++s) {
    const int number = tile + s, quad = s ? number * p.quads : from, next = (number + 1) * p.quads;
    const PlaneJob& job = p.job[job_of(p, number)];
    const int first = block_of(p, number * p.quads), outputs = job.out - (number - job.begin) * PLANE_TILE;
    const int count = (next < end ? next : end) - quad;
    if (threadIdx.x == 0) {
      room.base[s] = job.codes + 4 * ((i64)from - (i64)job.begin * p.quads) * p.planes * RUN;
      room.others[s] = block_of(p, next - 1) - first;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += PLANE_THREADS)
      copy_constants(p, job, room, 4 * (quad - number * p.quads + i), number, 4 * (quad - from + i));
    for (int i = threadIdx.x; i < PLANE_TILE; i += PLANE_THREADS)
      room.start[s * PLANE_TILE + i] =
          job.start && first == block && i < outputs ? job.start[(number - job.begin) * PLANE_TILE + i] : 0.0f;
  }
  close_copies();
  for (int i = threadIdx.x; i < share.segments * B * PLANE_TILE; i += PLANE_THREADS) room.result[i] = 0;
  wait_for_copies<0>();
  __syncthreads();
  wait_for_previous();
  float rms = 1.0f;
  if (B == 1 && !p.input.x) {
    const bool normed = p.input.norm != nullptr;
    Squares squares;
    if (normed) squares = load_squares(p.input.squares);
    copy_inputs(p, share, room, own);
    if (normed) rms = rms_of(squares, p.input.size, p.input.eps);
    wait_for_copies<0>();
    __syncwarp();
  }
  list_entries(p, share, room, own, rms);

  // The first codes are asked for before the others have chosen.
  const int* const bound = room.bound + warp * (p.segments + 1);
  PlaneWords words[STAGES];
  int ahead = 0;
  while (ahead < share.segments && bound[ahead + 1] == bound[ahead]) ++ahead;
  if (ahead < share.segments)
    load_ahead(room.base[ahead] + (lane >> 2) * 16 + (HALVES == 2 ? 0 : warp & 1) * 8, room.run, bound[ahead] + (lane & 3),
               bound[ahead + 1], words);
  for (int i = 2 * (block * PLANE_THREADS + (int)threadIdx.x); i < p.cleared; i += 2 * p.blocks * PLANE_THREADS)
    *reinterpret_cast<SumPair*>(p.clear + i) = SumPair{0, 0};
  __syncthreads();
  round_factors(share, p, room);
  if (LISTS == 1)
    __syncwarp();
  else
    __syncthreads();
  multiply_share(p, share, room, ahead, words);
  __syncthreads();

  bool waits = false, broken = false;  // for others' parts; squares that are too large
  SumPair squares{0, 0};
#pragma unroll 1
  for (int s = 0; s < share.segments; ++s) {
    const PlaneJob& to = p.job[job_of(p, tile + s)];
    const int first = (tile + s - to.begin) * PLANE_TILE;
    const bool received = to.y || to.rounded, direct = received && !to.kept && room.others[s] == 0;
    waits |= received && !direct;
#pragma unroll 1
    for (int b = 0; b < p.rows; ++b) {
      constexpr int EACH = PLANE_TILE / PLANE_THREADS;
      i64 before[EACH], steps[EACH];  // all additions under way together
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int at = i * PLANE_THREADS + (int)threadIdx.x;
        const i64 place = (i64)b * to.out + first + at;
        const float y = room.unit[b] * (float)room.result[(s * B + b) * PLANE_TILE + place_of_result(at)] +
                        room.start[s * PLANE_TILE + at];
        const bool inside = first + at < to.out;
        before[i] = steps[i] = 0;
        if (!p.squares) {
          if (inside && direct) store_plane(to, place, y);
          if (inside && !direct) add_part(to.sum + place, y);
        } else if (inside && absolute(y) < MOST_PART) {
          steps[i] = to_steps(y * SUM_STEPS);
          before[i] = add_and_get(to.sum + place, steps[i]);
        } else if (inside) {
          put_steps(to.sum + place, BROKEN_SUM);
          broken = true;
        }
      }
      if (!p.squares) continue;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const i64 after = before[i] + steps[i];
        broken |= !has_square(before[i]) || !has_square(after);
        grow(squares, square_of(after), square_of(before[i]));
      }
    }
  }
  if (p.squares) {
    squares = warp_total(squares);
    i64* const place = p.squares + 2 * ((block * PLANE_WARPS + warp) % SQUARE_PLACES);
    if (lane < 2) add_steps(place + lane, lane ? squares.high : squares.low);
    if (broken) put_steps(p.squares + 2 * SQUARE_PLACES, 1);
  }
  if (!waits) return;
  __syncthreads();
  if ((int)threadIdx.x < share.segments) {
    const PlaneJob& to = p.job[job_of(p, tile + threadIdx.x)];
    const int others = room.others[threadIdx.x];
    int last = 0;
    if ((to.y || to.rounded) && (to.kept || others)) {
      last = (int)arrive(p.arrived + tile + threadIdx.x) == others;
      if (last) p.arrived[tile + threadIdx.x] = 0u;
    }
    room.last[threadIdx.x] = last;
  }
  __syncthreads();
#pragma unroll 1
  for (int s = 0; s < share.segments; ++s) {
    if (!room.last[s]) continue;
    const PlaneJob& to = p.job[job_of(p, tile + s)];
    const int first = (tile + s - to.begin) * PLANE_TILE;
#pragma unroll 2
    for (int i = threadIdx.x; i < p.rows * PLANE_TILE; i += PLANE_THREADS) {
      const int at = first + i % PLANE_TILE;
      const i64 place = (i64)(i / PLANE_TILE) * to.out + at;
      if (at >= to.out) continue;
      store_plane(to, place, from_sum(load_sum(to.sum + place)));
      if (!to.kept) to.sum[place] = 0;
    }
  }
}
