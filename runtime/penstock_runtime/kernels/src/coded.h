// Weights of bfloat16 in 12 bits an element, without loss: few rows' products take as long as reading
// their weights, so they take that much less.
//
// The lower byte of an element, an exponent's last bit and the mantissa, could be anything and is kept.
// The upper byte, sign and exponent, is one of a few in a matrix whose elements are alike: the 16 most
// frequent of two panels together are in a table, and four bits say which it is.
//
// Units hold 4 k's of two panels, in the layout that an instruction makes words of (`interleave`): byte
// 16 · (column / 4) + 8 · panel + 2 · (column % 4) + k % 2 of a block of 64, for two k's each
//   uppers   [64] bytes: places in the table, of the first two k's in the lower half of a byte
//   lows     [2][64] bytes
// Some units have an element that is not in the table: such a one is not coded, it lies between the
// others as in `Packed`. The numbers of those of two panels, rising, with kNoUnit behind them, lie in front
// of the units: so all that is read of a matrix is one run of addresses, which the processor reads ahead.
#pragma once

#include <algorithm>

#include "tile.h"

namespace penstock {

constexpr long kUnitRows = 4;
constexpr long kUnitElements = kUnitRows * kPackedColumns;
constexpr long kLows = kUnitElements / 2;  // where they begin in a unit
constexpr long kUnitBytes = kUnitElements + kUnitElements / 2;
constexpr long kPlainBytes = 2 * kUnitElements;  // of one that is not coded
constexpr long kUpperBytes = 16;
constexpr int32_t kNoUnit = INT32_MAX;

// Two panels: where they lie, in bytes from here.
struct CodedPair {
  int64_t numbers_at, units_at;
  uint8_t uppers[kUpperBytes];

  const int32_t* numbers() const { return reinterpret_cast<const int32_t*>(from(numbers_at)); }
  const char* units() const { return from(units_at); }

 private:
  const char* from(int64_t bytes) const { return reinterpret_cast<const char*>(this) + bytes; }
};

// What is read next is asked for into the second level, and when it is nearer into the first. Measured: one
// without the other leaves products of 8 and more rows waiting. For a few rows the processor itself reads
// ahead, and better than when it is asked.
constexpr long kAhead = 64 * kUnitBytes, kAheadNear = 20 * kUnitBytes;
constexpr int kFewCodedRows = 3;

// B of a tile of two panels. Every tile decodes for itself: from 4 rows on that takes no time, for the
// processor has other parts for it than for products.
struct Coded {
  static constexpr bool kFar = true;

  const CodedPair* pair;
  long ahead;  // in bytes, of what is asked for

  // What tells where the next ones lie.
  PENSTOCK_INLINE void begin() const { __builtin_prefetch(pair + 2, 0, 3); }

  // What is so far behind a unit. Inlined by force: of a function that does nothing else g++ drops the calls.
  PENSTOCK_INLINE void ask(const char* unit, long bytes) const {
    for (long line = 0; line < bytes; line += kLine) {
      __builtin_prefetch(unit + ahead + line, 0, 2);
      __builtin_prefetch(unit + kAheadNear + line, 0, 3);
    }
  }
};

// Calls `take(half, words)` for the two halves of a unit.
template <class Take>
PENSTOCK_INLINE void decode(const char* unit, const Table& table, const Take& take) {
  _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {
    Bits words[2 * kParts];
    PENSTOCK_EACH(i) {
      const Bits places = load_bits(unit + i * 4 * kWidth) >> (4 * half);
      const Bits lows = load_bits(unit + kLows + half * kLine + i * 4 * kWidth);
      interleave(lows, look_up(table, places), words + i, words + kParts + i);
    }
    take(half, words);
  }
}

// The same for one that is not coded.
template <class Take>
PENSTOCK_INLINE void read_plain(const char* unit, const Take& take) {
  _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {
    Bits words[2 * kParts];
    _Pragma("GCC unroll 4") for (int c = 0; c < 2 * kParts; c++) {
      words[c] = load_bits(unit + half * 2 * kLine + c * 4 * kWidth);
    }
    take(half, words);
  }
}

template <int R, int P, class A, class Done>
PENSTOCK_INLINE void multiply(const A& a, Coded b, long k, Accumulators<R, P>& acc, const Done& done) {
  static_assert(P == 2);
  const Table table = load_table(b.pair->uppers);
  const char* unit = b.pair->units();
  const int32_t* plain = b.pair->numbers();
  const long last = k / kUnitRows - 1;
  long u = 0;
  const auto add = [&](int half, const Bits(&words)[2 * kParts]) {
    if constexpr (R > kFewCodedRows) a.template ask<R>(2 * u + half);
    add_pairs(a, 2 * u + half, words, acc);
  };
  for (;; plain++) {
    for (const long stop = std::min<long>(last, *plain); u < stop; u++) {
      if constexpr (R > kFewCodedRows) b.ask(unit, kUnitBytes);
      decode(unit, table, add);
      unit += kUnitBytes;
    }
    if (u == last) break;
    if constexpr (R > kFewCodedRows) b.ask(unit, kPlainBytes);
    read_plain(unit, add);
    unit += kPlainBytes;
    u++;
  }
  Bits words[2][2 * kParts];
  const auto take = [&](int half, const Bits(&from)[2 * kParts]) {
    PENSTOCK_COLUMNS words[half][c] = from[c];
  };
  if (*plain == last) {
    read_plain(unit, take);
  } else {
    decode(unit, table, take);
  }
  end_pairs(a, 2 * last, words, acc, done);
}

}  // namespace penstock
