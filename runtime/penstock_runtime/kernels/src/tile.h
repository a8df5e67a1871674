// The matrix product's inner loops: a few rows of A times a few panels of B, in registers.
//
// B lies in panels of 16 columns, as many side by side as `kTogether` says:
//   float     [panel / kTogether][k][panel % kTogether][16]
//   bf16      [panel / kTogether][k / 2][panel % kTogether][16][2]
// where two consecutive k of one column are one 32-bit word. A's rows are float, or words of two
// bfloat16 where the product of pairs is used; `a.word<R>(r, i)` is one of them, of R rows.
//
// Every element of C is one chain of fused multiply-adds over k in rising order, whatever the number
// of rows and panels beside it: so a row's bits do not depend on the batch. A caller that splits k
// does so at fixed places.
#pragma once

#include <type_traits>

#include "scratch.h"
#include "transpose.h"
#include "vector.h"

namespace penstock {

enum class Into {
  store,     // C = A · B
  add,       // C = C + A · B: the chain starts at 0, and its end is added
  continue_  // the chain starts at C
};

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
constexpr int panels_for(long rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
constexpr int panels_for(long rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int kMaxRows = 6;
constexpr int panels_for(long rows) { return rows <= 2 ? 2 : 1; }
#endif

template <int R, int P>
struct Accumulators {
  Native at[R][P * kParts];
};

// Memory that will be read next. Pages lie anywhere, so the processor cannot guess it: it is told, a few
// lines at a time between other work, for it can wait for a few dozen of them at once only. They come
// into the second level: the first has not enough room for them, and takes them in more slowly.
class Ahead {
 public:
  Ahead() = default;  // to be assigned
  Ahead(const void* first, long bytes)
      : at_(static_cast<const char*>(first)), end_(at_ + bytes) {}

  // Asks for the next `bytes`, or more, up to a whole number of kStep.
  PENSTOCK_INLINE void ask(long bytes) {
    for (const char* until = at_ + bytes; at_ < until && at_ < end_; at_ += kStep) {
      _Pragma("GCC unroll 4") for (long i = 0; i < kStep; i += kLine) {
        __builtin_prefetch(at_ + i, 0, 2);
      }
    }
  }

  PENSTOCK_INLINE long left() const { return end_ - at_; }

 private:
  static constexpr long kStep = 4 * kLine;

  const char* at_;
  const char* end_;
};

// Several such places, asked for one after the other in about so many turns of other work.
class Turns {
 public:
  Turns(Ahead* places, long count, long turns) : at_(places), end_(places + count) {
    long bytes = 0;
    for (long i = 0; i < count; i++) bytes += places[i].left();
    each_ = bytes / turns + 1;
  }

  PENSTOCK_INLINE void take() {
    for (long bytes = each_; bytes > 0 && at_ < end_;) {
      const long before = at_->left();
      at_->ask(bytes);
      bytes -= before - at_->left();
      if (at_->left() <= 0) at_++;
    }
  }

 private:
  Ahead* at_;
  Ahead* end_;
  long each_;
};

// Panels in memory. Those of a matrix that is read from memory lie two together: what a tile reads is
// then one run of addresses, which the processor reads ahead further than two.
template <class T, int kTogether>
struct Panels {
  // Those of a matrix come from memory, and so does what the product goes to.
  static constexpr bool kFar = kTogether > 1;
  // Elements of a panel in one row, of one k or of two.
  static constexpr long kRow = kLanes * (sizeof(float) / sizeof(T));

  const T* base;   // of panel 0
  long elements;   // of a panel: 16 · the k's of B
  long index = 0;  // of the panel that comes first here
  // What is asked for meanwhile: so far behind what is read. Reading memory takes as long as a few dozen
  // steps of a product, and twice as long when others read too.
  long ahead = 128 * kTogether * kRow;
  // Of packed copies, which are near: every tile takes one of these turns.
  Turns* turns = nullptr;

  Panels operator+(long panels) const { return {base, elements, index + panels, ahead, turns}; }
  // The same from row k on.
  Panels below(long k) const {
    return {base + k * kLanes * kTogether, elements, index, ahead, turns};
  }
  // The same, asking for what lies so many panels behind.
  Panels asking(long panels) const { return {base, elements, index, panels * elements, turns}; }

  PENSTOCK_INLINE void begin() const {
    if (!kFar && turns != nullptr) turns->take();
  }

  PENSTOCK_INLINE const T* first() const {
    return base + index / kTogether * kTogether * elements + index % kTogether * kRow;
  }
  // From `first` to row `row` of the panel `panel` behind it. Known when compiled but for two values;
  // right if `index` is a multiple of kTogether, or `panel` is 0.
  PENSTOCK_INLINE long offset(int panel, long row) const {
    return panel / kTogether * kTogether * elements + panel % kTogether * kRow +
           row * kTogether * kRow;
  }
};

template <class T>
using Packed = Panels<T, 2>;
constexpr int kPackedColumns = 2 * kLanes;

// A's rows one behind the other.
template <class T, class Stride = long>
struct RowMajor {
  using Word = T;
  const T* first;
  Stride stride;

  template <int R>
  PENSTOCK_INLINE T word(int row, long i) const {
    return first[row * stride + i];
  }
  template <int R>
  PENSTOCK_INLINE void ask(long) const {}
};

// The same in a known distance: one register finds them all.
template <class T, long kStride>
using Spaced = RowMajor<T, std::integral_constant<long, kStride>>;

// The words of all rows of a tile side by side.
template <class T>
struct Interleaved {
  using Word = T;
  const T* first;

  template <int R>
  PENSTOCK_INLINE T word(int row, long i) const {
    return first[i * R + row];
  }
  // What comes 2 KB behind: a long tile's words are not in the first level.
  template <int R>
  PENSTOCK_INLINE void ask(long i) const {
    __builtin_prefetch(first + i * R + 512, 0, 3);
  }
};

#define PENSTOCK_ROWS _Pragma("GCC unroll 12") for (int r = 0; r < R; r++)
#define PENSTOCK_COLUMNS _Pragma("GCC unroll 8") for (int c = 0; c < P * kParts; c++)

// `done(r)` is called when a row's sums are complete.
template <int R, int P, class A, int G, class Done>
PENSTOCK_INLINE void multiply(const A& a, Panels<float, G> b, long k, Accumulators<R, P>& acc,
                              const Done& done) {
  const float* first = b.first();
  for (long i = 0; i < k; i++) {
    Native column[P * kParts];
    PENSTOCK_COLUMNS column[c] = load(first + b.offset(c / kParts, i) + c % kParts * kWidth);
    PENSTOCK_ROWS {
      const Native x = splat(a.template word<R>(r, i));
      PENSTOCK_COLUMNS acc.at[r][c] = fma(x, column[c], acc.at[r][c]);
    }
  }
  PENSTOCK_ROWS done(r);
}

template <int R, int P, class A, int G>
PENSTOCK_INLINE void multiply_widened(const A& a, Panels<bf16, G> b, long k,
                                      Accumulators<R, P>& acc) {
  const bf16* first = b.first();
  for (long i = 0; i < k; i += 2) {
    Bits words[P * kParts];
    // A line of each panel: what lies behind this block is read next.
    _Pragma("GCC unroll 8") for (int p = 0; p < P; p++) {
      __builtin_prefetch(first + b.offset(p, i / 2) + b.ahead, 0, 3);
    }
    PENSTOCK_COLUMNS words[c] =
        load_bits(first + b.offset(c / kParts, i / 2) + c % kParts * 2 * kWidth);
    PENSTOCK_ROWS {
      const Native x = splat(a.template word<R>(r, i));
      PENSTOCK_COLUMNS acc.at[r][c] = fma(x, low_half(words[c]), acc.at[r][c]);
    }
    PENSTOCK_ROWS {
      const Native x = splat(a.template word<R>(r, i + 1));
      PENSTOCK_COLUMNS acc.at[r][c] = fma(x, high_half(words[c]), acc.at[r][c]);
    }
  }
}

template <int R, int P, class A>
PENSTOCK_INLINE void add_pairs(const A& a, long i, const Bits (&words)[P * kParts],
                               Accumulators<R, P>& acc) {
  PENSTOCK_ROWS {
    const Bits pair = splat_bits(a.template word<R>(r, i));
    PENSTOCK_COLUMNS acc.at[r][c] = dot_pairs(acc.at[r][c], pair, words[c]);
  }
}

// The last steps of a product, row by row: so that a row is stored while the next ones are computed. All
// at once, two dozen stores held up the next tile for 60 cycles, which is 7 % of a tile of 32 steps.
template <int R, int P, int Steps, class A, class Done>
PENSTOCK_INLINE void end_pairs(const A& a, long i, const Bits (&words)[Steps][P * kParts],
                               Accumulators<R, P>& acc, const Done& done) {
  PENSTOCK_ROWS {
    _Pragma("GCC unroll 4") for (int step = 0; step < Steps; step++) {
      const Bits pair = splat_bits(a.template word<R>(r, i + step));
      PENSTOCK_COLUMNS acc.at[r][c] = dot_pairs(acc.at[r][c], pair, words[step][c]);
    }
    done(r);
  }
}

// Measured: for a few rows the processor itself reads ahead well enough. For more it is asked into the
// second level, which can wait for more lines than the first: 8 rows read a third faster so.
constexpr int kRowsThatRead = 4;

template <int R, int P, class A, int G, class Done>
PENSTOCK_INLINE void multiply_pairs(const A& a, Panels<bf16, G> b, long k, Accumulators<R, P>& acc,
                                    const Done& done) {
  const bf16* first = b.first();
  const auto take = [&](long i, Bits(&words)[P * kParts]) {
    if constexpr (b.kFar && R > kRowsThatRead) {
      _Pragma("GCC unroll 8") for (int p = 0; p < P; p++) {
        __builtin_prefetch(first + b.offset(p, i) + b.ahead, 0, 2);
      }
      a.template ask<R>(i);
    }
    PENSTOCK_COLUMNS words[c] =
        load_bits(first + b.offset(c / kParts, i) + c % kParts * 2 * kWidth);
  };
  constexpr int kEnd = 4;
  const long steps = k / 2, end = steps < kEnd ? steps : steps - kEnd;
  for (long i = 0; i < end; i++) {
    Bits words[P * kParts];
    take(i, words);
    add_pairs(a, i, words, acc);
  }
  if (end == steps) {
    PENSTOCK_ROWS done(r);
    return;
  }
  Bits words[kEnd][P * kParts];
  _Pragma("GCC unroll 4") for (int step = 0; step < kEnd; step++) take(end + step, words[step]);
  end_pairs(a, end, words, acc, done);
}

template <int R, int P, class A, int G, class Done>
PENSTOCK_INLINE void multiply(const A& a, Panels<bf16, G> b, long k, Accumulators<R, P>& acc,
                              const Done& done) {
  if constexpr (std::is_same_v<typename A::Word, float>) {
    multiply_widened(a, b, k, acc);
    PENSTOCK_ROWS done(r);
  } else {
    multiply_pairs(a, b, k, acc, done);
  }
}

// B as it lies in pages, a row behind the other.
template <class T>
struct Natural {
  static constexpr bool kFar = false;

  Evenly<T> rows;
  Ahead* ahead;  // asked for on the way

  PENSTOCK_INLINE void begin() const {}

  long row_bytes() const { return rows.stride * static_cast<long>(sizeof(T)); }
  Natural operator+(long panels) const {
    return {{rows.first + panels * kLanes, rows.stride}, ahead};
  }
};

template <int R, int P, class A, class T>
PENSTOCK_INLINE void multiply_widened(const A& a, Natural<T> b, long k, Accumulators<R, P>& acc) {
  for (long i = 0; i < k; i++) {
    b.ahead->ask(b.row_bytes());
    _Pragma("GCC unroll 8") for (int p = 0; p < P; p++) {
      const Vec column = widen16(b.rows[i] + p * kLanes);
      PENSTOCK_ROWS {
        const Native x = splat(a.template word<R>(r, i));
        PENSTOCK_EACH(j) {
          acc.at[r][p * kParts + j] = fma(x, column.part[j], acc.at[r][p * kParts + j]);
        }
      }
    }
  }
}

// Of an odd k the last word's second half is 0.
template <int R, int P, class A>
PENSTOCK_INLINE void multiply_pairs(const A& a, Natural<bf16> b, long k, Accumulators<R, P>& acc) {
  const auto add = [&](long i, const bf16* low, const bf16* high) {
    Bits words[P * kParts];
    pair_rows<P>(low, high, words);
    add_pairs(a, i, words, acc);
  };
  for (long i = 0; i < k / 2; i++) {
    b.ahead->ask(2 * b.row_bytes());
    add(i, b.rows[2 * i], b.rows[2 * i + 1]);
  }
  // Nothing has been written behind the last row: it stands for the one that is not there.
  if (k % 2) add(k / 2, b.rows[k - 1], b.rows[k - 1]);
}

template <int R, int P, class A, class T, class Done>
PENSTOCK_INLINE void multiply(const A& a, Natural<T> b, long k, Accumulators<R, P>& acc,
                              const Done& done) {
  if constexpr (std::is_same_v<typename A::Word, float>) {
    multiply_widened(a, b, k, acc);
  } else {
    multiply_pairs(a, b, k, acc);
  }
  PENSTOCK_ROWS done(r);
}

// R rows of C, the first `columns` elements of each; more than (P - 1) · 16 of them, at most P · 16.
// Into::continue_ wants all P · 16.
//
// A and B come by reference: a copy would be stored word by word and loaded as a whole, which waits until
// the words are in the cache, 5 % of attention with few rows.
template <int R, int P, class A, class B>
void tile(const A& a, const B& b, long k, float* c_first, long c_stride, long columns, Into into) {
  b.begin();
  Accumulators<R, P> acc;
  if (into == Into::continue_) {
    PENSTOCK_ROWS PENSTOCK_COLUMNS acc.at[r][c] = load(c_first + r * c_stride + c * kWidth);
  } else {
    PENSTOCK_ROWS PENSTOCK_COLUMNS acc.at[r][c] = Native{};
  }
  if (B::kFar && into != Into::continue_) {
    // Where C goes is asked for meanwhile.
    PENSTOCK_ROWS for (int p = 0; p < P; p++) {
      __builtin_prefetch(c_first + r * c_stride + p * kLanes, 1, 3);
    }
  }
  // Unrolled like all else here: an accumulator that is found by a variable would live in memory.
  multiply(a, b, k, acc, [&](int r) {
    float* to = c_first + r * c_stride;
    if (columns < P * kLanes) {
      float row[P * kLanes];
      PENSTOCK_COLUMNS store(row + c * kWidth, acc.at[r][c]);
      for (long n = 0; n < columns; n++) to[n] = into == Into::add ? to[n] + row[n] : row[n];
    } else if (into == Into::add) {
      PENSTOCK_COLUMNS store(to + c * kWidth, load(to + c * kWidth) + acc.at[r][c]);
    } else {
      PENSTOCK_COLUMNS store(to + c * kWidth, acc.at[r][c]);
    }
  });
}

template <int R, int P, class A, class B>
void row_of_tiles(const A& a, const B& b, long k, float* c, long c_stride, long columns, Into into) {
  long n = 0;
  for (; columns - n > (P - 1) * kLanes; n += P * kLanes) {
    tile<R, P>(a, b + n / kLanes, k, c + n, c_stride,
               columns - n < P * kLanes ? columns - n : P * kLanes, into);
  }
  if constexpr (P > 1) {
    if (n < columns) {
      row_of_tiles<R, P / 2>(a, b + n / kLanes, k, c + n, c_stride, columns - n, into);
    }
  }
}

// Calls `body` with a number of rows, 1 to kMaxRows, that is known when compiled.
template <class Body>
PENSTOCK_INLINE void with_rows(int rows, const Body& body) {
  switch (rows) {
#define PENSTOCK_CASE(R)                                                         \
  case R:                                                                        \
    if constexpr (R <= kMaxRows) body(std::integral_constant<int, R>{});         \
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

// `rows` of A (1 to kMaxRows) times all panels that hold `columns` columns. A is RowMajor or Interleaved;
// B is Panels, or Natural.
template <class A, class B>
void multiply_rows(int rows, const A& a, const B& b, long k, float* c, long c_stride, long columns,
                   Into into) {
  with_rows(rows, [&](auto r) {
    row_of_tiles<r.value, panels_for(r.value)>(a, b, k, c, c_stride, columns, into);
  });
}

// Rows in groups of at most kMaxRows, as equal as they can be.
struct RowGroup {
  long first;
  int count;

  static long groups(long rows) { return (rows + kMaxRows - 1) / kMaxRows; }
  static RowGroup at(long rows, long index) {
    const long first = rows * index / groups(rows);
    return {first, static_cast<int>(rows * (index + 1) / groups(rows) - first)};
  }
};

// Calls `body(first, count)` for each of them.
template <class Body>
PENSTOCK_INLINE void for_row_groups(long rows, const Body& body) {
  if (rows <= kMaxRows) return body(0, static_cast<int>(rows));  // without dividing, for a page of few rows
  for (long g = 0; g < RowGroup::groups(rows); g++) {
    const RowGroup group = RowGroup::at(rows, g);
    body(group.first, group.count);
  }
}

}  // namespace penstock
