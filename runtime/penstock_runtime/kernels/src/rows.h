// Formulas of a row by itself, for those who compute them as a pass of their own (rows.cpp) or on the
// way into a matrix product (linear.cpp): the same bits in both.
#pragma once

#include <cmath>

#include "vector.h"

namespace penstock {

PENSTOCK_INLINE float inverse_rms(const float* x, long columns, float epsilon) {
  Vec sum = splat16(0.0f);
  for (long i = 0; i < columns; i += kLanes) {
    const Vec v = load_some(x + i, columns - i);
    sum = fma(v, v, sum);
  }
  return 1.0f / std::sqrt(sum_lanes(sum) / static_cast<float>(columns) + epsilon);
}

// x · sigmoid(x) = x / (1 + exp(-x)), where the exponential is kept finite: beyond, the quotient is x, or less
// than 2e-36 in magnitude.
PENSTOCK_INLINE Vec silu(const Vec& x) {
  const Vec least = max(x, splat16(-87.0f));
  const Vec exponent = max(least * splat16(-0x1.715476p+0f), splat16(-126.0f));
  return least / (splat16(1.0f) + exp2_less(exponent, splat(kShifter), exp2_of_fraction));
}

// Lanes [i, i + 16) of x / rms(x) · weight.
PENSTOCK_INLINE Vec normed(const float* x, float inverse, const float* weight, long i, long columns) {
  return load_some(x + i, columns - i) * splat16(inverse) * load_some(weight + i, columns - i);
}

// Lanes [i, i + 16) of silu(gate) · up, which lie one behind the other in x.
PENSTOCK_INLINE Vec gated(const float* x, long i, long columns) {
  return silu(load_some(x + i, columns - i)) * load_some(x + columns + i, columns - i);
}

}  // namespace penstock
