// Rounding a block of columns to nested codes, one after the other, with the error of each made good by those after it
// (methods/feedback.py).  Outputs do not depend on each other: a thread has one.
struct Rounding {
  float* rest;              // [I, O] what columns stand at
  const float* half_range;  // [I, G]
  const float* upper;       // [I, I]
  const float* shares;      // [L, I] of what is read, by level
  const float* gain;        // [L]
  unsigned char* codes;     // [I, O]
  float* errors;            // [columns, O]
  int inputs, out, groups, stored, begin, columns;
};

AS_KERNEL(128, 1) rounding_kernel(AS_PARAMETER Rounding p) {
  AS_SHARED;
  wait_beside();
  float* const mine = shared + threadIdx.x;  // [columns], a block's size apart
  const int output = blockIdx.x * blockDim.x + threadIdx.x, apart = blockDim.x;
  if (output >= p.out) return;
  for (int i = 0; i < p.columns; ++i) mine[i * apart] = p.rest[(i64)(p.begin + i) * p.out + output];
  const float half = (float)(1 << (p.stored - 1));
  for (int i = 0; i < p.columns; ++i) {
    const int column = p.begin + i;
    const float value = mine[i * apart], steps = p.half_range[(i64)column * p.groups + output / 64];
    const float* const upper = p.upper + (i64)column * p.inputs + p.begin;
    float code = floorf(value * (half / fmaxf(steps, 1e-30f)) + half);
    code = fminf(fmaxf(code, 0.0f), 2.0f * half - 1.0f);
    float read = 0.0f;
    for (int level = 2; level <= p.stored; level += 2) {
      const float part = floorf(code / (float)(1 << (p.stored - level))) + (0.5f - (float)(1 << (level - 1)));
      const int index = level / 2 - 1;
      read += part * (p.shares[(i64)index * p.inputs + column] * p.gain[index] / (float)(1 << (level - 1)));
    }
    const float error = (value - read * steps) / upper[i];
    p.codes[(i64)column * p.out + output] = (unsigned char)code;
    p.errors[(i64)i * p.out + output] = error;
    p.rest[(i64)column * p.out + output] = value;
    for (int k = i + 1; k < p.columns; ++k) mine[k * apart] -= upper[k] * error;
  }
}
