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
    const float v = w.center ? x[c] - w.center[i] : x[c];
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

// Coefficients of four columns over the groups, byte e of out[g] that of column e: of those whose bit in `halves` is set only
// the lower seven bits, or with `upper` only what lies above these. Adds to the centres, unless there are none.
inline void coefficients_of(const uint8_t* const* mantissa, const int32_t* multiplier, unsigned halves, bool upper,
                            const int32_t* centre, int64_t groups, int32_t* __restrict out, int32_t* __restrict centres) {
  for (int e = 0; e < 4; ++e) {
    const uint8_t* __restrict const m = mantissa[e];
    const int32_t k = multiplier[e], weight = centre[e], keep = halves >> e & 1 ? 127 : -1;
    const int shift = upper ? 7 : 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t c = (m[g] * k + (1 << 14)) >> 15;
      const uint32_t byte = uint32_t((c & keep) >> shift & 255) << (8 * e);
      out[g] = e ? int32_t(uint32_t(out[g]) | byte) : int32_t(byte);
    }
    if (!centres) continue;
    for (int64_t g = 0; g < groups; ++g) centres[g] += ((m[g] * k + (1 << 14)) >> 15) * weight;
  }
}

inline bool is_high(int32_t multiplier) { return multiplier > max_multiplier || multiplier < -max_multiplier; }

inline void unpack_plain(const as_packed& w, int64_t out, int64_t column, int32_t level, float* to) {
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
