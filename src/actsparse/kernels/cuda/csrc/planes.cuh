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

// Results of all of the block's entries, in the block's shared memory: warps take eights of them in turn.  Codes are loaded
// into registers, well ahead: asynchronous copies into shared memory reach two thirds of the bandwidth here.
AS_DEVICE void multiply_share(const Planes& p, const PlaneShare& share, const PlaneRoom& room) {
  constexpr int TEAMS = PLANE_WARPS * HALVES / 2, STRIDE = 8 * TEAMS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half = HALVES == 2 ? 0 : warp & 1;
  const unsigned char* const mantissas = room.mantissa + (lane >> 3) * 2 + half;
  const PlaneLane constants = plane_lane(lane);
  int at = 8 * (HALVES == 2 ? warp : warp >> 1) + (lane & 3);  // this lane's entries are this one and the fourth from it
#pragma unroll 1
  for (int segment = 0; segment < share.segments; ++segment) {
    const int end = room.bound[segment + 1];
    if (at >= end) continue;
    const unsigned char* const codes = room.base[segment] + (lane >> 2) * 16 + half * 8;
    PlaneSums sums;
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        sums.factor[b][h] = 0;
#pragma unroll
        for (int e = 0; e < 16; ++e) sums.of[b][h][e / 4][e % 4] = 0;
      }
    PlaneWords words[STAGES];
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
      if (at + s * STRIDE < end) words[s].load(codes, room.run + at + s * STRIDE);
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
        if (at + STAGES * STRIDE < end) words[s].load(codes, room.run + at + STAGES * STRIDE);
        at += STRIDE;
      }
    }
    add_sums(sums, half, room.result + segment * B * PLANE_TILE);
  }
}

// What an output is added to.
AS_DEVICE float base_of(const PlaneJob& job, int b, int output) {
  const bool inside = output < job.out;
  const float start = inside && job.start ? job.start[output] : 0.0f;
  const float residual = inside && job.residual ? job.residual[(i64)b * job.out + output] : 0.0f;
  return start + residual;
}

AS_DEVICE void store_plane(const PlaneJob& job, int b, int output, float y) {
  if (output >= job.out) return;
  if (job.y)
    job.y[(i64)b * job.out + output] = y;
  else
    job.rounded[(i64)b * job.out + output] = narrow(y);
}

AS_KERNEL(PLANE_THREADS, B == 1 ? 2 : 1) planes_kernel(AS_PARAMETER Planes p) {
  AS_SHARED;
  const int block = blockIdx.x;
  if (block >= p.blocks) {
    wait_for_previous();
    return linger();
  }
  const PlaneRoom room = plane_room(p, shared);
  const int from = block * p.even + (block < p.longer ? block : p.longer), end = from + p.even + (block < p.longer);
  const int tile = from / p.quads, size = p.input.size;
  const PlaneShare share{from, end, tile, (end - 1) / p.quads - tile + 1};
  PlaneQuad quad[ROUNDS];
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const int local = r * PLANE_THREADS + (int)threadIdx.x, at = from + local;
    quad[r].inside = at < end;
    quad[r].tile = quad[r].inside ? at / p.quads : tile;
    quad[r].column = 4 * (at - quad[r].tile * p.quads);
    if (!quad[r].inside) continue;
    const PlaneJob& job = plane_job_of(p, quad[r].tile);
    const i64 record = (i64)(quad[r].tile - job.begin) * size + quad[r].column;
    const uint4* const mantissa = reinterpret_cast<const uint4*>(job.mantissa + record * 8);
    const uint4 first = mantissa[0], second = mantissa[1];
    quad[r].constants = constants_of(p, job, quad[r].column);
    reinterpret_cast<uint4*>(room.mantissa)[2 * local] = first;
    reinterpret_cast<uint4*>(room.mantissa)[2 * local + 1] = second;
  }
  if ((int)threadIdx.x < share.segments) {
    const int number = tile + (int)threadIdx.x, first = block_of(p, number * p.quads);
    const PlaneJob& here = plane_job_of(p, number);
    room.base[threadIdx.x] = here.codes + ((i64)from - (i64)here.begin * p.quads) * 4 * p.planes * RUN;
    room.first[threadIdx.x] = first;
    room.others[threadIdx.x] = block_of(p, (number + 1) * p.quads - 1) - first;
  }
  for (int i = threadIdx.x; i < share.segments * B * PLANE_TILE; i += PLANE_THREADS) room.result[i] = 0;
  wait_for_previous();
  const float rms = p.input.norm ? rms_of(p.input, reinterpret_cast<float*>(room.most)) : 1.0f;
  list_entries(p, share, room, quad, rms);
  __syncthreads();
  multiply_share(p, share, room);
  __syncthreads();

  const int stride = p.rows * PLANE_TILE;  // of parts
  bool alone = true;
