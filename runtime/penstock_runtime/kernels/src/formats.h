// What a task of attention multiplies: float32, widened from what lies in the pages, or pairs of
// bfloat16 as they lie there, with queries and weights rounded to bfloat16.
#pragma once

#include "tile.h"
#include "transpose.h"
#include "words.h"

namespace penstock {

template <class T>
struct Widened {
  using Element = T;    // in the pages
  using Factor = float; // of queries and weights
  using Panel = float;  // of packed keys and values
  static constexpr long kPerFactor = 1;  // elements in one Factor

  // q of the rows that are multiplied at a time, scaled, side by side; `begin(row)` returns where a row is.
  template <class Begin>
  static void queries(int rows, const Begin& begin, float scale, long dims, float* to) {
    for (int r = 0; r < rows; r++) {
      const float* from = begin(r);
      for (long i = 0; i < dims; i++) to[i * rows + r] = from[i] * scale;
    }
  }

  // Keys of 16 tokens. `meanwhile()` is called for every eighth dim.
  template <class Rows, class Meanwhile>
  static void keys(const Rows& rows, long dims, float* to, const Meanwhile& meanwhile) {
    transpose_panel(rows, dims, to, meanwhile);
  }

  // Values of whole panels of tokens; `panel`: from one panel of columns to the next.
  static void values(const T* const* rows, long tokens, long dims, float* to, long panel) {
    for (long t = 0; t < tokens; t++) {
      for (long c = 0; c < dims; c += kLanes) {
        widen_some(rows[t] + c, dims - c, to + c / kLanes * panel + t * kLanes);
      }
    }
  }

  // As exact as weights are, see exp2_less.
  PENSTOCK_INLINE static Vec exponential(const Vec& x, const Native& shifter) {
    return exp2_less(x, shifter, exp2_of_fraction);
  }

  // Leaves the weights of the tokens [16 · p, 16 · p + 32) of a row, and adds them to 16 sums.
  PENSTOCK_INLINE static void weights(float* row, long p, const Vec& first, const Vec& second, Vec& sum) {
    store16(row + p * kLanes, first);
    store16(row + (p + 1) * kLanes, second);
    sum = sum + first + second;
  }
};

struct Paired {
  using Element = bf16;
  using Factor = uint32_t;
  using Panel = bf16;
  static constexpr long kPerFactor = 2;

  template <class Begin>
  static void queries(int rows, const Begin& begin, float scale, long dims, uint32_t* to) {
    const float* from[kMaxRows];
    const Vec by = splat16(scale);
    write_words(to, rows, 0, dims, dims, [&](int r) { from[r] = begin(r); },
                [&](int r, long k) { return load_some(from[r] + k, dims - k) * by; });
  }

  template <class Rows, class Meanwhile>
  static void keys(const Rows& rows, long dims, bf16* to, const Meanwhile& meanwhile) {
    transpose_word_panel(rows, dims, reinterpret_cast<uint32_t*>(to), meanwhile);
  }

  static void values(const bf16* const* rows, long tokens, long dims, bf16* to, long panel) {
    for (long t = 0; t < tokens; t += 2) {
      const bf16 *first = rows[t], *second = rows[t + 1];
      for (long c = 0; c < dims; c += kLanes) {
        Bits words[kParts];
        bf16 low[kLanes] = {}, high[kLanes] = {};
        if (dims - c < kLanes) {
          std::memcpy(low, first + c, static_cast<size_t>(dims - c) * sizeof(bf16));
          std::memcpy(high, second + c, static_cast<size_t>(dims - c) * sizeof(bf16));
          pair_rows<1>(low, high, words);
        } else {
          pair_rows<1>(first + c, second + c, words);
        }
        std::memcpy(to + c / kLanes * panel + t * kLanes, words, sizeof words);
      }
    }
  }

  PENSTOCK_INLINE static Vec exponential(const Vec& x, const Native& shifter) {
    return exp2_less(x, shifter, exp2_of_fraction_coarsely);
  }

  // What is added is what values are multiplied by: the rounded weights.
  PENSTOCK_INLINE static void weights(uint32_t* row, long p, const Vec& first, const Vec& second,
                                      Vec& sum) {
    const Bits ones = splat_bits(0x3f803f80u);
    Bits words[kParts];
    narrow32(first, second, words);
    PENSTOCK_EACH(i) {
      store_bits(row + p * kLanes / 2 + i * kWidth, words[i]);
      sum.part[i] = dot_pairs(sum.part[i], words[i], ones);
    }
  }
};

}  // namespace penstock
