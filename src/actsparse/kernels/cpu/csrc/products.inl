// The algorithms, written once over a small vector type. Each instruction set's file includes this one inside its own
// anonymous namespace after defining `Vec`:
//   Vec::lanes, V (the register), zero(), set1(f), load(const T*), load_tail(const T*, n), store(float*, V),
//   store_tail(float*, V, n), fma(a, b, c) = a * b + c, add(a, b), sum(V), to_f16(float);
//   compresses; where it is true also keep(v, threshold, n, idx, values),
//   pairs; where it is true also load_pairs(const Bf16*, even, odd), split(a, b, even, odd) and join(even, odd, a, b)
// Nothing from std:: may be used here: an inline std:: function emitted with AVX-512 code could be the copy that the linker
// keeps for the whole library. For the same reason mathematics goes through builtins and hand-written polynomials.

template <typename T>
constexpr int step_of() {  // one 64-byte line of the stored type
  return 64 / int(sizeof(T));
}

// Two bfloat16 share a 32-bit lane, and each becomes a float by one shift or one mask: half the loads, and no shuffle, of
// widening them in order. The price is the order: within every 2 W values of the whole lines, the even ones come first and
// then the odd ones. Activations and accumulators are brought into that order (`arrange`), the weights stay as they are.
template <typename T>
constexpr int part_of() {  // vectors that one load yields
  return 1;
}
template <>
constexpr int part_of<Bf16>() {
  return Vec::pairs ? 2 : 1;
}

// X is Vec under a name that depends on the template, because not every Vec has the functions for pairs.
template <typename T, typename X = Vec>
inline void load_part(const T* p, typename X::V* v) {
  if constexpr (part_of<T>() == 2)
    X::load_pairs(p, v, v + 1);
  else
    v[0] = X::load(p);
}

template <typename T, bool Back, typename X = Vec>
inline void arrange_t(float* x, int64_t n) {
  if constexpr (part_of<T>() == 2) {
    constexpr int W = Vec::lanes;
    n = n / step_of<T>() * step_of<T>();
    for (int64_t i = 0; i < n; i += 2 * W) {
      const Vec::V a = Vec::load(x + i), b = Vec::load(x + i + W);
      Vec::V first, second;
      if constexpr (Back)
        X::join(a, b, &first, &second);
      else
        X::split(a, b, &first, &second);
      Vec::store(x + i, first);
      Vec::store(x + i + W, second);
    }
  } else {
    (void)x;
    (void)n;
  }
}

// Streaming many short rows from scattered places defeats the hardware prefetcher: it has to notice each row anew. So lines
// are requested into L2 a fixed way ahead: further along the same rows, and towards their end in the next group of rows.
constexpr int lines_ahead = 32;

