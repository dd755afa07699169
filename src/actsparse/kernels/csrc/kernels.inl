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
  // Two chains per row hide the latency of fma at batch 1; with more batch rows the chains are many enough.
  constexpr int C = (B == 1 && U > 1) ? 2 : 1;
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

template <typename T>
inline void widen_t(const T* from, float* to, int64_t n) {
  constexpr int W = Vec::lanes;
  int64_t i = 0;
  for (; i + W <= n; i += W) Vec::store(to + i, Vec::load(from + i));
  if (i < n) Vec::store_tail(to + i, Vec::load_tail(from + i, int(n - i)), int(n - i));
}

void widen(int32_t dtype, const void* from, float* to, int64_t n) {
  if (dtype == AS_F32)
    widen_t(static_cast<const float*>(from), to, n);
  else if (dtype == AS_BF16)
    widen_t(static_cast<const Bf16*>(from), to, n);
  else
    widen_t(static_cast<const F16*>(from), to, n);
}

inline uint32_t bits_of(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // nearest even; NaN stays NaN (its payload's low bits could round to infinity)
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

void narrow(int32_t dtype, const float* from, void* to, int64_t n) {
  if (dtype == AS_F32) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(float));
  } else if (dtype == AS_BF16) {
    uint16_t* const out = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(from[i]);
  } else {
    uint16_t* const out = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) out[i] = Vec::to_f16(from[i]);
  }
}

// exp with a relative error under 2e-7, branch-free so that loops over it vectorise. Saturates at 2^-126 and 2^127 instead
// of 0 and infinity: every use here divides by 1 + exp or by a sum that holds exp(0). NaN passes through.
inline float exp_of(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer held in the low mantissa bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}

// erf by two minimax polynomials, absolute error under 2e-7.
inline float erf_of(float a) {
  const float t = __builtin_fabsf(a), s = a * a;
  float r = -1.72853470e-5f * t + 3.83197126e-4f;
  r = r * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  r = r * t - 1.06777877e-1f;
  r = r * t - 6.34846687e-1f;
  r = r * t - 1.28717512e-1f;
  r = r * t - t;
  const float far = __builtin_copysignf(1.0f - exp_of(r), a);
  float q = -5.96761703e-4f;
  q = q * s + 4.99119423e-3f;
  q = q * s - 2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s - 3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  const float near = q * a + a;
  // The far polynomial turns upwards again past 4, where erf is 1 to float precision.
  return t > 4.0f ? __builtin_copysignf(1.0f, a) : (t > 0.927734375f ? far : near);
}

void activate(int32_t kind, float* x, int64_t n) {
  // Comparisons are written so that NaN takes the branch that returns x.
  switch (kind) {
    case AS_SILU:
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] / (1.0f + exp_of(-x[i]));
      break;
    case AS_RELU:
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];
      break;
    case AS_RELU2:
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i] * x[i];
      break;
    case AS_GELU:
      for (int64_t i = 0; i < n; ++i) x[i] = 0.5f * x[i] * (1.0f + erf_of(x[i] * 0.70710678f));
      break;
    case AS_GELU_TANH:  // 0.5 x (1 + tanh z) = x / (1 + exp(-2 z))
      for (int64_t i = 0; i < n; ++i)
        x[i] = x[i] / (1.0f + exp_of(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
      break;
    default: break;
  }
}

template <typename T, typename X = Vec>
inline int64_t keep_one(const T* v, const float* threshold, int64_t n, int32_t* idx, float* values) {
  if constexpr (X::compresses) {
    return X::keep(v, threshold, n, idx, values);
  } else {
    constexpr int W = X::lanes;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
      const int valid = n - i < W ? int(n - i) : W;
      float lane[W];
      X::store(lane, valid < W ? X::load_tail(v + i, valid) : X::load(v + i));
      for (int k = 0; k < valid; ++k) {
        idx[count] = int32_t(i) + k;
        if (values) values[count] = lane[k];
        count += !(__builtin_fabsf(lane[k]) < threshold[i + k]);
      }
    }
    return count;
  }
}

