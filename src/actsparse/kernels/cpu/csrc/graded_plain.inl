// The parts of a packed product that are plain loops, compiled in each instruction set's file. As in products.inl nothing from
// std:: may be used.

// The order in which the coefficients' magnitudes are added is part of the result: sixteen sums, joined pairwise.
constexpr int lanes = 16;

inline float scale_of(const as_packed& w, int64_t column) {
  const uint32_t u = uint32_t(w.scale[column]) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline Grades joined(const float* sum, const float* top) {
  float s[lanes], t[lanes];
  for (int k = 0; k < lanes; ++k) {
    s[k] = sum[k];
    t[k] = top[k];
  }
  for (int half = lanes / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) {
      s[k] += s[k + half];
      t[k] = t[k] < t[k + half] ? t[k + half] : t[k];
    }
  Grades g = {};
  g.sum = s[0];
  g.top = t[0];
  return g;
}

inline Grades grade_plain(const as_packed& w, int64_t in, const float* x, int64_t first, int64_t count, float* coefficients) {
  float sum[lanes] = {}, top[lanes] = {};
  uint64_t read[max_planes] = {};
  for (int64_t c = 0; c < count; ++c) {
    const int64_t i = first + c;
    const float v = w.center ? x[i] - w.center[i] : x[i];
    int level = w.threshold ? 0 : w.planes;
    while (level < w.planes && !(__builtin_fabsf(v) < w.threshold[level * in + i])) ++level;
    for (int p = 0; p < level; ++p) read[p] |= uint64_t(1) << c;
    const float a = level ? v * (scale_of(w, i) * w.gain[level - 1]) : 0.0f, magnitude = __builtin_fabsf(a);
    coefficients[c] = a;
    sum[c % lanes] += magnitude;
    top[c % lanes] = top[c % lanes] < magnitude ? magnitude : top[c % lanes];
  }
  Grades g = joined(sum, top);
  for (int p = 0; p < max_planes; ++p) g.read[p] = read[p];
  return g;
}

// Coefficients of four columns over the groups, byte e of out[g] that of column e, and their part in the centres. `keep` is
// what of a coefficient's bits goes into the byte, after `shift`.
inline void coefficients_of(const uint8_t* const* mantissa, const int32_t* multiplier, const int32_t* keep, int shift,
                            const int32_t* centre, int64_t groups, int32_t* out, int32_t* centres) {
  const uint8_t *const m0 = mantissa[0], *const m1 = mantissa[1], *const m2 = mantissa[2], *const m3 = mantissa[3];
  const auto word = [&](int64_t g, int32_t* sum) __attribute__((always_inline)) {
    const int32_t c0 = (m0[g] * multiplier[0] + (1 << 14)) >> 15, c1 = (m1[g] * multiplier[1] + (1 << 14)) >> 15;
    const int32_t c2 = (m2[g] * multiplier[2] + (1 << 14)) >> 15, c3 = (m3[g] * multiplier[3] + (1 << 14)) >> 15;
    *sum = c0 * centre[0] + c1 * centre[1] + c2 * centre[2] + c3 * centre[3];
    return int32_t(uint32_t((c0 & keep[0]) >> shift & 255) | uint32_t((c1 & keep[1]) >> shift & 255) << 8 |
                   uint32_t((c2 & keep[2]) >> shift & 255) << 16 | uint32_t((c3 & keep[3]) >> shift & 255) << 24);
  };
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum;
    out[g] = word(g, &sum);
    if (centres) centres[g] += sum;
  }
}

inline bool is_high(int32_t multiplier) { return multiplier > max_multiplier || multiplier < -max_multiplier; }

void unpack_plain(const as_packed& w, int64_t out, int64_t column, int32_t level, float* to) {
  const uint8_t* const plane = w.plane + column * w.stride;
  const uint8_t* const mantissa = w.mantissa + column * w.mantissa_stride;
  const float step = scale_of(w, column) / 255.0f * w.gain[level - 1] / float(1 << (2 * level - 1));
  const float centre = 0.5f - float(1 << (2 * level - 1));
  for (int64_t g = 0; g * group_outputs < out; ++g) {
    float values[group_outputs];
    const float scale = step * float(mantissa[g]);
    for (int k = 0; k < 4; ++k) {
      int32_t code[16] = {};
      for (int p = 0; p < level; ++p)
        for (int j = 0; j < 16; ++j) code[j] = code[j] << 2 | (plane[p * w.plane_stride + 16 * g + j] >> (2 * k) & 3);
      for (int j = 0; j < 16; ++j) values[16 * k + j] = (float(code[j]) + centre) * scale;
    }
    const int64_t rest = out - g * group_outputs;
    __builtin_memcpy(to + g * group_outputs, values, size_t(rest < group_outputs ? rest : group_outputs) * sizeof(float));
  }
}
