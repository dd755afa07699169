// Armv8 Advanced SIMD, with the dot product instruction where the compiler may use it.
#include <stddef.h>

#include "graded.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace actsparse {
namespace {
#include "graded_plain.inl"

struct Lanes {
  static constexpr int count = 1, fields_at_once = 4;
  static constexpr bool whole_bytes = false;
  using I = uint8x16_t;
  static int32x4_t wide(I a) { return vreinterpretq_s32_u8(a); }
  static I bytes(int32x4_t a) { return vreinterpretq_u8_s32(a); }
  static I zero() { return vdupq_n_u8(0); }
  static I load(const uint8_t* p) { return vld1q_u8(p); }
  static I load_part(const uint8_t* p, int) { return vld1q_u8(p); }
  static I zip_low8(I a, I b) { return vzip1q_u8(a, b); }
  static I zip_high8(I a, I b) { return vzip2q_u8(a, b); }
  static I zip_low16(I a, I b) { return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b))); }
  static I zip_high16(I a, I b) { return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b))); }
  static I mask(int byte) { return vdupq_n_u8(uint8_t(byte)); }
  static I both(I a, I b) { return vandq_u8(a, b); }
  static I right2(I a) { return vshrq_n_u8(a, 2); }
  static I right4(I a) { return vshrq_n_u8(a, 4); }
  static I select(I m, I a, I b) { return vbslq_u8(m, a, b); }
  static void coefficients(const uint8_t* const* mantissa, const int32_t* multiplier, const int32_t* centre, int64_t groups,
                           int32_t* out, int32_t* centres) {
    coefficients_of(mantissa, multiplier, 0, false, centre, groups, out, centres);
  }
  static I dot(I sum, I codes, I coefficients) {
    const int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_u8(coefficients);  // codes stay under 16
#if defined(__ARM_FEATURE_DOTPROD)
    return bytes(vdotq_s32(wide(sum), a, b));
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return bytes(vaddq_s32(wide(sum), vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
#endif
  }
  static I spread(const int32_t* p, int) { return bytes(vdupq_n_s32(p[0])); }
  static I left2(I a) { return bytes(vshlq_n_s32(wide(a), 2)); }
  static I left(I a, int bits) { return bytes(vshlq_s32(wide(a), vdupq_n_s32(bits))); }
  static I right4_signed(I a) { return bytes(vshrq_n_s32(wide(a), 4)); }  // of 32 bits
  static I sub(I a, I b) { return bytes(vsubq_s32(wide(a), wide(b))); }
  static I add(I a, I b) { return bytes(vaddq_s32(wide(a), wide(b))); }
  static I load_sums(const int32_t* p) { return bytes(vld1q_s32(p)); }
  static void store_sums(int32_t* p, I v) { vst1q_s32(p, wide(v)); }
};

#include "graded_vector.inl"

const GradedOps table = {"neon", grade_plain, add, unpack_plain};
}  // namespace

const GradedOps* const graded_neon = &table;
}  // namespace actsparse
#else
namespace actsparse {
const GradedOps* const graded_neon = nullptr;
}
#endif
