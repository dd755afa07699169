// A block's products, over 128-bit lanes that each hold one group. `Lanes` gives:
//   count (128-bit lanes of a register), fields_at_once (of the four words k that are accumulated together), I, zero(),
//   load(p), load_part(p, lanes), zip_low8/zip_high8/zip_low16/zip_high16(a, b), mask(byte), both(a, b), select(m, a, b): a where m
//   has a bit, else b; right2, right4(v) in each byte's word, coefficients(...) as coefficients_of does for four columns of which
//   none is halved, dot(sum, codes, coefficients), spread(const int32_t*, lanes), left2(v), left(v, n), sub, add, load_sums,
//   store_sums; whole_bytes: dot takes codes up to 255, not 15 only.
//
// Bytes of four columns are interleaved, so that one dot product adds up all four. A byte of a plane holds two bits of the outputs
// 16 f + j, f = 0..3. The bytes of two planes are rearranged into codes of four bits, those of f = 0 and 2 in one register, of 1
// and 3 in another: half as many dot products as plane by plane. Where a byte may go into one whole, the upper code is not shifted
// down: the sums of whole bytes, less those of lower codes, are sixteen times theirs.

using I = Lanes::I;

// Requests are spread evenly, one for a line multiplied, this many tiles ahead in the same columns and then in the next block.
// Far fewer lines do not cover the memory's latency, bursts are dropped by the core.
inline int64_t tiles_ahead(const Block& b) {
  const int lines = b.kept[0] + b.kept[1] + b.kept[2] + b.kept[3];
  return lines < 96 ? 3 : lines < 192 ? 2 : 1;
}

