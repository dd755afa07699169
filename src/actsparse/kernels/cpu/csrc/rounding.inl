// Rounding columns to nested codes: a block with error feedback, and once more by coordinate descent (methods/feedback.py says
// what for). Outputs do not depend on each other: a strip of them goes through the block with all it needs in a core's cache.

constexpr int64_t kStrip = 16;  // of outputs; a group of them, which shares a half range, is four

// A column's levels, in units of the weights.
struct Levels {
  int count;
  float step[4], origin[4], share[5];  // what a code's first bits count, what is added, and what of the energy is read so
  float codes_a_unit;
  int32_t half;

  Levels(const as_rounding& p, int64_t column, int64_t group) {
    const float span = p.half_range[column * p.groups + group];
    count = p.stored / 2;
    half = 1 << (p.stored - 1);
    codes_a_unit = float(half) / (span > 1e-30f ? span : 1e-30f);
    share[0] = p.shares[column];
    for (int l = 0; l < count; ++l) {
      share[l + 1] = p.shares[(l + 1) * p.shares_stride + column];
      step[l] = span * p.gain[l] / float(1 << (2 * l + 1));
      origin[l] = step[l] * (0.5f - float(1 << (2 * l + 1)));
    }
  }
  int32_t nearest(float weight) const {
    const float most = float(2 * half - 1), place = weight * codes_a_unit + float(half);
    return int32_t(place < 0.0f ? 0.0f : (place > most ? most : place));
  }
  float value(int l, int32_t code) const { return float(code >> (2 * (count - 1 - l))) * step[l] + origin[l]; }
};

void round_block(const as_rounding* p, const float* weight, float* rest, float* errors) {
  float left[AS_ROUNDING_COLUMNS][kStrip];
  for (int64_t o = 0; o < p->outputs; o += kStrip) {
    for (int64_t i = 0; i < p->columns; ++i) __builtin_memcpy(left[i], rest + i * p->outputs + o, sizeof left[i]);
    for (int64_t i = 0; i < p->columns; ++i) {
      const Levels levels(*p, i, o / (4 * kStrip));
      const float* const feedback = p->matrix + i * p->matrix_stride;
      const int64_t at = i * p->outputs + o;
      float error[kStrip];
      int32_t code[kStrip];
      for (int64_t r = 0; r < kStrip; ++r) code[r] = levels.nearest(left[i][r]);
      for (int64_t r = 0; r < kStrip; ++r) error[r] = levels.share[0] * weight[at + r];
      for (int l = 0; l < levels.count; ++l)
        for (int64_t r = 0; r < kStrip; ++r) error[r] += levels.share[l + 1] * (weight[at + r] - levels.value(l, code[r]));
      for (int64_t k = i + 1; k < p->columns; ++k)
        for (int64_t r = 0; r < kStrip; ++r) left[k][r] += feedback[k] * error[r];
      for (int64_t r = 0; r < kStrip; ++r) p->codes[at + r] = uint8_t(code[r]);
      __builtin_memcpy(errors + at, error, sizeof error);
      __builtin_memcpy(rest + at, left[i], sizeof left[i]);
    }
  }
}

// What is left of weights as they are read on average, and with every plane.
void code_errors(const as_rounding* p, const float* weight, float* as_read, float* whole) {
  for (int64_t i = 0; i < p->columns; ++i)
    for (int64_t o = 0; o < p->outputs; o += kStrip) {
      const Levels levels(*p, i, o / (4 * kStrip));
      const int64_t at = i * p->outputs + o;
      float mean[kStrip], last[kStrip];
      for (int64_t r = 0; r < kStrip; ++r) mean[r] = levels.share[0] * weight[at + r];
      for (int l = 0; l < levels.count; ++l)
        for (int64_t r = 0; r < kStrip; ++r) {
          last[r] = weight[at + r] - levels.value(l, p->codes[at + r]);
          mean[r] += levels.share[l + 1] * last[r];
        }
      __builtin_memcpy(as_read + at, mean, sizeof mean);
      __builtin_memcpy(whole + at, last, sizeof last);
    }
}

