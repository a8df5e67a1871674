// The matrix product's inner loops: a few rows of A times a few panels of B, in registers.
//
// B lies in panels of 16 columns:
//   float     [panel][k][16]
//   bf16      [panel][k / 2][16][2]     two consecutive k of one column are one 32-bit word
// A's rows are float, or words of two bfloat16 where the product of pairs is used.
//
// Every element of C is one chain of fused multiply-adds over k in rising order, whatever the number
// of rows and panels beside it: so a row's bits do not depend on the batch. A caller that splits k
// does so at fixed places.
#pragma once

#include "vector.h"

namespace penstock {

enum class Into {
  store,     // C = A · B
  add,       // C = C + A · B: the chain starts at 0, and its end is added
  continue_  // the chain starts at C
};

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
constexpr long panels_for(long rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
constexpr long panels_for(long rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int kMaxRows = 6;
constexpr long panels_for(long rows) { return rows <= 2 ? 2 : 1; }
#endif

template <int R, int P>
struct Accumulators {
  Native at[R][P * kParts];
};

// How far ahead weights are asked for, in elements: 2 KB. Reading memory takes as long as a few dozen
// steps of a product.
constexpr long kAhead = 1024;
constexpr long kRowsAhead = 16;  // the same for rows in pages

#define PENSTOCK_ROWS _Pragma("GCC unroll 12") for (int r = 0; r < R; r++)
#define PENSTOCK_COLUMNS _Pragma("GCC unroll 8") for (int c = 0; c < P * kParts; c++)

// `panel`: elements from one panel of b to the next. `stride`: elements from one row of a to the
// next.
template <int R, int P>
PENSTOCK_INLINE void multiply(const float* a, long stride, const float* b, long panel, long k,
                              Accumulators<R, P>& acc) {
  for (long i = 0; i < k; i++) {
    Native column[P * kParts];
    PENSTOCK_COLUMNS column[c] = load(b + c / kParts * panel + i * kLanes + c % kParts * kWidth);
    PENSTOCK_ROWS {
      const Native x = splat(a[r * stride + i]);
      PENSTOCK_COLUMNS acc.at[r][c] = fma(x, column[c], acc.at[r][c]);
    }
  }
}

template <int R, int P>
PENSTOCK_INLINE void multiply(const float* a, long stride, const bf16* b, long panel, long k,
                              Accumulators<R, P>& acc) {
  for (long i = 0; i < k; i += 2) {
    Bits words[P * kParts];
    // A line of each panel: what lies behind this block is read next.
    _Pragma("GCC unroll 8") for (int p = 0; p < P; p++) {
      __builtin_prefetch(b + p * panel + i * kLanes + kAhead, 0, 3);
    }
    PENSTOCK_COLUMNS words[c] =
        load_bits(b + c / kParts * panel + i * kLanes + c % kParts * 2 * kWidth);
    PENSTOCK_ROWS {
      const Native x = splat(a[r * stride + i]);
      PENSTOCK_COLUMNS acc.at[r][c] = fma(x, low_half(words[c]), acc.at[r][c]);
    }
    PENSTOCK_ROWS {
      const Native x = splat(a[r * stride + i + 1]);
      PENSTOCK_COLUMNS acc.at[r][c] = fma(x, high_half(words[c]), acc.at[r][c]);
    }
  }
}

// a: words of two bfloat16; stride in words.
template <int R, int P>
PENSTOCK_INLINE void multiply(const uint32_t* a, long stride, const bf16* b, long panel, long k,
                              Accumulators<R, P>& acc) {
  for (long i = 0; i < k / 2; i++) {
    Bits words[P * kParts];
    PENSTOCK_COLUMNS words[c] =
        load_bits(b + c / kParts * panel + i * 2 * kLanes + c % kParts * 2 * kWidth);
    PENSTOCK_ROWS {
      const Bits x = splat_bits(a[r * stride + i]);
      PENSTOCK_COLUMNS acc.at[r][c] = dot_pairs(acc.at[r][c], x, words[c]);
    }
  }
}

// B as it lies in pages: row k begins at rows[k] + column. Its panels are 16 elements apart.
template <class T>
struct Natural {
  const T* const* rows;
  long column;

  Natural operator+(long elements) const { return {rows, column + elements}; }
};

template <int R, int P, class T>
PENSTOCK_INLINE void multiply(const float* a, long stride, Natural<T> b, long, long k,
                              Accumulators<R, P>& acc) {
  for (long i = 0; i < k; i++) {
    const T* ahead = b.rows[i + kRowsAhead < k ? i + kRowsAhead : k - 1] + b.column;
    for (int p = 0; p < P; p++) __builtin_prefetch(ahead + p * kLanes, 0, 3);
    _Pragma("GCC unroll 8") for (int p = 0; p < P; p++) {
      const Vec column = widen16(b.rows[i] + b.column + p * kLanes);
      PENSTOCK_ROWS {
        const Native x = splat(a[r * stride + i]);
        PENSTOCK_EACH(j) {
          acc.at[r][p * kParts + j] = fma(x, column.part[j], acc.at[r][p * kParts + j]);
        }
      }
    }
  }
}

// R rows of C, the first `columns` elements of each; more than (P - 1) · 16 of them, at most P · 16.
// Into::continue_ wants all P · 16.
template <int R, int P, class A, class B>
void tile(const A* a, long a_stride, B b, long panel, long k, float* c_first, long c_stride,
          long columns, Into into) {
  Accumulators<R, P> acc;
  if (into == Into::continue_) {
    PENSTOCK_ROWS PENSTOCK_COLUMNS acc.at[r][c] = load(c_first + r * c_stride + c * kWidth);
  } else {
    PENSTOCK_ROWS PENSTOCK_COLUMNS acc.at[r][c] = Native{};
  }
  multiply<R, P>(a, a_stride, b, panel, k, acc);
  if (columns < P * kLanes) {
    float row[P * kLanes];
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < P * kParts; c++) store(row + c * kWidth, acc.at[r][c]);
      float* to = c_first + r * c_stride;
      for (long n = 0; n < columns; n++) to[n] = into == Into::add ? to[n] + row[n] : row[n];
    }
  } else if (into == Into::add) {
    PENSTOCK_ROWS PENSTOCK_COLUMNS {
      float* to = c_first + r * c_stride + c * kWidth;
      store(to, load(to) + acc.at[r][c]);
    }
  } else {
    PENSTOCK_ROWS PENSTOCK_COLUMNS store(c_first + r * c_stride + c * kWidth, acc.at[r][c]);
  }
}

template <int R, class A, class B>
void row_of_tiles(const A* a, long a_stride, B b, long panel, long k, float* c,
                  long c_stride, long columns, Into into) {
  constexpr int P = static_cast<int>(panels_for(R));
  long n = 0;
  for (; columns - n > (P - 1) * kLanes; n += P * kLanes) {
    tile<R, P>(a, a_stride, b + n / kLanes * panel, panel, k, c + n, c_stride,
               columns - n < P * kLanes ? columns - n : P * kLanes, into);
  }
  for (; n < columns; n += kLanes) {
    tile<R, 1>(a, a_stride, b + n / kLanes * panel, panel, k, c + n, c_stride,
               columns - n < kLanes ? columns - n : kLanes, into);
  }
}

// `rows` of A (1 to kMaxRows) times all panels that hold `columns` columns. B is a pointer to panels,
// or Natural.
template <class A, class B>
void multiply_rows(int rows, const A* a, long a_stride, B b, long panel, long k, float* c,
                   long c_stride, long columns, Into into) {
  switch (rows) {
#define PENSTOCK_CASE(R)                                                          \
  case R:                                                                         \
    if constexpr (R <= kMaxRows)                                                  \
      row_of_tiles<R>(a, a_stride, b, panel, k, c, c_stride, columns, into);      \
    break;
    PENSTOCK_CASE(1)
    PENSTOCK_CASE(2)
    PENSTOCK_CASE(3)
    PENSTOCK_CASE(4)
    PENSTOCK_CASE(5)
    PENSTOCK_CASE(6)
    PENSTOCK_CASE(7)
    PENSTOCK_CASE(8)
    PENSTOCK_CASE(9)
    PENSTOCK_CASE(10)
    PENSTOCK_CASE(11)
    PENSTOCK_CASE(12)
#undef PENSTOCK_CASE
  }
}

// Rows in groups of at most kMaxRows, as equal as they can be: `body(first, count)`.
template <class Body>
PENSTOCK_INLINE void for_row_groups(long rows, const Body& body) {
  const long groups = (rows + kMaxRows - 1) / kMaxRows;
  for (long g = 0; g < groups; g++) {
    const long first = rows * g / groups;
    body(first, static_cast<int>(rows * (g + 1) / groups - first));
  }
}

}  // namespace penstock
