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
AS_DEVICE void multiply_entries(const u32 (&word)[2][HALVES][2], const u32 (&mantissa)[2][HALVES], const int2 (&factor)[B],
                                PlaneLane lane, PlaneSums& sums) {
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    u32 first[B], second[B];
#pragma unroll
    for (int b = 0; b < B; ++b) {
      first[b] = coefficient(lane, factor[b].x, mantissa[0][h]);
      second[b] = coefficient(lane, factor[b].y, mantissa[1][h]);
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

// Adds a warp's sums to the block's: twice the code less three, times the coefficient, in integers.
AS_DEVICE void add_sums(const PlaneSums& sums, int half, int* result) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int b = 0; b < B; ++b)
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      int all = sums.factor[b][h];
      all += __shfl_xor_sync(0xffffffffu, all, 1);
      all += __shfl_xor_sync(0xffffffffu, all, 2);
      const int low = __shfl_sync(0xffffffffu, all, 8 * t), high = __shfl_sync(0xffffffffu, all, 8 * t + 4);
      const int coefficients = 3 * (256 * high + low);
      int* const to = result + b * PLANE_TILE + (half + h) * (PLANE_TILE / 2) + t * 64 + 2 * g;
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // codes stand 2 k bits high: the sums are multiples of 4^k
          const int sum = 256 * (sums.of[b][h][k][2 * e + 1] >> 2 * k) + (sums.of[b][h][k][2 * e] >> 2 * k);
          atomicAdd(to + 16 * k + e, 2 * sum - coefficients);
        }
    }
}

// Results of all of the block's entries, in the block's shared memory.  A warp takes every sixteenth (or so) eight of them.
AS_DEVICE void multiply_share(const Planes& p, const PlaneShare& share, const PlaneRoom& room) {
  constexpr int TEAMS = PLANE_WARPS * HALVES / 2, PIECE = HALVES * 8, LAST = (STAGES - 1) * STAGE_BYTES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half = HALVES == 2 ? 0 : warp & 1;
  unsigned char* const ring = room.ring + warp * STAGES * STAGE_BYTES + lane * PIECE;
  const PlaneLane constants = plane_lane(lane);
  // Entries at, at + 1 of the list are this lane's: the eight's t and t + 4.
  int at = 8 * (HALVES == 2 ? warp : warp >> 1) + 2 * (lane & 3);
  int filled = 0, next = room.bound[1], to = 0;  // where copies are: the segment, its end, the place in the ring
  const int offset = (lane >> 2) * 16 + half * 8, all = room.bound[share.segments];
  const unsigned char* codes = room.base[0] + offset;
  auto fill = [&](int entry) {
    if (entry < all) {
      while (entry >= next) codes = room.base[++filled] + offset, next = room.bound[filled + 1];
      const u32 two = *reinterpret_cast<const u32*>(room.run + entry);
      if (HALVES == 2) {
        copy_async(ring + to, codes + (two & 0xffffu) * RUN);
        copy_async(ring + to + STAGE_BYTES / 2, codes + (two >> 16) * RUN);
      } else {
        copy_async8(ring + to, codes + (two & 0xffffu) * RUN);
        copy_async8(ring + to + STAGE_BYTES / 2, codes + (two >> 16) * RUN);
      }
    }
    to = to == LAST ? 0 : to + STAGE_BYTES;
    close_copies();
  };
  for (int stage = 0; stage < STAGES - 1; ++stage) fill(at + stage * 8 * TEAMS);
  int from = 0;
#pragma unroll 1
  for (int segment = 0; segment < share.segments; ++segment) {
    const int end = room.bound[segment + 1];
    if (at >= end) continue;
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
    for (; at < end; at += 8 * TEAMS) {
      fill(at + (STAGES - 1) * 8 * TEAMS);
      wait_for_copies<STAGES - 1>();
      const u32 two = *reinterpret_cast<const u32*>(room.run + at), run[2] = {two & 0xffffu, two >> 16};
      u32 word[2][HALVES][2], mantissa[2][HALVES];
      int2 factor[B];
#pragma unroll
      for (int b = 0; b < B; ++b) factor[b] = *reinterpret_cast<const int2*>(room.factor + b * room.entries + at);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const unsigned char* const held = ring + from + q * (STAGE_BYTES / 2);
        const unsigned char* const of = room.mantissa + high_product(run[q], p.inverse) * 8 + (lane >> 3) * 2;
        if (HALVES == 2) {
          const uint4 four = *reinterpret_cast<const uint4*>(held);
          word[q][0][0] = four.x, word[q][0][1] = four.y, word[q][HALVES - 1][0] = four.z, word[q][HALVES - 1][1] = four.w;
          const u32 pair = *reinterpret_cast<const u16*>(of);
          mantissa[q][0] = pair & 255u, mantissa[q][HALVES - 1] = pair >> 8;
        } else {
          const uint2 words = *reinterpret_cast<const uint2*>(held);
          word[q][0][0] = words.x, word[q][0][1] = words.y;
          mantissa[q][0] = of[half];
        }
      }
      from = from == LAST ? 0 : from + STAGE_BYTES;
      multiply_entries(word, mantissa, factor, constants, sums);
    }
    add_sums(sums, half, room.result + segment * B * PLANE_TILE);
  }
  wait_for_copies<0>();
}

