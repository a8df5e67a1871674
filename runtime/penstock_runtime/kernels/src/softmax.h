// Running sums of attention: the maximum, the sum and the weighted values of what a row has seen so far.
//
// Weights are relative to the next whole number above the largest score, 2^(score - maximum): taking a whole
// number off costs nothing (exp2_less), it changes less often, and what was summed before is scaled by
// powers of two, without rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

namespace penstock {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Sums of a task's rows over some of their keys.
struct State {
  float* maximum;  // (rows,): whole numbers
  float* sum;      // (rows, 16): which keys' weights are in a lane follows from their positions
  float* out;      // (rows, value columns)

  static long floats(long rows, long columns) { return rows * (1 + kLanes + columns); }

  static State at(float* memory, long rows, long columns) {
    // What is read by whole registers comes first, so that it is aligned.
    return {memory + rows * (kLanes + columns), memory + rows * columns, memory};
  }

  void reset(long rows, long columns) const {
    reset_sums(rows);
    std::fill_n(out, rows * columns, 0.0f);
  }
  // All but the values, which will be stored.
  void reset_sums(long rows) const {
    std::fill_n(maximum, rows, kNone);
    std::fill_n(sum, rows * kLanes, 0.0f);
  }
};

// 2^(of - new_maximum): what sums relative to the maximum `of` count for.
PENSTOCK_INLINE float weight(float of, float new_maximum) {
  return of == kNone ? 0.0f : power_of_two(of - new_maximum);
}

PENSTOCK_INLINE void scale_row(float* row, long columns, float factor) {
  const Vec by = splat16(factor);
  for (long i = 0; i < columns; i += kLanes) store16(row + i, load16(row + i) * by);
}

// Of the first 16 · panels.
PENSTOCK_INLINE float largest(const float* scores, long panels) {
  // Two, that do not wait for each other.
  Vec highest = load16(scores), other = highest;
  for (long p = 1; p + 1 < panels; p += 2) {
    highest = max(highest, load16(scores + p * kLanes));
    other = max(other, load16(scores + (p + 1) * kLanes));
  }
  return max_lanes(max(max(highest, other), load16(scores + (panels - 1) * kLanes)));
}

// Turns the scores of one row, up to kKeyBlock, into weights; returns the factor for what was summed before.
// `weights` may be where the scores are. Of those that are not visible the weights are 0.
template <class Format>
PENSTOCK_INLINE float softmax_row(float* scores, typename Format::Factor* weights, long panels,
                                  long visible, float* maximum, float* sum) {
  const Vec zero = splat16(0.0f);
  Vec total = load16(sum);
  float factor = 1.0f;
  long p = 0;
  if (visible > 0) {
    const long seen = (visible + kLanes - 1) / kLanes;
    for (long i = visible; i < seen * kLanes; i++) scores[i] = kNone;
    const float before = *maximum, now = std::max(before, std::ceil(largest(scores, seen)));
    *maximum = now;
    if (before != now) {
      factor = weight(before, now);
      total = total * splat16(factor);
    }
    float whole = now;
    if (!(std::fabs(whole) < 0x1p+21f)) {
      for (long i = 0; i < visible; i++) scores[i] -= whole;
      whole = 0.0f;
    }
    const Native shifter = splat(kShifter - whole);
    const auto exponential = [&](long of) {
      return Format::exponential(load16(scores + of * kLanes), shifter);
    };
    for (; (p + 2) * kLanes <= visible; p += 2) {
      Format::weights(weights, p, exponential(p), exponential(p + 1), total);
    }
    if (p < seen) {
      const Vec first = first_lanes(exponential(p), visible - p * kLanes);
      const Vec second = p + 1 < seen ? first_lanes(exponential(p + 1), visible - (p + 1) * kLanes) : zero;
      Format::weights(weights, p, first, second, total);
      p += 2;
    }
  }
  for (; p < panels; p += 2) Format::weights(weights, p, zero, zero, total);
  store16(sum, total);
  return factor;
}

// Adds sums over later keys to `total`.
inline void merge(const State& total, const State& later, long rows, long columns) {
  for (long r = 0; r < rows; r++) {
    const float now = std::max(total.maximum[r], later.maximum[r]);
    const Vec old_weight = splat16(weight(total.maximum[r], now));
    const Vec new_weight = splat16(weight(later.maximum[r], now));
    total.maximum[r] = now;
    const auto add = [&](float* to, const float* from) {
      store16(to, fma(load16(from), new_weight, load16(to) * old_weight));
    };
    add(total.sum + r * kLanes, later.sum + r * kLanes);
    for (long i = 0; i < columns; i += kLanes) {
      add(total.out + r * columns + i, later.out + r * columns + i);
    }
  }
}

}  // namespace penstock
