// Keys, stored a token after the other, brought into panels of 16 tokens: [dim][16], or as words of
// two bfloat16 [dim / 2][16]. `rows[t]` is where a token's begin, see Evenly.
#pragma once

#include "vector.h"

namespace penstock {

// Rows that lie one behind the other. Pointers to rows take their place where they do not.
template <class T>
struct Evenly {
  const T* first;
  long stride;

  PENSTOCK_INLINE const T* operator[](long row) const { return first + row * stride; }
  PENSTOCK_INLINE Evenly operator+(long rows) const { return {first + rows * stride, stride}; }
};

#if defined(__AVX2__)

PENSTOCK_INLINE __m256 widen8(const float* p) { return _mm256_loadu_ps(p); }

PENSTOCK_INLINE __m256 widen8(const bf16* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

PENSTOCK_INLINE __m256 widen8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// to[d · 16 + t] = rows[t][d] for 8 tokens and 8 dims.
template <class Rows>
PENSTOCK_INLINE void transpose8(const Rows& rows, long dim, float* to) {
  __m256 r[8], pairs[8], quads[8];
  _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) r[i] = widen8(rows[i] + dim);
  _Pragma("GCC unroll 4") for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  _Pragma("GCC unroll 2") for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * kLanes, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * kLanes, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}

#else

template <class Rows>
PENSTOCK_INLINE void transpose8(const Rows& rows, long dim, float* to) {
  for (int d = 0; d < 8; d++) {
    for (int t = 0; t < 8; t++) to[d * kLanes + t] = widen(rows[t][dim + d]);
  }
}

#endif

// One panel of 16 tokens. `meanwhile()` is called for every eighth dim.
template <class Rows, class Meanwhile>
PENSTOCK_INLINE void transpose_panel(const Rows& rows, long dims, float* to,
                                     const Meanwhile& meanwhile) {
  long d = 0;
  for (; d + 8 <= dims; d += 8) {
    meanwhile();
    transpose8(rows, d, to + d * kLanes);
    transpose8(rows + 8, d, to + d * kLanes + 8);
  }
  for (; d < dims; d++) {
    for (int t = 0; t < kLanes; t++) to[d * kLanes + t] = widen(rows[t][d]);
  }
}

#if defined(__AVX512F__)

// to[i · 16 + t] = word i of rows[t], for 16 tokens and 16 words.
template <class Rows>
PENSTOCK_INLINE void transpose_words16(const Rows& rows, long dim, uint32_t* to) {
  __m512i r[16];
  // Four rows at a time, so that all fits into registers.
  _Pragma("GCC unroll 4") for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_loadu_si512(rows[i] + dim), b = _mm512_loadu_si512(rows[i + 1] + dim);
    const __m512i c = _mm512_loadu_si512(rows[i + 2] + dim);
    const __m512i d = _mm512_loadu_si512(rows[i + 3] + dim);
    const __m512i low = _mm512_unpacklo_epi32(a, b), high = _mm512_unpackhi_epi32(a, b);
    const __m512i next_low = _mm512_unpacklo_epi32(c, d), next_high = _mm512_unpackhi_epi32(c, d);
    r[i] = _mm512_unpacklo_epi64(low, next_low);
    r[i + 1] = _mm512_unpackhi_epi64(low, next_low);
    r[i + 2] = _mm512_unpacklo_epi64(high, next_high);
    r[i + 3] = _mm512_unpackhi_epi64(high, next_high);
  }
  // r[4g + j]: words j, 4 + j, 8 + j and 12 + j of the tokens 4g to 4g + 3.
  _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xee);
    _mm512_storeu_si512(to + j * kLanes, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + (4 + j) * kLanes, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + (8 + j) * kLanes, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + (12 + j) * kLanes, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

#else

template <class Rows>
PENSTOCK_INLINE void transpose_words16(const Rows& rows, long dim, uint32_t* to) {
  for (int i = 0; i < 16; i++) {
    for (int t = 0; t < kLanes; t++) {
      std::memcpy(to + i * kLanes + t, rows[t] + dim + 2 * i, sizeof(uint32_t));
    }
  }
}

#endif

// The same as words; `dims` is even.
template <class Rows, class Meanwhile>
PENSTOCK_INLINE void transpose_word_panel(const Rows& rows, long dims, uint32_t* to,
                                          const Meanwhile& meanwhile) {
  long d = 0;
  for (; d + 32 <= dims; d += 32) {
    for (int i = 0; i < 4; i++) meanwhile();
    transpose_words16(rows, d, to + d / 2 * kLanes);
  }
  for (; d < dims; d += 2) {
    for (int t = 0; t < kLanes; t++) {
      std::memcpy(to + d / 2 * kLanes + t, rows[t] + d, sizeof(uint32_t));
    }
  }
}

// Up to 16 elements of a row, `count` of which are there, zeros behind them.
template <class T>
PENSTOCK_INLINE void widen_some(const T* from, long count, float* to) {
  if (count >= kLanes) return store16(to, widen16(from));
  for (long i = 0; i < kLanes; i++) to[i] = i < count ? widen(from[i]) : 0.0f;
}

}  // namespace penstock