template <typename T>
inline void request(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Rows in flight at batch 1: eight streams fill the memory pipeline better than four, where the registers suffice.
constexpr int wide_group = Vec::lanes >= 16 ? 8 : 4;
// And beside four batch rows, of which each takes two registers per row: AVX2 has only sixteen.
constexpr int batch_group = Vec::lanes == 8 ? 1 : 2;

template <typename T, int R>
struct Rows {
  const T* p[R];
};

// Calls work(i) for the starts of all whole lines of `length` values, and requests what lies ahead of each.
template <typename T, int R, typename F>
inline void for_lines(const Rows<T, R>& rows, const Rows<T, R>& next, int64_t length, F&& work) {
  constexpr int S = step_of<T>();
  const int64_t whole = length / S * S, ahead = whole < lines_ahead * S ? whole : lines_ahead * S;
  int64_t i = 0;
  for (; i < whole - ahead; i += S) {
    for (int r = 0; r < R; ++r) request(rows.p[r] + i + ahead);
    work(i);
  }
  for (; i < whole; i += S) {
    for (int r = 0; r < R; ++r) request(next.p[r] + i + ahead - whole);
    work(i);
  }
}

template <typename T, int R>
inline Rows<T, R> rows_at(const T* data, int64_t stride, const int32_t* idx, int64_t first, int64_t j, int64_t count) {
  Rows<T, R> rows;
  for (int r = 0; r < R; ++r) {
    const int64_t k = j + r < count ? j + r : count - 1;
    rows.p[r] = data + (idx ? int64_t(idx[k]) : first + k) * stride;
  }
  return rows;
}

template <typename T, int R, int B>
inline void dot_group(const Rows<T, R>& rows, const Rows<T, R>& next, const float* x, int64_t x_stride, int64_t length,
                      float* out, int64_t out_stride) {
  constexpr int S = step_of<T>(), W = Vec::lanes, U = S / W, P = part_of<T>();
  // Two chains per row hide the latency of fma at batch 1; with more batch rows they keep each row's sums what they are alone.
  constexpr int C = U > 1 ? 2 : 1;
  Vec::V acc[R][B][C];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      for (int c = 0; c < C; ++c) acc[r][b][c] = Vec::zero();
  for_lines(rows, next, length, [&](int64_t i) __attribute__((always_inline)) {
    for (int u = 0; u < U; u += P) {
      Vec::V xv[P][B];
      for (int p = 0; p < P; ++p)
        for (int b = 0; b < B; ++b) xv[p][b] = Vec::load(x + b * x_stride + i + (u + p) * W);
      for (int r = 0; r < R; ++r) {
        Vec::V w[P];
        load_part(rows.p[r] + i + u * W, w);
        for (int p = 0; p < P; ++p)
          for (int b = 0; b < B; ++b) acc[r][b][(u + p) % C] = Vec::fma(w[p], xv[p][b], acc[r][b][(u + p) % C]);
      }
    }
  });
  for (int64_t i = length / S * S; i < length; i += W) {
    const int n = length - i < W ? int(length - i) : W;
    for (int r = 0; r < R; ++r) {
      const Vec::V w = Vec::load_tail(rows.p[r] + i, n);
      for (int b = 0; b < B; ++b)
        acc[r][b][0] = Vec::fma(w, Vec::load_tail(x + b * x_stride + i, n), acc[r][b][0]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      out[b * out_stride + r] = Vec::sum(C == 2 ? Vec::add(acc[r][b][0], acc[r][b][C - 1]) : acc[r][b][0]);
}

// All batch rows against one group of weight rows: blocks of up to four, the later blocks find the weights in cache.
template <typename T, int R>
inline void dot_batch(const Rows<T, R>& rows, const Rows<T, R>& next, const float* x, int64_t x_stride, int64_t batch,
                      int64_t length, float* out, int64_t out_stride) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4)
    dot_group<T, R, 4>(rows, b ? rows : next, x + b * x_stride, x_stride, length, out + b * out_stride, out_stride);
  const Rows<T, R>& ahead = b ? rows : next;
  x += b * x_stride;
  out += b * out_stride;
  switch (batch - b) {
    case 1: dot_group<T, R, 1>(rows, ahead, x, x_stride, length, out, out_stride); break;
    case 2: dot_group<T, R, 2>(rows, ahead, x, x_stride, length, out, out_stride); break;
    case 3: dot_group<T, R, 3>(rows, ahead, x, x_stride, length, out, out_stride); break;
    default: break;
  }
}

template <typename T, int R>
inline int64_t dot_rows_by(const T* data, int64_t stride, const int32_t* idx, int64_t first, int64_t j, int64_t count,
                           const float* x, int64_t x_stride, int64_t batch, int64_t length, float* out,
                           int64_t out_stride) {
  for (; j + R <= count; j += R) {
    const Rows<T, R> rows = rows_at<T, R>(data, stride, idx, first, j, count);
    if (idx) __builtin_prefetch(idx + j + 4 * R);
    // What is left over after the last whole group is fewer than R rows, the last of them requested again.
    const Rows<T, R> next = j + R < count ? rows_at<T, R>(data, stride, idx, first, j + R, count) : rows;
    dot_batch<T, R>(rows, next, x, x_stride, batch, length, out + j, out_stride);
  }
  return j;
}

template <typename T>
void dot_rows_t(const T* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const float* x,
                int64_t x_stride, int64_t batch, int64_t length, float* out, int64_t out_stride) {
  int64_t j = 0;
  if (batch == 1) j = dot_rows_by<T, wide_group>(data, stride, idx, first, j, count, x, x_stride, batch, length, out, out_stride);
  if (batch == 1 && wide_group > 4)
    j = dot_rows_by<T, 4>(data, stride, idx, first, j, count, x, x_stride, batch, length, out, out_stride);
  if (batch == 1 || batch_group > 1)
    j = dot_rows_by<T, 2>(data, stride, idx, first, j, count, x, x_stride, batch, length, out, out_stride);
  dot_rows_by<T, 1>(data, stride, idx, first, j, count, x, x_stride, batch, length, out, out_stride);
}

template <typename T, int R, int B, bool Fresh>
inline void add_group(const Rows<T, R>& rows, const Rows<T, R>& next, const float* coef, int64_t coef_stride,
                      int64_t length, float* acc, int64_t acc_stride) {
  constexpr int S = step_of<T>(), W = Vec::lanes, U = S / W, P = part_of<T>();
  Vec::V c[B][R];
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) c[b][r] = Vec::set1(coef[b * coef_stride + r]);
  for_lines(rows, next, length, [&](int64_t i) __attribute__((always_inline)) {
    for (int u = 0; u < U; u += P) {
      const int64_t k = i + u * W;
      Vec::V a[P][B];
      for (int p = 0; p < P; ++p)
        for (int b = 0; b < B; ++b) a[p][b] = Fresh ? Vec::zero() : Vec::load(acc + b * acc_stride + k + p * W);
      for (int r = 0; r < R; ++r) {
        Vec::V w[P];
        load_part(rows.p[r] + k, w);
        for (int p = 0; p < P; ++p)
          for (int b = 0; b < B; ++b) a[p][b] = Vec::fma(c[b][r], w[p], a[p][b]);
      }
      for (int p = 0; p < P; ++p)
        for (int b = 0; b < B; ++b) Vec::store(acc + b * acc_stride + k + p * W, a[p][b]);
    }
  });
  for (int64_t i = length / S * S; i < length; i += W) {
    const int n = length - i < W ? int(length - i) : W;
    for (int b = 0; b < B; ++b) {
      float* const at = acc + b * acc_stride + i;
      Vec::V a = Fresh ? Vec::zero() : Vec::load_tail(at, n);
      for (int r = 0; r < R; ++r) a = Vec::fma(c[b][r], Vec::load_tail(rows.p[r] + i, n), a);
      Vec::store_tail(at, a, n);
    }
  }
}

template <typename T, int R, bool Fresh>
inline void add_batch(const Rows<T, R>& rows, const Rows<T, R>& next, const float* coef, int64_t coef_stride,
                      int64_t batch, int64_t length, float* acc, int64_t acc_stride) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4)
    add_group<T, R, 4, Fresh>(rows, b ? rows : next, coef + b * coef_stride, coef_stride, length, acc + b * acc_stride,
                              acc_stride);
  const Rows<T, R>& ahead = b ? rows : next;
  coef += b * coef_stride;
  acc += b * acc_stride;
  switch (batch - b) {
    case 1: add_group<T, R, 1, Fresh>(rows, ahead, coef, coef_stride, length, acc, acc_stride); break;
    case 2: add_group<T, R, 2, Fresh>(rows, ahead, coef, coef_stride, length, acc, acc_stride); break;
    case 3: add_group<T, R, 3, Fresh>(rows, ahead, coef, coef_stride, length, acc, acc_stride); break;
    default: break;
  }
}