// Inlined at once: GCC drops calls of a function that does nothing but prefetch.
inline __attribute__((always_inline)) void request(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

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

// Sums of a part of a tile, by f and word.
struct Part {
  static constexpr int K = Lanes::fields_at_once;
  I sum[4][K];

  void clear() {
    for (int f = 0; f < 4; ++f)
      for (int k = 0; k < K; ++k) sum[f][k] = Lanes::zero();
  }
  void shift(int bits) {
    for (int f = 0; f < 4; ++f)
      for (int k = 0; k < K; ++k) sum[f][k] = bits == 2 ? Lanes::left2(sum[f][k]) : Lanes::left(sum[f][k], bits);
  }
  // Bytes of f = odd (lower) and odd + 2.
  inline __attribute__((always_inline)) void add(int odd, int k, I bytes, I c) {
    const I low4 = Lanes::mask(0x0f);
    sum[odd][k] = Lanes::dot(sum[odd][k], Lanes::both(bytes, low4), c);
    sum[odd + 2][k] = Lanes::dot(sum[odd + 2][k], Lanes::whole_bytes ? bytes : Lanes::both(Lanes::right4(bytes), low4), c);
  }
  I field(int f, int k) const {
    return f < 2 || !Lanes::whole_bytes ? sum[f][k] : Lanes::right4_signed(Lanes::sub(sum[f][k], sum[f - 2][k]));
  }
};

inline __attribute__((always_inline)) void interleave(const I* v, int from, I* word) {
  if (Lanes::fields_at_once == 4 || from == 0) {
    const I ab = Lanes::zip_low8(v[0], v[1]), cd = Lanes::zip_low8(v[2], v[3]);
    word[0] = Lanes::zip_low16(ab, cd);
    word[1] = Lanes::zip_high16(ab, cd);
  }
  if (Lanes::fields_at_once == 4 || from == 2) {
    const I ab = Lanes::zip_high8(v[0], v[1]), cd = Lanes::zip_high8(v[2], v[3]);
    word[2] = Lanes::zip_low16(ab, cd);
    word[3] = Lanes::zip_high16(ab, cd);
  }
}

// Adds one plane's lines of four columns, requesting a line of each of `wanted` in between.
template <bool Whole, bool Asks>
inline __attribute__((always_inline)) void add_plane(const uint8_t* const* four, const int32_t* coefficients, int here, int from,
                                                     Part& part, const uint8_t* const* wanted, int64_t offset) {
  constexpr int K = Lanes::fields_at_once;
  const I fields02 = Lanes::mask(0x33), c = Lanes::spread(coefficients, here);
  I v[4], word[4];
  for (int e = 0; e < 4; ++e) v[e] = Whole ? Lanes::load(four[e]) : Lanes::load_part(four[e], here);
  interleave(v, from, word);
  for (int k = 0; k < K; ++k) {
    if (Asks)
      for (int e = k * 4 / K; e < (k + 1) * 4 / K; ++e) request(wanted[e] + offset);
    part.add(0, k, Lanes::both(word[from + k], fields02), c);
    part.add(1, k, Lanes::both(Lanes::right2(word[from + k]), fields02), c);
  }
}

// The same of two planes, `lower` the one of less weight.
template <bool Whole, bool Asks>
inline __attribute__((always_inline)) void add_planes(const uint8_t* const* upper, const uint8_t* const* lower,
                                                      const int32_t* coefficients, int here, int from, Part& part,
                                                      const uint8_t* const* wanted0, int64_t offset0,
                                                      const uint8_t* const* wanted1, int64_t offset1) {
  constexpr int K = Lanes::fields_at_once;
  const I fields02 = Lanes::mask(0x33), c = Lanes::spread(coefficients, here);
  I even[4], odd[4], word[4];
  for (int e = 0; e < 4; ++e) {
    const I a = Whole ? Lanes::load(upper[e]) : Lanes::load_part(upper[e], here);
    const I b = Whole ? Lanes::load(lower[e]) : Lanes::load_part(lower[e], here);
    even[e] = Lanes::select(fields02, b, Lanes::left2(a));
    odd[e] = Lanes::select(fields02, Lanes::right2(b), a);
  }
  interleave(even, from, word);
  for (int k = 0; k < K; ++k) {
    if (Asks)
      for (int e = k * 4 / K; e < (k + 1) * 4 / K; ++e) request(wanted0[e] + offset0);
    part.add(0, k, word[from + k], c);
  }
  interleave(odd, from, word);
  for (int k = 0; k < K; ++k) {
    if (Asks)
      for (int e = k * 4 / K; e < (k + 1) * 4 / K; ++e) request(wanted1[e] + offset1);
    part.add(1, k, word[from + k], c);
  }
}

// Lines of four columns' plane p from byte `at` of it on; zeros where it is not read, of columns from `count` on.
inline __attribute__((always_inline)) void lines(const uint8_t* const* column, int count, int64_t at, const uint8_t** four) {
  for (int e = 0; e < 4; ++e) four[e] = e < count ? column[e] + at : nothing;
}

// Adds the words from `from` on of the groups `lane` to lane + here of a tile.
template <bool Whole, bool Asks, bool High>
inline __attribute__((always_inline)) void add_part(const Block& b, int64_t t, int lane, int here, int from,
                                                    const uint8_t* const* column, const int32_t* kept,
                                                    const int32_t* coefficients, int64_t stride, const Ahead* ahead,
                                                    const Upper* upper, int32_t* sums) {
  const int planes = b.w->planes;
  const int64_t plane_stride = b.w->plane_stride;
  int64_t at = t * plane_line + lane * 16;
  Part part;
  part.clear();
  const uint8_t *four[4], *below[4];
  if (upper) {
    for (int p = 0; p < planes; ++p) {
      if (p) part.shift(2);
      lines(upper->column, upper->kept[p], at + p * plane_stride, four);
      if (upper->kept[p])
        add_plane<Whole, false>(four, upper->coefficients + t * tile_groups + lane, here, from, part, nullptr, 0);
    }
    part.shift(9 - 2 * planes);  // 7 bits, of which the planes below shift the rest
  }
  const int32_t* const c4 = coefficients + t * tile_groups + lane;
  for (int p = 0; p < planes; p += 2, at += 2 * plane_stride) {
    const Ahead *const a = ahead + p, *const under = a + 1;
    // First the columns of which the plane below is not read, by whole fours.
    const int paired = p + 1 < planes ? kept[p + 1] : 0;
    if (p) part.shift(2);
    int q = (paired + 3) / 4 * 4;
    for (; q + 4 <= kept[p]; q += 4) {
      lines(column + q, 4, at, four);
      add_plane<Whole, Asks>(four, c4 + q / 4 * stride, here, from, part, a->four(q), a->offset);
    }
    if (q < kept[p]) {
      lines(column + q, kept[p] - q, at, four);
      add_plane<Whole, Asks>(four, c4 + q / 4 * stride, here, from, part, a->four(q), a->offset);
      q += 4;
    }
    if (Asks)
      for (; q < a->count; ++q) request(a->column[q] + a->offset);
    if (p + 1 == planes) break;
    part.shift(2);
    for (q = 0; q + 4 <= paired; q += 4) {
      lines(column + q, 4, at, four);
      lines(column + q, 4, at + plane_stride, below);
      add_planes<Whole, Asks>(four, below, c4 + q / 4 * stride, here, from, part, a->four(q), a->offset, under->four(q),
                              under->offset);
    }
    if (q < paired) {
      lines(column + q, kept[p] - q, at, four);
      lines(column + q, paired - q, at + plane_stride, below);
      add_planes<Whole, Asks>(four, below, c4 + q / 4 * stride, here, from, part, a->four(q), a->offset, under->four(q),
                              under->offset);
      q += 4;
    }
    if (Asks)
      for (; q < under->count; ++q) request(under->column[q] + under->offset);
  }
  for (int k = 0; k < Part::K; ++k)
    for (int f = 0; f < 4; ++f) {
      int32_t* const to = sums + t * tile_outputs + (4 * f + from + k) * 16 + lane * 4;
      const I field = High ? Lanes::left(part.field(f, k), 7) : part.field(f, k);
      Lanes::store_sums(to, Lanes::add(Lanes::load_sums(to), field));
    }
}

template <bool Whole, bool Requests, bool High>
inline __attribute__((always_inline)) void add_tile(const Block& b, int64_t t, const uint8_t* const* column,
                                                    const int32_t* kept, const int32_t* coefficients, int64_t stride,
                                                    const Ahead* ahead, const Upper* upper, int32_t* sums) {
  constexpr int L = Lanes::count, K = Part::K;
  const int64_t left = b.groups - t * tile_groups;
  add_part<Whole, Requests, High>(b, t, 0, Whole || left > L ? L : int(left), 0, column, kept, coefficients, stride, ahead, upper,
                                  sums);
  for (int lane = 0; lane < int(tile_groups); lane += L) {
    const int here = Whole || left - lane > L ? L : int(left - lane);
    if (here <= 0) return;
    for (int from = lane ? 0 : K; from < 4; from += K)
      add_part<Whole, false, High>(b, t, lane, here, from, column, kept, coefficients, stride, ahead, upper, sums);
  }
}

template <bool Requests, bool High>
inline void add_tiles(const Block& b, const uint8_t* const* column, const int32_t* kept, const int32_t* coefficients,
                      int64_t stride, const Block* next, const Upper* upper, int32_t* sums) {
  const int64_t full = b.groups / tile_groups, wanted = tiles_ahead(b), far = wanted < b.tiles ? wanted : b.tiles;
  Ahead ahead[max_planes] = {};
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
  int high[listed_columns], high_count = 0;
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
  const uint8_t *column[listed_columns + 4], *mantissa[listed_columns + 4];
  int32_t multiplier[listed_columns + 4], kept[max_planes] = {};
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
