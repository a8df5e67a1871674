// The rows of a tile rounded to bfloat16, in words of two, interleaved: word i of all rows, then the next one.
#pragma once

#include <algorithm>

#include "vector.h"

namespace penstock {

constexpr int kRowsTogether = 4;  // whose words are written side by side

template <int R, class Begin, class Lanes>
PENSTOCK_INLINE void write_rows(uint32_t* to, int rows, int r, long first, long last, long elements,
                                const Begin& begin, const Lanes& lanes) {
  _Pragma("GCC unroll 4") for (int i = 0; i < R; i++) begin(r + i);
  for (long k = first; k < last; k += kLanes) {
    uint32_t pairs[R][kLanes / 2];
    _Pragma("GCC unroll 4") for (int i = 0; i < R; i++) {
      narrow16(lanes(r + i, k), reinterpret_cast<bf16*>(pairs[i]));
    }
    const long count = std::min<long>(kLanes, elements - k) / 2;
    uint32_t* block = to + k / 2 * rows + r;
    if constexpr (R == kRowsTogether) {
      if (count == kLanes / 2) {
        store_side_by_side(pairs, block, rows);
        continue;
      }
    }
    for (long n = 0; n < count; n++) {
      for (int i = 0; i < R; i++) block[n * rows + i] = pairs[i][n];
    }
  }
}

// Writes the elements [first, last) of `rows` rows that have `elements`, an even number; `first` is a multiple
// of 16. Of each row `begin(row)` is called, and then `lanes(row, k)` returns 16 elements from k on.
template <class Begin, class Lanes>
void write_words(uint32_t* to, int rows, long first, long last, long elements, const Begin& begin,
                 const Lanes& lanes) {
  int r = 0;
  for (; r + kRowsTogether <= rows; r += kRowsTogether) {
    write_rows<kRowsTogether>(to, rows, r, first, last, elements, begin, lanes);
  }
  for (; r < rows; r++) write_rows<1>(to, rows, r, first, last, elements, begin, lanes);
}

}  // namespace penstock
