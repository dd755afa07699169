// Runs the CUDA kernels on a CPU, one block after another, every thread of a block a coroutine: slow, and exact about what
// is read and written.  Shared memory starts as NaN.
#define ACTSPARSE_EMULATE
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

struct Dim {
  unsigned x, y, z;
};
struct float4 {
  float x, y, z, w;
};
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Dim threadIdx, blockIdx, blockDim, gridDim;

// Copies arrive at the last moment: what is used before its wait is still NaN, and what was overwritten too early is wrong.
struct Copy {
  void* to;
  const void* from;
  unsigned group;
};
struct Copies {
  unsigned group = 0;
  std::vector<Copy> waiting;
};
static std::vector<Copies> copies;

namespace emulate {
struct Barrier {
  unsigned arrived = 0, generation = 0;
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
static std::vector<Thread> threads;
static std::vector<Barrier> warps;
static Barrier block;
static unsigned alive, current;
static std::vector<uint32_t> slots;
static std::vector<float> memory;
static ucontext_t scheduler;
static std::function<void()> body;

static void yield() { swapcontext(&threads[current].context, &scheduler); }

static void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

static void wait_warp() { wait(warps[current / 32], 32); }

static void start() {
  body();
  threads[current].done = true;
  --alive;
  yield();
}

static void run_block(unsigned count) {
  threads.resize(count);
  warps.assign(count / 32, Barrier());
  slots.assign(count, 0);
  block = Barrier();
  alive = count;
  for (Thread& thread : threads) {
    thread.done = false;
    thread.stack.resize(128 * 1024);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, start, 0);
  }
  while (alive)
    for (unsigned t = 0; t < count; ++t) {
      if (threads[t].done) continue;
      current = t;
      threadIdx = {t, 0, 0};
      swapcontext(&scheduler, &threads[t].context);
    }
}

static uint32_t exchange(uint32_t value, unsigned from) {
  slots[current] = value;
  wait_warp();
  const uint32_t got = slots[current / 32 * 32 + from];
  wait_warp();
  return got;
}

template <class P>
void launch(void (*kernel)(P), const P* p, unsigned x, unsigned y, unsigned count, unsigned shared_bytes) {
  gridDim = {x, y, 1};
  blockDim = {count, 1, 1};
  for (unsigned j = y; j-- > 0;)
    for (unsigned i = 0; i < x; ++i) {
      blockIdx = {i, j, 0};
      copies.assign(count, {});
      memory.assign(shared_bytes / 4 + 4, std::numeric_limits<float>::quiet_NaN());
      body = [&] { kernel(*p); };
      run_block(count);
    }
}

static float* shared_memory() {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) & ~uintptr_t(15));
}
}  // namespace emulate

static void __syncthreads() { emulate::wait(emulate::block, emulate::alive); }
static void __syncwarp() { emulate::wait_warp(); }
static void __threadfence() {}
static float __shfl_xor_sync(uint32_t, float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulate::exchange(bits, (threadIdx.x & 31) ^ mask);
  std::memcpy(&value, &bits, 4);
  return value;
}
static int __shfl_xor_sync(uint32_t, int value, int mask) {
  return emulate::exchange(value, (threadIdx.x & 31) ^ mask);
}
static int __shfl_sync(uint32_t, int value, int from) { return emulate::exchange(value, from); }
static int __shfl_up_sync(uint32_t, int value, int offset) {
  const int lane = threadIdx.x & 31;
  return emulate::exchange(value, lane >= offset ? lane - offset : lane);
}
static uint32_t __ballot_sync(uint32_t, bool set) {
  emulate::slots[emulate::current] = set;
  emulate::wait_warp();
  uint32_t all = 0;
  for (int i = 0; i < 32; ++i) all |= emulate::slots[emulate::current / 32 * 32 + i] << i;
  emulate::wait_warp();
  return all;
}
static uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  emulate::slots[emulate::current] = value;
  emulate::wait_warp();
  uint32_t most = 0;
  for (int i = 0; i < 32; ++i) most = std::max(most, emulate::slots[emulate::current / 32 * 32 + i]);
  emulate::wait_warp();
  return most;
}
static uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  emulate::slots[emulate::current] = value;
  emulate::wait_warp();
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += emulate::slots[emulate::current / 32 * 32 + i];
  emulate::wait_warp();
  return sum;
}
static int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
static uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}
static int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
static float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