// What stays the same while the rows of one matrix are added up.
template <typename T>
struct Adding {
  const T* data;
  int64_t stride;
  const int32_t* idx;
  int64_t first, count;
  const float* coef;
  int64_t coef_stride, batch, length;
  float* acc;
  int64_t acc_stride;
};

// Adds row groups of R from row j on, at most `groups` of them; returns the first row left.
template <typename T, int R, bool Fresh = false>
inline int64_t add_rows_by(const Adding<T>& a, int64_t j, int64_t groups) {
  for (; groups > 0 && j + R <= a.count; j += R, --groups) {
    const Rows<T, R> rows = rows_at<T, R>(a.data, a.stride, a.idx, a.first, j, a.count);
    if (a.idx) __builtin_prefetch(a.idx + j + 4 * R);
    __builtin_prefetch(a.coef + j + 4 * R);
    // What is left over after the last whole group is fewer than R rows, the last of them requested again.
    const Rows<T, R> next = j + R < a.count ? rows_at<T, R>(a.data, a.stride, a.idx, a.first, j + R, a.count) : rows;
    add_batch<T, R, Fresh>(rows, next, a.coef + j, a.coef_stride, a.batch, a.length, a.acc, a.acc_stride);
  }
  return j;
}

template <typename T>
void add_rows_t(const T* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count, const float* coef,
                int64_t coef_stride, int64_t batch, int64_t length, float* acc, int64_t acc_stride, bool fresh) {
  // The accumulator of one pass over the rows: 16 KiB at batch 1, half of the smallest L1 in use.
  const int64_t block = batch == 1 ? 4096 : 2048;
  for (int64_t o = 0; o < length; o += block) {
    const int64_t n = length - o < block ? length - o : block;
    const Adding<T> a = {data + o, stride, idx, first, count, coef, coef_stride, batch, n, acc + o, acc_stride};
    int64_t j = 0;
    if (fresh && count >= 4) {
      // The accumulators may lie in another core's cache: storing into them while weights arrive hides fetching them.
      j = batch == 1 && count >= 8 ? add_rows_by<T, 8, true>(a, j, 1) : add_rows_by<T, 4, true>(a, j, 1);
    } else {
      for (int64_t b = 0; b < batch; ++b)
        if (fresh)
          __builtin_memset(acc + b * acc_stride + o, 0, size_t(n) * sizeof(float));
        else
          arrange_t<T, false>(acc + b * acc_stride + o, n);
    }
    if (batch == 1) j = add_rows_by<T, 8>(a, j, count);
    j = add_rows_by<T, 4>(a, j, count);
    j = add_rows_by<T, 2>(a, j, count);
    add_rows_by<T, 1>(a, j, count);
    for (int64_t b = 0; b < batch; ++b) arrange_t<T, true>(acc + b * acc_stride + o, n);
  }
}

