// Packed weights to 16 bits, for products of many rows.
struct Unpack {             // W [I, O] read to so many planes, in 16 bits
  const unsigned char* codes;
  const unsigned char* mantissa;
  const u16* scale;
  u16* w;                   // [columns, O]
  i64 columns;
  int out, planes, read, inputs, begin;
  float gain;
};

// A block has 16 columns of a tile, blockIdx.y; a thread one column, half and g.
AS_KERNEL(256, 4) unpack_kernel(AS_PARAMETER Unpack p) {
  AS_SHARED;
  wait_beside();  // a product may still read the room that this fills
  constexpr int ROOM = PLANE_TILE + 8;
  const int g = threadIdx.x & 7, half = threadIdx.x >> 3 & 1, own = threadIdx.x >> 4, tile = blockIdx.y;
  const int first = tile * PLANE_TILE, outputs = p.out - first < PLANE_TILE ? p.out - first : PLANE_TILE;
  const i64 begin = (i64)blockIdx.x * 16;
  u16* const values = reinterpret_cast<u16*>(shared);  // [16, ROOM]
  if (begin + own < p.columns) {
    const i64 from = (i64)tile * p.inputs + p.begin + begin + own;
    const unsigned char* const codes = p.codes + from * p.planes * RUN + g * 16 + half * 8;
    uint2 word[MOST_PLANES];
#pragma unroll
    for (int q = 0; q < MOST_PLANES; ++q)
      if (q < p.read) word[q] = load_codes(codes + q * RUN);
    const uint2 mantissas = load_mantissas(p.mantissa + from * 8);
    const float base = as_float((u32)p.scale[p.begin + begin + own] << 16) * p.gain / 255.0f;
    const float step = 1.0f / (float)(1 << (2 * p.read - 1)), low = 0.5f * step - 1.0f;
    u32* const to = reinterpret_cast<u32*>(values + own * ROOM + half * (PLANE_TILE / 2)) + g;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      u32 code[2] = {0, 0};  // of two neighbours' words, a byte for each group
#pragma unroll
      for (int q = 0; q < MOST_PLANES; ++q)
        if (q < p.read) {
          code[0] = code[0] << 2 | (word[q].x >> 2 * k & 0x03030303u);
          code[1] = code[1] << 2 | (word[q].y >> 2 * k & 0x03030303u);
        }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float size = base * (float)((j < 2 ? mantissas.x : mantissas.y) >> 8 * ((j & 1) * 2 + half) & 255u);
        to[(j * 64 + 16 * k) / 2] = (u32)narrow(size * ((float)(code[0] >> 8 * j & 255u) * step + low)) |
                                    (u32)narrow(size * ((float)(code[1] >> 8 * j & 255u) * step + low)) << 16;
      }
    }
  }
  __syncthreads();
  const int columns = p.columns - begin < 16 ? (int)(p.columns - begin) : 16;
  u16* const w = p.w + begin * p.out + first;
  if (p.out % 8 == 0) {
    const int pieces = outputs / 8;
    for (int at = threadIdx.x; at < columns * pieces; at += blockDim.x) {
      const int column = at / pieces, piece = at - column * pieces;
      *reinterpret_cast<uint4*>(w + (i64)column * p.out + 8 * piece) =
          *reinterpret_cast<const uint4*>(values + column * ROOM + 8 * piece);
    }
  } else {
    for (int at = threadIdx.x; at < columns * outputs; at += blockDim.x) {
      const int column = at / outputs, output = at - column * outputs;
      w[(i64)column * p.out + output] = values[column * ROOM + output];
    }
  }
}