#define AS_DEVICE static inline
#define AS_MEMBER inline
#define AS_CALLED static
#define AS_KERNEL(threads, blocks) static void
#define AS_PARAMETER const
#define AS_SHARED float* const shared = emulate::shared_memory()

AS_DEVICE int hidden(int v) { return v; }
template <class T>
AS_DEVICE T* hidden(T* p) {
  return p;
}
AS_DEVICE void touch(const float*, int) {}
AS_DEVICE float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
AS_DEVICE float half_to_float(uint32_t bits) {
  _Float16 h;
  const uint16_t low = bits;
  std::memcpy(&h, &low, 2);
  return h;
}
AS_DEVICE void widen2(uint32_t pair, float& low, float& high) {
#if AS_DTYPE == 1
  low = as_float(pair << 16);
  high = as_float(pair & 0xffff0000u);
#else
  low = half_to_float(pair & 0xffffu);
  high = half_to_float(pair >> 16);
#endif
}
AS_DEVICE uint16_t narrow(float value) {
#if AS_DTYPE == 1
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
#else
  const _Float16 h = value;
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
#endif
}
AS_DEVICE void wait_for_previous() {}
AS_DEVICE void let_next_start() {}
AS_DEVICE void wait_beside() {}
AS_DEVICE void linger(int = 0) {}
AS_DEVICE void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) __builtin_trap();
  Copies& mine = copies[emulate::current];
  mine.waiting.push_back({to, from, mine.group});
}
AS_DEVICE void copy_or_zero(void* to, const void* from, bool there) {
  static const float zeros[8] = {};  // at least one piece of it lies on 16 bytes
  const uintptr_t zero = (reinterpret_cast<uintptr_t>(zeros) + 15) & ~uintptr_t(15);
  copy_async(to, there ? from : reinterpret_cast<const void*>(zero));
}
AS_DEVICE void close_copies() { ++copies[emulate::current].group; }
template <int PENDING>
AS_DEVICE void wait_for_copies() {
  Copies& mine = copies[emulate::current];
  size_t kept = 0;
  for (const Copy& copy : mine.waiting)
    if (copy.group + PENDING < mine.group)
      std::memcpy(copy.to, copy.from, 16);
    else
      mine.waiting[kept++] = copy;
  mine.waiting.resize(kept);
}
AS_DEVICE void prefetch(const void*, uint32_t bytes) {
  if (bytes % 16) __builtin_trap();
}

AS_DEVICE long long to_steps(float v) { return std::llrint(v); }
AS_DEVICE long long load_sum(const long long* at) { return *at; }
AS_DEVICE void add_steps(long long* at, long long steps) { *at += steps; }
AS_DEVICE long long add_and_get(long long* at, long long steps) {
  const long long before = *at;
  *at += steps;
  return before;
}
AS_DEVICE void put_steps(long long* at, long long steps) { *at = steps; }

#include "matrix.h"
#include "primitives.cuh"
#include "sums.cuh"
#include "selection.cuh"
#include "rows.cuh"
#include "columns.cuh"
#include "several.cuh"
#include "sixteen.cuh"
#include "attention.cuh"
#include "depths.cuh"
#include "planes.cuh"
#include "unpack.cuh"
#include "rounding.cuh"
#include "cut.cuh"
#include "cores.cuh"

#define LAUNCHER(name, P)                                                                                     \
  extern "C" void name(const void* p, unsigned x, unsigned y, unsigned threads, unsigned shared) {            \
    emulate::launch<const P>(name##_kernel, static_cast<const P*>(p), x, y, threads, shared);                 \
  }
LAUNCHER(rows, Rows)
LAUNCHER(columns, Columns)
LAUNCHER(finish, Finish)
LAUNCHER(attention, Attention)
LAUNCHER(embedding, Embedding)
LAUNCHER(planes, Planes)
LAUNCHER(unpack, Unpack)
LAUNCHER(rounding, Rounding)
LAUNCHER(descent, Rounding)
LAUNCHER(cut, Cut)
LAUNCHER(levels, Levels)
LAUNCHER(cores, Cores)
