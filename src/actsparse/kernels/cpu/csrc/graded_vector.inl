// A block's products, over 128-bit lanes that each hold one group. `Lanes` gives:
//   count (128-bit lanes of a register), fields_at_once (of the four positions k that are accumulated together), I, zero(),
//   load(p), load_part(p, lanes), zip_low8/zip_high8/zip_low16/zip_high16(a, b), mask(byte), both(a, b), right2(v) in each byte's
//   word, coefficients(...) as coefficients_of does for four columns of which none is halved, dot(sum, codes, coefficients), spread(const int32_t*, lanes), left2(v), left(v, n), right<n>(v), sub, add, load_sums, store_sums;
//   whole_bytes: dot takes codes up to 255, not 63 only.
//
// Bytes of four columns are interleaved, so that one dot product adds up all four. A byte holds one plane's bits of the outputs
// 16 f + j, f = 0..3; instead of shifting the fields apart, nested masks give sums of which the fields' are the differences.

using I = Lanes::I;

// Requests are spread evenly, one for a line multiplied, this many tiles ahead in the same columns and then in the next block.
// Far fewer lines do not cover the memory's latency, bursts are dropped by the core.
inline int64_t tiles_ahead(const Block& b) { return b.kept[0] + b.kept[1] + b.kept[2] + b.kept[3] < 96 ? 3 : 2; }

