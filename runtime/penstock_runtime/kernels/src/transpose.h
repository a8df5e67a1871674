// Keys, stored a token after the other, brought into panels of 16 tokens: [dim][16].
#pragma once

#include "vector.h"

namespace penstock {

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
template <class T>
PENSTOCK_INLINE void transpose8(const T* const* rows, long dim, float* to) {
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

template <class T>
PENSTOCK_INLINE void transpose8(const T* const* rows, long dim, float* to) {
  for (int d = 0; d < 8; d++) {
    for (int t = 0; t < 8; t++) to[d * kLanes + t] = widen(rows[t][dim + d]);
  }
}

#endif

// One panel of 16 tokens. `meanwhile()` is called for every eighth dim.
template <class T, class Meanwhile>
PENSTOCK_INLINE void transpose_panel(const T* const* rows, long dims, float* to,
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

// Up to 16 elements of a row, `count` of which are there, zeros behind them.
template <class T>
PENSTOCK_INLINE void widen_some(const T* from, long count, float* to) {
  if (count >= kLanes) return store16(to, widen16(from));
  for (long i = 0; i < kLanes; i++) to[i] = i < count ? widen(from[i]) : 0.0f;
}

}  // namespace penstock