int64_t keep(int32_t dtype, const void* from, int64_t v_stride, const float* threshold, int64_t batch, int64_t n,
             int32_t* idx, float* values) {
  if (batch == 1 && dtype == AS_BF16) return keep_one(static_cast<const Bf16*>(from), threshold, n, idx, values);
  if (batch == 1 && dtype == AS_F16) return keep_one(static_cast<const F16*>(from), threshold, n, idx, values);
  const float* const v = static_cast<const float*>(from);
  if (batch == 1) return keep_one(v, threshold, n, idx, values);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    bool any = false;
    for (int64_t b = 0; b < batch; ++b) any |= !(__builtin_fabsf(v[b * v_stride + i]) < threshold[i]);
    idx[count] = int32_t(i);
    count += any;
  }
  return count;
}

int64_t rectify(bool positive, float* x, int64_t n) {
  int32_t active = 0;
  if (positive)
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] > 0.0f ? x[i] : 0.0f;
  else
    for (int64_t i = 0; i < n; ++i) x[i] = __builtin_fabsf(x[i]);
  for (int64_t i = 0; i < n; ++i) active += x[i] > 0.0f;
  return active;
}

void tally(const float* strength, float level, float unit, int64_t n, float* counts, float* sums) {
  for (int64_t i = 0; i < n; ++i) {
    counts[i] += (strength[i] >= level) & (strength[i] > 0.0f) ? 1.0f : 0.0f;
    sums[i] += strength[i] * unit;
  }
}

void normalise(int32_t kind, const float* x, const float* weight, const float* bias, float eps, int64_t n, float* y) {
  // Eight partial sums in double: exact enough for any width and independent of the vector length.
  double mean = 0.0;
  if (kind == 1) {
    double part[8] = {};
    for (int64_t i = 0; i < n; ++i) part[i & 7] += double(x[i]);
    for (double p : part) mean += p;
    mean /= double(n);
  }
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) {
      const double d = double(x[i + k]) - mean;
      part[k] += d * d;
    }
  for (; i < n; ++i) {
    const double d = double(x[i]) - mean;
    part[0] += d * d;
  }
  double square = 0.0;
  for (double p : part) square += p;
  const float scale = float(1.0 / __builtin_sqrt(square / double(n) + double(eps))), shift = float(mean);
  for (i = 0; i < n; ++i) {
    float t = (x[i] - shift) * scale;
    if (weight) t *= weight[i];
    if (bias) t += bias[i];
    y[i] = t;
  }
}

void softmax(float* x, float scale, int64_t n) {  // scale > 0, n >= 1
  float top = x[0];
  for (int64_t i = 1; i < n; ++i) top = top < x[i] ? x[i] : top;
  float part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; ++k) {
      x[i + k] = exp_of((x[i + k] - top) * scale);
      part[k] += x[i + k];
    }
  for (; i < n; ++i) {
    x[i] = exp_of((x[i] - top) * scale);
    part[0] += x[i];
  }
  float total = 0.0f;
  for (float p : part) total += p;
  const float inverse = 1.0f / total;
  for (i = 0; i < n; ++i) x[i] *= inverse;
}

uint64_t read(const void* data, int64_t bytes) {
  // Eight streams at once, as the kernels read eight rows: one stream per thread does not reach the memory's limit.
  constexpr int streams = 8, line = 8;
  const uint64_t* const p = static_cast<const uint64_t*>(data);
  const int64_t n = bytes / 8, part = n / streams / line * line;
  uint64_t sums[streams][line] = {};
  for (int64_t i = 0; i < part; i += line)
    for (int s = 0; s < streams; ++s) {
      __builtin_prefetch(p + s * part + i + 512, 0, 2);
      for (int k = 0; k < line; ++k) sums[s][k] ^= p[s * part + i + k];
    }
  uint64_t all = 0;
  for (const auto& stream : sums)
    for (uint64_t v : stream) all ^= v;
  for (int64_t i = streams * part; i < n; ++i) all ^= p[i];
  return all;
}

const IsaOps table = {Vec::name, Vec::lanes, arrange, dot_rows, add_rows, widen, narrow, activate, keep, rectify, tally, normalise, softmax, read};
