// What the kernels need of the hardware.  Compiled by NVRTC without headers; with ACTSPARSE_EMULATE by a C++ compiler, whose
// stand-ins for these few functions (emulate.h in the tests) run the same kernels on a CPU.
//
// Set by the compiling side: AS_DTYPE (1 bfloat16, 2 float16), AS_ROWS (rows of x: 1, 2, 4 or 8), AS_GROUP (query heads that
// share a key/value head in one block).
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct alignas(16) Vec8 {
  u32 w[4];
};

#ifndef ACTSPARSE_EMULATE
#define AS_DEVICE __device__ __forceinline__
#define AS_KERNEL(threads, blocks) extern "C" __global__ __launch_bounds__(threads, blocks) void

AS_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

AS_DEVICE void widen2(u32 pair, float& low, float& high) {
#if AS_DTYPE == 1
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
#else
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(low), "=f"(high) : "r"(pair));
#endif
}

AS_DEVICE u16 narrow(float value) {
  u16 bits;
#if AS_DTYPE == 1
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

// Weights are read once a token: they should not push the activations out of L1.
AS_DEVICE Vec8 load_weights(const u16* at) {
  Vec8 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(at));
  return v;
}

// Programmatic dependent launch: the next kernel may start now; what earlier kernels wrote may be read from here on.
AS_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

AS_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings whole rows of weights into L2 before their turn; bytes a multiple of 16.
AS_DEVICE void prefetch(const void* at, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}
#define AS_SHARED extern __shared__ __align__(16) float shared[]
#define AS_PARAMETER const __grid_constant__
#endif

AS_DEVICE float absolute(float v) { return v < 0.0f ? -v : v; }

// Same codes as the CPU kernels: silu, relu, relu2, gelu, gelu_tanh, identity.
AS_DEVICE float activate(int code, float v) {
  switch (code) {
    case 0: return v / (1.0f + expf(-v));
    case 1: return v > 0.0f || v != v ? v : 0.0f;
    case 2: return v > 0.0f || v != v ? v * v : 0.0f;
    case 3: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case 4: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    default: return v;
  }
}

AS_DEVICE float warp_sum(float v) {
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Sum over the block, the same in every thread; scratch holds one float a warp.
AS_DEVICE float block_sum(float v, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? scratch[lane] : 0.0f);
  __syncthreads();
  return v;
}
