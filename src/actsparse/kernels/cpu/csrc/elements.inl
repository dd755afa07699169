// What is done element by element, over the same vector type and under the same rules as products.inl; last, the table of all.

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
  if (kind == AS_LAYER_NORM) {
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

const IsaOps table = {Vec::name, Vec::lanes, arrange, dot_rows, add_rows, widen, narrow, activate, keep, rectify, tally, normalise, softmax, read,
                      round_block, code_errors, descend_block};