void dot_rows(int32_t dtype, const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count,
              const float* x, int64_t x_stride, int64_t batch, int64_t length, float* out, int64_t out_stride) {
  if (dtype == AS_F32)
    dot_rows_t(static_cast<const float*>(data), stride, idx, first, count, x, x_stride, batch, length, out, out_stride);
  else if (dtype == AS_BF16)
    dot_rows_t(static_cast<const Bf16*>(data), stride, idx, first, count, x, x_stride, batch, length, out, out_stride);
  else
    dot_rows_t(static_cast<const F16*>(data), stride, idx, first, count, x, x_stride, batch, length, out, out_stride);
}

void add_rows(int32_t dtype, const void* data, int64_t stride, const int32_t* idx, int64_t first, int64_t count,
              const float* coef, int64_t coef_stride, int64_t batch, int64_t length, float* acc, int64_t acc_stride,
              bool fresh) {
  if (dtype == AS_F32)
    add_rows_t(static_cast<const float*>(data), stride, idx, first, count, coef, coef_stride, batch, length, acc,
               acc_stride, fresh);
  else if (dtype == AS_BF16)
    add_rows_t(static_cast<const Bf16*>(data), stride, idx, first, count, coef, coef_stride, batch, length, acc,
               acc_stride, fresh);
  else
    add_rows_t(static_cast<const F16*>(data), stride, idx, first, count, coef, coef_stride, batch, length, acc,
               acc_stride, fresh);
}

void arrange(int32_t dtype, float* x, int64_t n) {
  if (dtype == AS_BF16) arrange_t<Bf16, false>(x, n);
}
