// Choice of instruction set, scratch memory.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <errno.h>
#include <sys/mman.h>
#endif

#include <atomic>
#include <new>
#include <string>

#include "graded.h"
#include "internal.h"
#include "many.h"

namespace actsparse {
namespace {

bool runs_here(const IsaOps* isa) {
  if (!isa) return false;
#if defined(__x86_64__)
  if (isa == isa_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  // Every CPU with AVX2 and FMA has F16C; older compilers cannot ask for it by name.
  if (isa == isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

#if defined(__x86_64__)
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // products, and the tiles themselves
}

bool has_avxvnni() {  // older compilers cannot ask for it by name either; its registers are AVX2's
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

constexpr int isa_kinds = 4;
const IsaOps* isa_at(int i) {  // best first
  const IsaOps* const all[isa_kinds] = {isa_avx512, isa_avx2, isa_neon, isa_scalar};
  return runs_here(all[i]) ? all[i] : nullptr;
}

std::atomic<const IsaOps*> selected{nullptr};

// Intel's second cache follows what is read on some 48 pages at a time, with two to three times as many requests under way as
// a core has for its instructions. Measured on Xeons with AMX; AMD's cores are not known to gain.
int32_t pages_of_this_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return 42;
#endif
  return 0;
}

std::atomic<int32_t> pages{pages_of_this_machine()};

char* aligned(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  return static_cast<char*>(p);
}

}  // namespace

const IsaOps& ops() {
  const IsaOps* isa = selected.load(std::memory_order_relaxed);
  if (!isa) {
    for (int i = 0; i < isa_kinds && !isa; ++i) isa = isa_at(i);
    selected.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

const GradedOps& graded_ops() {
  const IsaOps* const isa = &ops();
#if defined(__x86_64__)
  if (isa == isa_avx512 && graded_avx512 && __builtin_cpu_supports("avx512vnni")) return *graded_avx512;
  if (isa == isa_avx512 || isa == isa_avx2) {
    static const bool vnni = has_avxvnni();
    if (vnni && graded_avxvnni) return *graded_avxvnni;
    if (graded_avx2) return *graded_avx2;
  }
#endif
  return isa == isa_neon && graded_neon ? *graded_neon : *graded_scalar;
}

int64_t pages_followed() { return pages.load(std::memory_order_relaxed); }

const ManyOps* many_ops() {
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_supports("avx512bf16");
  static const ManyOps* const tiles = here && has_amx_bf16() ? many_amx() : nullptr;
  if (here && &ops() == isa_avx512) return tiles ? tiles : many_bf16;
#endif
  return nullptr;
}

const BatchOps* batch_ops() {
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_supports("avx512bf16");
  if (here && &ops() == isa_avx512) return batch_bf16;
#endif
  return nullptr;
}

Arena::~Arena() {
  free(block_);
  for (char* p : spilled_) free(p);
}

void Arena::reset() {
  used_ = 0;
  if (spilled_.empty()) return;
  for (char* p : spilled_) free(p);
  spilled_.clear();
  const size_t wanted = capacity_ + spilled_bytes_;
  spilled_bytes_ = 0;
  free(block_);
  block_ = nullptr;
  capacity_ = 0;
  block_ = aligned(wanted);
  capacity_ = wanted;
}

void* Arena::take_bytes(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64 + 64;
  if (used_ + bytes <= capacity_) {
    used_ += bytes;
    return block_ + used_ - bytes;
  }
  spilled_.reserve(spilled_.size() + 1);
  char* const p = aligned(bytes);
  spilled_.push_back(p);
  spilled_bytes_ += bytes;
  return p;
}

Arena& arena() {
  static thread_local Arena a;
  return a;
}

}  // namespace actsparse

using namespace actsparse;

int32_t as_abi_version(void) { return AS_ABI_VERSION; }

const char* as_isa_available(void) {
  static const std::string names = [] {
    std::string s;
    for (int i = 0; i < isa_kinds; ++i)
      if (const IsaOps* isa = isa_at(i)) s += (s.empty() ? "" : ",") + std::string(isa->name);
    return s;
  }();
  return names.c_str();
}

const char* as_isa(void) { return ops().name; }

int32_t as_isa_select(const char* name) {
  if (!name) return AS_EINVAL;
  for (int i = 0; i < isa_kinds; ++i) {
    const IsaOps* const isa = isa_at(i);
    if (isa && strcmp(isa->name, name) == 0) {
      selected.store(isa);
      return AS_OK;
    }
  }
  return AS_EINVAL;
}

int32_t as_pages_followed(void) { return int32_t(pages_followed()); }

int32_t as_pages_select(int32_t n) {
  if (n < 0 || n > 256) return AS_EINVAL;
  pages.store(n);
  return AS_OK;
}

int64_t as_huge_pages(const void* data, int64_t bytes) {
  int64_t moved = 0;
#if defined(__linux__)
  constexpr int collapse = 25;  // MADV_COLLAPSE: the C library may be older than the kernel that has it
  constexpr uintptr_t page = 2u << 20, chunk = 32 * page;
  if (!data || bytes <= 0) return 0;
  // Only pages that the range fills: what lies around it is someone else's.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  const auto move = [](uintptr_t at, uintptr_t size) { return madvise(reinterpret_cast<void*>(at), size, collapse) == 0; };
  for (uintptr_t at = begin; at < end; at += chunk) {
    // Many pages a call, because each call makes every CPU drain its page lists; one by one only where some could not move.
    const uintptr_t size = end - at < chunk ? end - at : chunk;
    if (move(at, size)) {
      moved += int64_t(size);
      continue;
    }
    if (errno == EINVAL || errno == ENOMEM) break;  // unsupported here, or no huge page left
    for (uintptr_t one = at; one < at + size; one += page)
      if (move(one, page)) moved += int64_t(page);
  }
#else
  (void)data;
  (void)bytes;
#endif
  return moved;
}