void descend_block(const as_rounding* p, float prompts, const float* weight, float* as_read, float* whole,
                   const float* read_pull, const float* whole_pull, float* stood) {
  constexpr int32_t reach = 3;
  float pull[AS_ROUNDING_COLUMNS][2][kStrip];  // of all columns, the own one too
  const float decoding = 1.0f - prompts;
  for (int64_t o = 0; o < p->outputs; o += kStrip) {
    for (int64_t i = 0; i < p->columns; ++i) {
      __builtin_memcpy(pull[i][0], read_pull + i * p->outputs + o, sizeof pull[i][0]);
      __builtin_memcpy(pull[i][1], whole_pull + i * p->outputs + o, sizeof pull[i][1]);
    }
    for (int64_t i = 0; i < p->columns; ++i) {
      const Levels levels(*p, i, o / (4 * kStrip));
      const float* const hessian = p->matrix + i * p->matrix_stride;
      const float own = hessian[i];
      const int64_t at = i * p->outputs + o;
      float w[kStrip], read_slope[kStrip], whole_slope[kStrip];
      float least[kStrip], mean[kStrip] = {}, last[kStrip] = {};
      int32_t present[kStrip], middle[kStrip], best[kStrip];
      for (int64_t r = 0; r < kStrip; ++r) {
        w[r] = weight[at + r];
        read_slope[r] = 2.0f * decoding * (pull[i][0][r] - own * as_read[at + r]);
        whole_slope[r] = 2.0f * prompts * (pull[i][1][r] - own * whole[at + r]);
        present[r] = best[r] = p->codes[at + r];
        stood[at + r] = w[r] + 0.5f * (read_slope[r] + whole_slope[r]) / own;
        middle[r] = levels.nearest(stood[at + r]);
        least[r] = __builtin_inff();
      }
      // The present code first: another has to be better. Rounded values that differ by their order alone do not then move it.
      for (int32_t c = -reach - 1; c <= reach; ++c) {
        int32_t code[kStrip];
        float square[kStrip], read[kStrip], off[kStrip];
        for (int64_t r = 0; r < kStrip; ++r) {
          const int32_t tried = middle[r] + c, most = 2 * levels.half - 1;
          code[r] = c < -reach ? present[r] : (tried < 0 ? 0 : (tried > most ? most : tried));
          read[r] = levels.share[0] * w[r];
          square[r] = 0.0f;
        }
        for (int l = 0; l < levels.count; ++l)
          for (int64_t r = 0; r < kStrip; ++r) {
            off[r] = w[r] - levels.value(l, code[r]);
            const float part = levels.share[l + 1] * off[r];
            read[r] += part;
            square[r] += part * off[r];
          }
        for (int64_t r = 0; r < kStrip; ++r) {
          const float cost = own * (decoding * square[r] + prompts * off[r] * off[r]) + read_slope[r] * read[r] +
                             whole_slope[r] * off[r];
          const bool better = cost < least[r];
          least[r] = better ? cost : least[r];
          best[r] = better ? code[r] : best[r];
          mean[r] = better ? read[r] : mean[r];
          last[r] = better ? off[r] : last[r];
        }
      }
      for (int64_t r = 0; r < kStrip; ++r) {
        p->codes[at + r] = uint8_t(best[r]);
        const float read_step = mean[r] - as_read[at + r], whole_step = last[r] - whole[at + r];
        as_read[at + r] = mean[r];
        whole[at + r] = last[r];
        mean[r] = read_step;
        last[r] = whole_step;
      }
      for (int64_t k = i + 1; k < p->columns; ++k)
        for (int64_t r = 0; r < kStrip; ++r) {
          pull[k][0][r] += hessian[k] * mean[r];
          pull[k][1][r] += hessian[k] * last[r];
        }
    }
  }
}
