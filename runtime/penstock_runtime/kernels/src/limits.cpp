// What the machine can do at most, measured with the threads that the kernels use.
#include <omp.h>

#include "kernels.h"
#include "vector.h"

using namespace penstock;

namespace {

constexpr int kChains = 12;  // enough to hide the latency of a multiply-add

// Different in every chain, or the compiler would see that all are one.
PENSTOCK_INLINE void start(Native (&chain)[kChains]) {
  for (int i = 0; i < kChains; i++) chain[i] = splat(static_cast<float>(i));
}

PENSTOCK_INLINE void sink_sum(const Native (&chain)[kChains], float* sink) {
  float sum = 0;
  for (int i = 0; i < kChains; i++) sum += chain[i][0];
  if (sum == 42.0f) *sink = sum;
}

#if defined(__x86_64__)
#define PENSTOCK_OPAQUE(v) asm volatile("" : "+v"(v))
#else
#define PENSTOCK_OPAQUE(v) asm volatile("" : "+w"(v))
#endif

}  // namespace

double penstock_spin_products(int64_t repeats, float* sink) {
  const int threads = omp_get_max_threads();
#pragma omp parallel
  {
    Native chain[kChains], a = splat(1.0f);
    start(chain);
    for (int64_t n = 0; n < repeats; n++) {
      PENSTOCK_OPAQUE(a);
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; i++) chain[i] = fma(a, a, chain[i]);
    }
    sink_sum(chain, sink);
  }
  return 2.0 * kWidth * kChains * static_cast<double>(repeats) * threads;
}

double penstock_spin_pairs(int64_t repeats, float* sink) {
  const int threads = omp_get_max_threads();
#pragma omp parallel
  {
    Native chain[kChains];
    start(chain);
    Bits a = splat_bits(0x3f803f80u);
    for (int64_t n = 0; n < repeats; n++) {
      PENSTOCK_OPAQUE(a);
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; i++) chain[i] = dot_pairs(chain[i], a, a);
    }
    sink_sum(chain, sink);
  }
  return 4.0 * kWidth * kChains * static_cast<double>(repeats) * threads;
}

uint64_t penstock_read(const void* memory, int64_t bytes) {
  uint64_t total = 0;
  const char* base = static_cast<const char*>(memory);
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (int64_t block = 0; block < bytes / 256; block++) {
    Bits sum = {};
    _Pragma("GCC unroll 16") for (int i = 0; i < 256; i += 4 * kWidth) {
      sum += load_bits(base + block * 256 + i);
    }
    total += sum[0];
  }
  return total;
}