inline void request(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// Lines to request while a plane of a tile is multiplied: one of each of `count` columns.
struct Ahead {
  const uint8_t* const* column;
  int64_t offset;
  int32_t count;
  const uint8_t* last[4];  // the columns after the last whole four, filled up with the last one
  const uint8_t* const* four(int q) const { return q + 4 <= count ? column + q : last; }
};

Ahead ahead_of(const uint8_t* const* column, int64_t offset, int32_t count) {
  Ahead a = {column, offset, count, {}};
  for (int e = 0; e < 4; ++e) {
    const int32_t k = count / 4 * 4 + e;
    a.last[e] = column[k < count ? k : count ? count - 1 : 0];
  }
  return a;
}

alignas(64) const uint8_t nothing[64] = {};

// Up to four columns whose coefficients' upper halves are added in the same registers. More could overflow them.
struct Upper {
  const uint8_t* column[4];
  int32_t kept[max_planes];
  const int32_t* coefficients;
};

// Adds one plane's lines of four columns to the sums, requesting a line of each of `wanted` in between.
template <bool Whole>
inline __attribute__((always_inline)) void add_four(const uint8_t* const* four, const int32_t* coefficients, int here, int from,
                                                    I (*sum)[Lanes::fields_at_once], const uint8_t* const* wanted,
                                                    int64_t offset) {
  constexpr int K = Lanes::fields_at_once;
  const I low6 = Lanes::mask(0x3f), low4 = Lanes::mask(0x0f), low2 = Lanes::mask(0x03);
  I v[4], word[4];
  for (int e = 0; e < 4; ++e) v[e] = Whole ? Lanes::load(four[e]) : Lanes::load_part(four[e], here);
  const I c = Lanes::spread(coefficients, here);
  if (K == 4 || from == 0) {
    const I ab = Lanes::zip_low8(v[0], v[1]), cd = Lanes::zip_low8(v[2], v[3]);
    word[0] = Lanes::zip_low16(ab, cd);
    word[1] = Lanes::zip_high16(ab, cd);
  }
  if (K == 4 || from == 2) {
    const I ab = Lanes::zip_high8(v[0], v[1]), cd = Lanes::zip_high8(v[2], v[3]);
    word[2] = Lanes::zip_low16(ab, cd);
    word[3] = Lanes::zip_high16(ab, cd);
  }
  for (int k = 0; k < K; ++k) {
    if (wanted)
      for (int e = k * 4 / K; e < (k + 1) * 4 / K; ++e) request(wanted[e] + offset);
    const I w = word[from + k];
    sum[3][k] = Lanes::dot(sum[3][k], Lanes::whole_bytes ? w : Lanes::both(Lanes::right2(w), low6), c);
    sum[2][k] = Lanes::dot(sum[2][k], Lanes::both(w, low6), c);
    sum[1][k] = Lanes::dot(sum[1][k], Lanes::both(w, low4), c);
    sum[0][k] = Lanes::dot(sum[0][k], Lanes::both(w, low2), c);
  }
}

template <bool Whole, bool Requests, bool High>
inline __attribute__((always_inline)) void add_tile(const Block& b, int64_t t, const uint8_t* const* column,
                                                    const int32_t* kept, const int32_t* coefficients, int64_t stride,
                                                    const Ahead* ahead, const Upper* upper, int32_t* sums) {
  constexpr int L = Lanes::count, K = Lanes::fields_at_once;
  const int64_t left = b.groups - t * tile_groups;
  const int planes = b.w->planes;
  const int64_t plane_stride = b.w->plane_stride;
  for (int part = 0; part < int(tile_groups) / L; ++part) {
    const int here = Whole ? L : left - part * L < L ? int(left - part * L) : L;
    if (!Whole && here <= 0) return;
    for (int from = 0; from < 4; from += K) {
      const bool first = Requests && part == 0 && from == 0;
      I sum[4][K];
      for (int f = 0; f < 4; ++f)
        for (int k = 0; k < K; ++k) sum[f][k] = Lanes::zero();
      const auto shift = [&](int bits) __attribute__((always_inline)) {
        for (int f = 0; f < 4; ++f)
          for (int k = 0; k < K; ++k) sum[f][k] = bits == 2 ? Lanes::left2(sum[f][k]) : Lanes::left(sum[f][k], bits);
      };
      if (upper) {
        const int32_t* const c4 = upper->coefficients + t * tile_groups + part * L;
        for (int p = 0; p < planes; ++p) {
          if (p) shift(2);
          const int64_t at = p * plane_stride + t * plane_line + part * L * 16;
          const uint8_t* four[4];
          for (int e = 0; e < 4; ++e) four[e] = e < upper->kept[p] ? upper->column[e] + at : nothing;
          if (upper->kept[p]) add_four<Whole>(four, c4, here, from, sum, nullptr, 0);
        }
        shift(9 - 2 * planes);  // 7 bits, of which the planes below shift the rest
      }
      for (int p = 0; p < planes; ++p) {
        if (p) shift(2);
        const int64_t at = p * plane_stride + t * plane_line + part * L * 16;
        const int32_t* const c4 = coefficients + t * tile_groups + part * L;
        const int count = kept[p], whole = count / 4 * 4;
        int q = 0;
        for (; q < whole; q += 4) {
          const uint8_t* const four[4] = {column[q] + at, column[q + 1] + at, column[q + 2] + at, column[q + 3] + at};
          add_four<Whole>(four, c4 + q / 4 * stride, here, from, sum, first ? ahead[p].four(q) : nullptr, ahead[p].offset);
        }
        if (q < count) {
          // Columns beyond the prefix have coefficients, but this plane of them is not read.
          const uint8_t* tail[4];
          for (int e = 0; e < 4; ++e) tail[e] = q + e < count ? column[q + e] + at : nothing;
          add_four<Whole>(tail, c4 + q / 4 * stride, here, from, sum, first ? ahead[p].four(q) : nullptr, ahead[p].offset);
          q += 4;
        }
        if (first)
          for (; q < ahead[p].count; ++q) request(ahead[p].column[q] + ahead[p].offset);
      }
      for (int k = 0; k < K; ++k) {
        const I s0 = sum[0][k], s1 = sum[1][k], s2 = sum[2][k], s3 = sum[3][k];
        I field[4] = {s0, Lanes::template right<2>(Lanes::sub(s1, s0)), Lanes::template right<4>(Lanes::sub(s2, s1)),
                      Lanes::whole_bytes
                          ? Lanes::template right<6>(Lanes::sub(s3, s2))
                          : Lanes::template right<4>(Lanes::sub(s3, Lanes::template right<2>(Lanes::sub(s2, s0))))};
        for (int f = 0; f < 4; ++f) {
          int32_t* const to = sums + t * tile_outputs + (4 * f + from + k) * 16 + part * L * 4;
          if (High) field[f] = Lanes::left(field[f], 7);
          Lanes::store_sums(to, Lanes::add(Lanes::load_sums(to), field[f]));
        }
      }
    }
  }
}

template <bool Requests, bool High>
inline void add_tiles(const Block& b, const uint8_t* const* column, const int32_t* kept, const int32_t* coefficients,
                      int64_t stride, const Block* next, const Upper* upper, int32_t* sums) {
  const int64_t full = b.groups / tile_groups, wanted = tiles_ahead(b), far = wanted < b.tiles ? wanted : b.tiles;
  Ahead ahead[max_planes];
  for (int64_t t = 0; t < b.tiles; ++t) {
    if (Requests) {
      const bool same = t + far < b.tiles, other = !same && next && t + far - b.tiles < next->tiles;
      for (int p = 0; p < b.w->planes; ++p)
        ahead[p] = same    ? ahead_of(column, p * b.w->plane_stride + (t + far) * plane_line, kept[p])
                   : other ? ahead_of(next->plane, p * next->w->plane_stride + (t + far - b.tiles) * plane_line, next->kept[p])
                           : ahead_of(column, 0, 0);
      if (next)
        for (int64_t k = next->kept[0] * t / b.tiles; k < next->kept[0] * (t + 1) / b.tiles; ++k)
          for (int64_t g = 0; g < next->groups; g += 64) request(next->mantissa[k] + g);
    }
    if (t < full)
      add_tile<true, Requests, High>(b, t, column, kept, coefficients, stride, ahead, upper, sums);
    else
      add_tile<false, Requests, High>(b, t, column, kept, coefficients, stride, ahead, upper, sums);
  }
}

void add(const Block& b, const Block* next, int32_t* room, int32_t* sums, int32_t* centres) {
  const int64_t stride = (b.groups + 15) / 16 * 16;
  int high[block_columns], high_count = 0;
  for (int q = 0; q < b.kept[0]; q += 4) {
    int32_t* const out = room + q / 4 * stride;
    unsigned halves = 0;
    for (int e = 0; e < 4; ++e) halves |= unsigned(is_high(b.multiplier[q + e])) << e;
    if (!halves) {
      Lanes::coefficients(b.mantissa + q, b.multiplier + q, b.centre + q, b.groups, out, centres);
      continue;
    }
    for (int e = 0; e < 4; ++e)
      if (halves >> e & 1) high[high_count++] = q + e;
    coefficients_of(b.mantissa + q, b.multiplier + q, halves, false, b.centre + q, b.groups, out, centres);
  }
  if (!high_count) return add_tiles<true, false>(b, b.plane, b.kept, room, stride, next, nullptr, sums);
  const uint8_t *column[block_columns + 4], *mantissa[block_columns + 4];
  int32_t multiplier[block_columns + 4], kept[max_planes] = {};
  for (int h = 0; h < high_count + 4; ++h) {
    const int from = h < high_count ? high[h] : high[0];
    column[h] = b.plane[from];
    mantissa[h] = b.mantissa[from];
    multiplier[h] = h < high_count ? b.multiplier[from] : 0;
    for (int p = 0; p < b.w->planes; ++p) kept[p] += h < high_count && from < b.kept[p];
  }
  int32_t* const above = room + coefficient_room;
  for (int h = 0; h < high_count; h += 4)
    coefficients_of(mantissa + h, multiplier + h, 0, true, b.centre, b.groups, above + h / 4 * stride, nullptr);
  if (high_count <= 4) {
    Upper upper = {{column[0], column[1], column[2], column[3]}, {}, above};
    for (int p = 0; p < max_planes; ++p) upper.kept[p] = kept[p];
    return add_tiles<true, false>(b, b.plane, b.kept, room, stride, next, &upper, sums);
  }
  add_tiles<true, false>(b, b.plane, b.kept, room, stride, next, nullptr, sums);
  add_tiles<false, true>(b, column, kept, above, stride, nullptr, nullptr, sums);
}
