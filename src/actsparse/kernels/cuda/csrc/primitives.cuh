// What the kernels need of the hardware.  Compiled by NVRTC without headers; with ACTSPARSE_EMULATE by a C++ compiler, whose
// stand-ins for these few functions (the tests' emulator) run the same kernels on a CPU.
//
// Set by the compiling side: AS_DTYPE (1 bfloat16, 2 float16), AS_ROWS (rows of x: 1, 2, 4 or 8), AS_HEAD_DIM (channels of an
// attention head), AS_RING (16-byte copies that a thread of a product has under way), AS_LOT (values of keys that a block of
// the attention kernel holds at a time).
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct alignas(16) Vec8 {
  u32 w[4];
};

#ifndef ACTSPARSE_EMULATE
#define AS_DEVICE __device__ __forceinline__
#define AS_MEMBER __device__ __forceinline__
#define AS_CALLED __device__ __noinline__
#define AS_KERNEL(threads, blocks) extern "C" __global__ __launch_bounds__(threads, blocks) void

AS_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

AS_DEVICE int hidden(int v) {  // from the compiler, which value it is
  asm volatile("" : "+r"(v));
  return v;
}

template <class T>
AS_DEVICE T* hidden(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

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

// sum += a b: a 16 by 8, b 8 by 8, one matrix a warp.  Lane 4 g + c gives a[g, c], a[g + 8, c], a[g, c + 4], a[g + 8, c + 4] and
// b[c, g], b[c + 4, g], of each the sign, exponent and first ten bits; it holds sum[g, 2 c], [g, 2 c + 1], and those of g + 8.
AS_DEVICE void multiply_heads(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
AS_DEVICE float head_of(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// 16 bytes from global to shared memory, under way while the thread goes on.  A thread waits for its own copies: all but the
// last PENDING groups of them.
AS_DEVICE void copy_async(void* to, const void* from) {
  const u32 at = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// Weights: zeros without reading, or what the second-level cache is to give up first, because it is not read again before the
// next token; so it keeps what is: norms, thresholds, keys and values, instructions.
AS_DEVICE void copy_or_zero(void* to, const void* from, bool there) {
  const u32 at = (u32)__cvta_generic_to_shared(to), bytes = there ? 16 : 0;
  u64 once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(at), "l"(from), "r"(bytes), "l"(once)
               : "memory");
}
AS_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
AS_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Programmatic dependent launch.  What earlier kernels wrote may be read after the wait.  The next kernel is let in only then:
// the one before has left by that time and none of this one's blocks has, so that every multiprocessor has exactly one place
// free.  Blocks let in earlier or later met unevenly: some multiprocessors had two, and a step took 4.06 ms instead of 3.21.
AS_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Beside the kernel before, which has waited for itself when this one begins, and on nothing of which it depends: the next one
// is let in at once, to take the places that the one before leaves; this one leaves after that.
AS_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

AS_DEVICE void wait_beside() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A block without work keeps its place until the next kernel's blocks have found theirs: about four microseconds.
AS_DEVICE void linger(int cycles = 8000) {
#if __CUDA_ARCH__ >= 900
  const long long until = clock64() + cycles;
  while (clock64() < until) __nanosleep(100);
#endif
}

// Brings what will be read in the end into L2; nothing for null.
AS_DEVICE void touch(const float* from, int at) {
  if (from) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
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

// Where share `number` of `shares` begins among so many: below 2^32 / shares.
AS_DEVICE int share_of(int total, int number, int shares) { return (int)((u32)total * (u32)number / (u32)shares); }

AS_DEVICE float absolute(float v) { return fabsf(v); }

// Same codes as the CPU kernels: silu, relu, relu2, gelu, gelu_tanh, identity.
// Called rather than inlined: a block's instructions have to come from L2, too.  Comparisons that hide from each other rather
// than a switch: that jumps by a table in memory, and everything in memory is a microsecond away, weights having driven it out.
AS_CALLED float activate(int code, float v) {
  if (hidden(code) == 0) return v / (1.0f + expf(-v));
  if (hidden(code) == 1) return v > 0.0f || v != v ? v : 0.0f;
  if (hidden(code) == 2) return v > 0.0f || v != v ? v * v : 0.0f;
  if (hidden(code) == 3) return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  if (hidden(code) == 4) return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
  return v;
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