AS_DEVICE void store_plane(const Planes& p, const PlaneJob& job, int b, int output, float y) {
  const i64 at = (i64)b * job.out + output;
  if (job.start) y += job.start[output];
  if (job.residual) y += job.residual[at];
  if (job.y)
    job.y[at] = y;
  else
    job.rounded[at] = narrow(y);
}

AS_KERNEL(PLANE_THREADS, B == 1 ? 2 : 1) planes_kernel(AS_PARAMETER Planes p) {
  AS_SHARED;
  const int block = blockIdx.x;
  if (block >= p.blocks) {
    wait_for_previous();
    return linger();
  }
  const PlaneRoom room = plane_room(p, shared);
  const int from = share_of(p.total, block, p.blocks), end = share_of(p.total, block + 1, p.blocks);
  const int tile = from / p.quads, size = p.input.size;
  const PlaneShare share{from, end, tile, (end - 1) / p.quads - tile + 1};
  const int at = from + (int)threadIdx.x, mine = at / p.quads, column = 4 * (at - mine * p.quads);
  const bool inside = at < end;
  const PlaneJob& job = plane_job_of(p, inside ? mine : tile);
  Constants constants;
  // While kernels before this one run, the memory is idle: most columns' first plane will be needed.
  if (inside) {
    const i64 record = (i64)(mine - job.begin) * size + column;
#pragma unroll
    for (int e = 0; e < 4; ++e) prefetch(job.codes + (record + e) * p.planes * RUN, RUN);
    copy_async(room.mantissa + threadIdx.x * 32, job.mantissa + record * 8);
    copy_async(room.mantissa + threadIdx.x * 32 + 16, job.mantissa + record * 8 + 16);
    constants = constants_of(p, job, column);
  }
  close_copies();
  if ((int)threadIdx.x < share.segments) {
    const PlaneJob& here = plane_job_of(p, tile + threadIdx.x);
    room.base[threadIdx.x] = here.codes + ((i64)from - (i64)here.begin * p.quads) * 4 * p.planes * RUN;
  }
  for (int i = threadIdx.x; i < share.segments * B * PLANE_TILE; i += PLANE_THREADS) room.result[i] = 0;
  wait_for_previous();
  const float rms = p.input.norm ? rms_of(p.input, reinterpret_cast<float*>(room.most)) : 1.0f;
  list_entries(p, job, share, room, constants, column, mine - tile, inside, rms);
  wait_for_copies<0>();
  __syncthreads();
  multiply_share(p, share, room);
  __syncthreads();

  auto first_block = [&](int t) { return (int)(((u32)(t * p.quads + 1) * (u32)p.blocks - 1u) / (u32)p.total); };
  auto last_block = [&](int t) { return (int)(((u32)((t + 1) * p.quads) * (u32)p.blocks - 1u) / (u32)p.total); };
  bool shared_tile = false;
  for (int s = 0; s < share.segments; ++s) {
    const int here = tile + s;
    const PlaneJob& to = plane_job_of(p, here);
    const bool whole = first_block(here) == last_block(here);
    shared_tile |= !whole;
    for (int i = threadIdx.x; i < p.rows * PLANE_TILE; i += PLANE_THREADS) {
      const int b = i / PLANE_TILE, output = (here - to.begin) * PLANE_TILE + i % PLANE_TILE;
      const float y = room.unit[b] * (float)room.result[s * B * PLANE_TILE + i];
      if (!whole)
        p.parts[(i64)(block + here) * p.rows * PLANE_TILE + i] = y;
      else if (output < to.out)
        store_plane(p, to, b, output, y);
    }
  }
  if (!shared_tile) return;
  __threadfence();
  __syncthreads();
  if ((int)threadIdx.x < share.segments) {
    const int here = tile + threadIdx.x, others = last_block(here) - first_block(here);
    int last = 0;
    if (others && (int)atomicAdd(p.arrived + here, 1u) == others) {
      last = 1;
      p.arrived[here] = 0u;
    }
    room.last[threadIdx.x] = last;
  }
  __syncthreads();
  for (int s = 0; s < share.segments; ++s) {
    if (!room.last[s]) continue;
    __threadfence();
    const int here = tile + s, first = first_block(here), count = last_block(here) - first + 1;
    const PlaneJob& to = plane_job_of(p, here);
    for (int i = threadIdx.x; i < p.rows * PLANE_TILE; i += PLANE_THREADS) {
      const int b = i / PLANE_TILE, output = (here - to.begin) * PLANE_TILE + i % PLANE_TILE;
      const float* const parts = p.parts + (i64)(first + here) * p.rows * PLANE_TILE + i;
      float y = 0.0f;
#pragma unroll 8
      for (int k = 0; k < count; ++k) y += load_fresh(parts + (i64)k * p.rows * PLANE_TILE);
      if (output < to.out) store_plane(p, to, b, output, y);
    }
  }
}
