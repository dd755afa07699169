// Rounding a block of columns to nested codes, one after the other: with the error of each made good by those after it, and once
// more by coordinate descent (kernels/rounding.py).  Outputs do not depend on each other: a thread has one.
struct Rounding {
  const float* weight;      // [I, O], as the next three
  float* rest;              // what columns stand at
  float *as_read, *whole;   // errors, of descent only
  const float* half_range;  // [I, G]
  const float* matrix;      // [I, I] the factor of feedback, or the Hessian
  const float* shares;      // [1 + L, I] of what is read, by level
  const float* gain;        // [L]
  unsigned char* codes;     // [I, O]
  float *errors, *pull;     // [columns, O]; pull: of what is read, of what is whole
  int inputs, out, groups, stored, begin, columns;
  float prompts;
};

AS_DEVICE float half_range_of(const Rounding& p, int column, int output) {
  return p.half_range[(i64)column * p.groups + output / 64];
}

AS_DEVICE float nearest_code(const Rounding& p, float span, float weight) {
  const float half = (float)(1 << (p.stored - 1));
  return fminf(fmaxf(floorf(weight * (half / fmaxf(span, 1e-30f)) + half), 0.0f), 2.0f * half - 1.0f);
}

// What a code leaves of a weight: as it is read, with every plane, and the square as read (but for what is skipped).
AS_DEVICE void code_errors(const Rounding& p, int column, float span, float weight, float code, float& read, float& off,
                           float& square) {
  read = p.shares[column] * weight;
  square = 0.0f;
  for (int level = 2; level <= p.stored; level += 2) {
    const int index = level / 2 - 1;
    const float part = floorf(code / (float)(1 << (p.stored - level))) + (0.5f - (float)(1 << (level - 1)));
    const float share = p.shares[(i64)(index + 1) * p.inputs + column];
    off = weight - part * (p.gain[index] / (float)(1 << (level - 1))) * span;
    read += share * off;
    square += share * off * off;
  }
}

AS_KERNEL(128, 1) rounding_kernel(AS_PARAMETER Rounding p) {
  AS_SHARED;
  wait_beside();
  float* const mine = shared + threadIdx.x;  // [columns], a block's size apart
  const int output = blockIdx.x * blockDim.x + threadIdx.x, apart = blockDim.x;
  if (output >= p.out) return;
  for (int i = 0; i < p.columns; ++i) mine[i * apart] = p.rest[(i64)(p.begin + i) * p.out + output];
  for (int i = 0; i < p.columns; ++i) {
    const int column = p.begin + i;
    const i64 at = (i64)column * p.out + output;
    const float span = half_range_of(p, column, output);
    const float* const feedback = p.matrix + (i64)column * p.inputs + p.begin;
    const float value = mine[i * apart], code = nearest_code(p, span, value);
    float error, off, square;
    code_errors(p, column, span, p.weight[at], code, error, off, square);
    p.codes[at] = (unsigned char)code;
    p.errors[(i64)i * p.out + output] = error;
    p.rest[at] = value;
    for (int k = i + 1; k < p.columns; ++k) mine[k * apart] += feedback[k] * error;
  }
}

AS_KERNEL(128, 1) descent_kernel(AS_PARAMETER Rounding p) {
  AS_SHARED;
  wait_beside();
  const int output = blockIdx.x * blockDim.x + threadIdx.x, apart = blockDim.x;
  float* const read_pull = shared + threadIdx.x;  // [columns], a block's size apart
  float* const whole_pull = read_pull + p.columns * apart;
  if (output >= p.out) return;
  for (int i = 0; i < p.columns; ++i) {
    read_pull[i * apart] = p.errors[(i64)i * p.out + output];
    whole_pull[i * apart] = p.pull[(i64)i * p.out + output];
  }
  const float decoding = 1.0f - p.prompts, most = (float)((1 << p.stored) - 1);
  for (int i = 0; i < p.columns; ++i) {
    const int column = p.begin + i;
    const i64 at = (i64)column * p.out + output;
    const float span = half_range_of(p, column, output);
    const float* const hessian = p.matrix + (i64)column * p.inputs + p.begin;
    const float own = hessian[i], weight = p.weight[at], read = p.as_read[at], whole = p.whole[at];
    const float read_slope = decoding * (read_pull[i * apart] - own * read);
    const float whole_slope = p.prompts * (whole_pull[i * apart] - own * whole);
    const float stood = weight + (read_slope + whole_slope) / own, middle = nearest_code(p, span, stood);
    // The present code first: another has to be better.
    float best = (float)p.codes[at], least = as_float(0x7f800000u), best_read = read, best_whole = whole;
    const float present = best;
    for (int step = -4; step <= 3; ++step) {
      const float code = step < -3 ? present : fminf(fmaxf(middle + (float)step, 0.0f), most);
      float now, off, square;
      code_errors(p, column, span, weight, code, now, off, square);
      const float cost =
          own * (decoding * square + p.prompts * off * off) + 2.0f * (read_slope * now + whole_slope * off);
      if (cost < least) least = cost, best = code, best_read = now, best_whole = off;
    }
    p.codes[at] = (unsigned char)best;
    p.as_read[at] = best_read;
    p.whole[at] = best_whole;
    p.rest[at] = stood;
    for (int k = i + 1; k < p.columns; ++k) {
      read_pull[k * apart] += hessian[k] * (best_read - read);
      whole_pull[k * apart] += hessian[k] * (best_whole - whole);
    }
  }
}