#pragma unroll 1
  for (int s = 0; s < share.segments; ++s) {
    const int here = tile + s, others = room.others[s];
    const PlaneJob& to = plane_job_of(p, here);
    alone &= others == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < stride; i += PLANE_THREADS) {
      const int b = i / PLANE_TILE, at = i % PLANE_TILE, output = (here - to.begin) * PLANE_TILE + at;
      const float y = room.unit[b] * (float)room.result[(s * B + b) * PLANE_TILE + place_of_result(at)];
      if (others)
        p.parts[(i64)(block + here) * stride + i] = y;
      else
        store_plane(to, b, output, base_of(to, b, output) + y);
    }
  }
  if (alone) return;
  __syncthreads();
  if ((int)threadIdx.x < share.segments) {
    const int others = room.others[threadIdx.x];
    int last = 0;
    if (others) {
      last = (int)arrive(p.arrived + tile + threadIdx.x) == others;
      if (last) p.arrived[tile + threadIdx.x] = 0u;
    }
    room.last[threadIdx.x] = last;
  }
  __syncthreads();
  // One thread adds every second part of four outputs, all of them under way together.
  constexpr int QUADS = PLANE_TILE / 4, WAYS = PLANE_THREADS / QUADS, TOGETHER = 10;
  float4* const sums = room.found;
  const int place = threadIdx.x % QUADS, way = threadIdx.x / QUADS;
#pragma unroll 1
  for (int s = 0; s < share.segments; ++s) {
    if (!room.last[s]) continue;
    const int here = tile + s, first = room.first[s], count = room.others[s] + 1;
    const PlaneJob& to = plane_job_of(p, here);
#pragma unroll 1
    for (int b = 0; b < p.rows; ++b) {
      const float* const parts = p.parts + (i64)(first + here) * stride + b * PLANE_TILE + 4 * place;
      const int output = (here - to.begin) * PLANE_TILE + threadIdx.x;
      float base[PLANE_TILE / PLANE_THREADS];  // start and residual of what this thread will store
#pragma unroll
      for (int i = 0; i < PLANE_TILE / PLANE_THREADS; ++i) base[i] = base_of(to, b, output + i * PLANE_THREADS);
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
      for (int k = way; k < count; k += WAYS * TOGETHER) {
        float4 part[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
          part[i] = k + i * WAYS < count ? load_fresh(parts + (i64)(k + i * WAYS) * stride) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) v.x += part[i].x, v.y += part[i].y, v.z += part[i].z, v.w += part[i].w;
      }
      __syncthreads();
      sums[threadIdx.x] = v;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < PLANE_TILE / PLANE_THREADS; ++i) {
        const int at = threadIdx.x + i * PLANE_THREADS;
        float y = base[i];
#pragma unroll
        for (int w = 0; w < WAYS; ++w) y += reinterpret_cast<const float*>(sums + w * QUADS)[at];
        store_plane(to, b, output + i * PLANE_THREADS, y);
      }
    }
  }
}
