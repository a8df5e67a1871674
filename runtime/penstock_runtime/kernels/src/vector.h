// Vectors: the only file that names a processor's instructions.
//
// `Native` is what one register holds: 16, 8 or 4 float32, by the instruction set that the compiler
// was told to use. `Vec` is 16 lanes on every processor, made of one, two or four of them. Sums that
// end in one number are formed over the 16 lanes of a Vec in one fixed order, so that float32
// results do not depend on the width of the registers.
//
// The compiler may not contract a * b + c by itself (-ffp-contract=off): `fma` says where it is
// wanted, so that every copy of a formula rounds alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PENSTOCK_INLINE inline __attribute__((always_inline))

namespace penstock {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

typedef float Native __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef int32_t Mask __attribute__((vector_size(kWidth * 4)));

typedef uint16_t bf16;
struct f16 {
  uint16_t bits;
};

// --- one register -----------------------------------------------------------------------------

PENSTOCK_INLINE Native load(const float* p) {
  Native v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PENSTOCK_INLINE Bits load_bits(const void* p) {
  Bits v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PENSTOCK_INLINE void store(float* p, Native v) { std::memcpy(p, &v, sizeof v); }

PENSTOCK_INLINE void store_bits(void* p, Bits v) { std::memcpy(p, &v, sizeof v); }

PENSTOCK_INLINE Native splat(float x) {
#if defined(__AVX512F__)
  return (Native)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Native)_mm256_set1_ps(x);
#else
  Native v;
  for (int i = 0; i < kWidth; i++) v[i] = x;
  return v;
#endif
}

PENSTOCK_INLINE Bits splat_bits(uint32_t word) { return word - Bits{}; }

// a · b + c with one rounding.
PENSTOCK_INLINE Native fma(Native a, Native b, Native c) {
#if defined(__AVX512F__)
  return (Native)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Native)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Native r;
  for (int i = 0; i < kWidth; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

// Of two of which one is no number, or zeros, the second. By name: of the formula g++ makes two instructions.
PENSTOCK_INLINE Native max(Native a, Native b) {
#if defined(__AVX512F__)
  return (Native)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Native)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The bits of the larger of two, if `than` is positive. As whole numbers: more parts of the processor do that.
PENSTOCK_INLINE Bits larger(Native of, float than) {
#if defined(__AVX512F__)
  return (Bits)_mm512_max_epi32((__m512i)of, (__m512i)splat(than));
#elif defined(__AVX2__)
  return (Bits)_mm256_max_epi32((__m256i)of, (__m256i)splat(than));
#else
  return (Bits)max(of, splat(than));
#endif
}

// Two bfloat16 lie in each word: the one at the lower address in the lower half.
PENSTOCK_INLINE Native low_half(Bits words) { return (Native)(words << 16); }
PENSTOCK_INLINE Native high_half(Bits words) { return (Native)(words & 0xffff0000u); }

// acc + a.low · b.low + a.high · b.high, on pairs of bfloat16. As the instruction does it: first the
// high halves, then the low ones, each with one rounding.
PENSTOCK_INLINE Native dot_pairs(Native acc, Bits a, Bits b) {
#if defined(__AVX512BF16__)
  return (Native)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  return fma(low_half(a), low_half(b), fma(high_half(a), high_half(b), acc));
#endif
}

// --- sixteen lanes ----------------------------------------------------------------------------

struct Vec {
  Native part[kParts];
};

#define PENSTOCK_EACH(i) _Pragma("GCC unroll 4") for (int i = 0; i < kParts; i++)

PENSTOCK_INLINE Vec load16(const float* p) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = load(p + i * kWidth);
  return v;
}

PENSTOCK_INLINE void store16(float* p, const Vec& v) {
  PENSTOCK_EACH(i) store(p + i * kWidth, v.part[i]);
}

PENSTOCK_INLINE Vec splat16(float x) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = splat(x);
  return v;
}

PENSTOCK_INLINE Vec operator+(const Vec& a, const Vec& b) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = a.part[i] + b.part[i];
  return v;
}

PENSTOCK_INLINE Vec operator-(const Vec& a, const Vec& b) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = a.part[i] - b.part[i];
  return v;
}

PENSTOCK_INLINE Vec operator*(const Vec& a, const Vec& b) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = a.part[i] * b.part[i];
  return v;
}

PENSTOCK_INLINE Vec operator/(const Vec& a, const Vec& b) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = a.part[i] / b.part[i];
  return v;
}

PENSTOCK_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return v;
}

PENSTOCK_INLINE Vec max(const Vec& a, const Vec& b) {
  Vec v;
  PENSTOCK_EACH(i) v.part[i] = max(a.part[i], b.part[i]);
  return v;
}

// The first `count` lanes, zeros behind them.
PENSTOCK_INLINE Vec first_lanes(const Vec& v, long count) {
  constexpr float kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(sizeof kNumbers == kLanes * sizeof(float));
  const Vec numbers = load16(kNumbers);
  const Native behind = splat(static_cast<float>(count));
  Vec first;
  PENSTOCK_EACH(i) first.part[i] = numbers.part[i] < behind ? v.part[i] : Native{};
  return first;
}

// The sum of the lanes: halves are added until one is left.
PENSTOCK_INLINE float sum_lanes(const Vec& v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 high = _mm512_extractf32x8_ps((__m512)v.part[0], 1);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v.part[0]), high);
#else
  const __m256 eight = _mm256_add_ps((__m256)v.part[0], (__m256)v.part[1]);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[kLanes];
  store16(lane, v);
  _Pragma("GCC unroll 4") for (int half = kLanes / 2; half; half /= 2)
      _Pragma("GCC unroll 8") for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
#endif
}

PENSTOCK_INLINE float max_lanes(const Vec& v) {
  Native m = v.part[0];
  for (int i = 1; i < kParts; i++) m = max(m, v.part[i]);
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)m);
#elif defined(__AVX2__)
  __m128 h = _mm_max_ps(_mm256_castps256_ps128((__m256)m), _mm256_extractf128_ps((__m256)m, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
#else
  float r = m[0];
  for (int i = 1; i < kWidth; i++) r = m[i] > r ? m[i] : r;
  return r;
#endif
}

// Pairs (a, b) that lie side by side, turned by angles given as (cosine, sine): (a c - b s, b c + a s), the
// first product of each fused. By name: of the formula g++ makes what it likes, whatever -ffp-contract says.
PENSTOCK_INLINE Vec turn_pairs(const Vec& x, const Vec& by) {
  Vec v;
#if defined(__AVX512F__)
  const __m512 pairs = (__m512)x.part[0], turns = (__m512)by.part[0];
  const __m512 across = _mm512_mul_ps(_mm512_permute_ps(pairs, 0xb1), _mm512_movehdup_ps(turns));
  v.part[0] = (Native)_mm512_fmaddsub_ps(pairs, _mm512_moveldup_ps(turns), across);
#elif defined(__AVX2__)
  PENSTOCK_EACH(i) {
    const __m256 pairs = (__m256)x.part[i], turns = (__m256)by.part[i];
    const __m256 across = _mm256_mul_ps(_mm256_permute_ps(pairs, 0xb1), _mm256_movehdup_ps(turns));
    v.part[i] = (Native)_mm256_fmaddsub_ps(pairs, _mm256_moveldup_ps(turns), across);
  }
#else
  PENSTOCK_EACH(i) for (int j = 0; j < kWidth; j += 2) {
    const float a = x.part[i][j], b = x.part[i][j + 1], c = by.part[i][j], s = by.part[i][j + 1];
    v.part[i][j] = __builtin_fmaf(a, c, -(b * s));
    v.part[i][j + 1] = __builtin_fmaf(b, c, a * s);
  }
#endif
  return v;
}

// Up to 16 floats; missing lanes are 0.
PENSTOCK_INLINE Vec load_some(const float* p, long count) {
  if (count >= kLanes) return load16(p);
  float lane[kLanes] = {};
  std::memcpy(lane, p, static_cast<size_t>(count) * sizeof(float));
  return load16(lane);
}

PENSTOCK_INLINE void store_some(float* p, const Vec& v, long count) {
  if (count >= kLanes) return store16(p, v);
  float lane[kLanes];
  store16(lane, v);
  std::memcpy(p, lane, static_cast<size_t>(count) * sizeof(float));
}

// --- narrow element types ---------------------------------------------------------------------

#if !defined(__F16C__)
#if defined(__aarch64__)
using Half = __fp16;  // g++ knows _Float16 there from version 13 on
#else
using Half = _Float16;
#endif
#endif

PENSTOCK_INLINE float widen(float x) { return x; }

PENSTOCK_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

PENSTOCK_INLINE float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  Half h;
  std::memcpy(&h, &x.bits, sizeof h);
  return static_cast<float>(h);
#endif
}

// To the nearest, ties to even; a NaN stays one.
PENSTOCK_INLINE void narrow(float x, float* to) { *to = x; }

PENSTOCK_INLINE void narrow(float x, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<bf16>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

PENSTOCK_INLINE void narrow(float x, f16* to) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Half h = static_cast<Half>(x);
  std::memcpy(&to->bits, &h, sizeof h);
#endif
}

PENSTOCK_INLINE Vec widen16(const float* p) { return load16(p); }

PENSTOCK_INLINE Vec widen16(const bf16* p) {
  Vec v;
#if defined(__AVX512F__)
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  v.part[0] = (Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
#elif defined(__AVX2__)
  PENSTOCK_EACH(i) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * kWidth));
    v.part[i] = (Native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
  }
#else
  PENSTOCK_EACH(i) for (int j = 0; j < kWidth; j++) v.part[i][j] = widen(p[i * kWidth + j]);
#endif
  return v;
}

PENSTOCK_INLINE Vec widen16(const f16* p) {
  Vec v;
#if defined(__AVX512F__)
  v.part[0] = (Native)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  PENSTOCK_EACH(i) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * kWidth));
    v.part[i] = (Native)_mm256_cvtph_ps(words);
  }
#else
  PENSTOCK_EACH(i) for (int j = 0; j < kWidth; j++) v.part[i][j] = widen(p[i * kWidth + j]);
#endif
  return v;
}

// The first `count` lanes, one by one.
template <class T>
PENSTOCK_INLINE void narrow_lanes(const Vec& x, T* to, long count) {
  float lane[kLanes];
  store16(lane, x);
  for (long i = 0; i < count; i++) narrow(lane[i], to + i);
}

PENSTOCK_INLINE void narrow16(const Vec& x, float* to) { store16(to, x); }

PENSTOCK_INLINE void narrow16(const Vec& x, bf16* to) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x.part[0]);
  std::memcpy(to, &narrow, sizeof narrow);
#else
  narrow_lanes(x, to, kLanes);
#endif
}

PENSTOCK_INLINE void narrow16(const Vec& x, f16* to) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &narrow, sizeof narrow);
#else
  narrow_lanes(x, to, kLanes);
#endif
}

// 32 elements one behind the other, as words of two.
PENSTOCK_INLINE void narrow32(const Vec& first, const Vec& second, Bits (&words)[kParts]) {
#if defined(__AVX512BF16__)
  words[0] = (Bits)_mm512_cvtne2ps_pbh((__m512)second.part[0], (__m512)first.part[0]);
#else
  bf16 narrow[2 * kLanes];
  narrow16(first, narrow);
  narrow16(second, narrow + kLanes);
  PENSTOCK_EACH(i) words[i] = load_bits(narrow + i * 2 * kWidth);
#endif
}

// Words of two bfloat16, one of each row: words[i] = low[i], high[i], for P times 16 elements.
template <int P>
PENSTOCK_INLINE void pair_rows(const bf16* low, const bf16* high, Bits (&words)[P * kParts]) {
#if defined(__AVX512F__)
  const __m512i evens = _mm512_setr_epi32(
      0x00200000, 0x00210001, 0x00220002, 0x00230003, 0x00240004, 0x00250005, 0x00260006,
      0x00270007, 0x00280008, 0x00290009, 0x002a000a, 0x002b000b, 0x002c000c, 0x002d000d,
      0x002e000e, 0x002f000f);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(16));
  if constexpr (P == 1) {
    const auto half = [](const bf16* row) {
      return _mm512_castsi256_si512(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    };
    words[0] = (Bits)_mm512_permutex2var_epi16(half(low), evens, half(high));
  } else {
    static_assert(P % 2 == 0);
    _Pragma("GCC unroll 4") for (int p = 0; p < P; p += 2) {
      const __m512i a = _mm512_loadu_si512(low + p * kLanes);
      const __m512i b = _mm512_loadu_si512(high + p * kLanes);
      words[p] = (Bits)_mm512_permutex2var_epi16(a, evens, b);
      words[p + 1] = (Bits)_mm512_permutex2var_epi16(a, odds, b);
    }
  }
#else
  for (int i = 0; i < P * kLanes; i++) {
    words[i / kWidth][i % kWidth] = low[i] | static_cast<uint32_t>(high[i]) << 16;
  }
#endif
}

// to[n · step + i] = words[i][n].
PENSTOCK_INLINE void store_side_by_side(const uint32_t (&words)[4][8], uint32_t* to, long step) {
#if defined(__AVX2__)
  __m256i row[4];
  for (int i = 0; i < 4; i++) std::memcpy(&row[i], words[i], sizeof row[i]);
  const __m256i a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpackhi_epi32(row[0], row[1]);
  const __m256i c = _mm256_unpacklo_epi32(row[2], row[3]), d = _mm256_unpackhi_epi32(row[2], row[3]);
  const __m256i four[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                           _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
  for (int n = 0; n < 4; n++) {
    const __m128i low = _mm256_castsi256_si128(four[n]), high = _mm256_extracti128_si256(four[n], 1);
    std::memcpy(to + n * step, &low, sizeof low);
    std::memcpy(to + (n + 4) * step, &high, sizeof high);
  }
#else
  for (int n = 0; n < 8; n++) {
    for (int i = 0; i < 4; i++) to[n * step + i] = words[i][n];
  }
#endif
}

// --- bytes ------------------------------------------------------------------------------------

// Sixteen bytes, as often as a register holds them.
struct Table {
  Bits of;
};

PENSTOCK_INLINE Table load_table(const uint8_t* p) {
  Table table;
  for (int i = 0; i < kWidth; i += 4) {
    std::memcpy(reinterpret_cast<char*>(&table.of) + 4 * i, p, 16);
  }
  return table;
}

// The table's byte that the lower four bits of each byte say.
PENSTOCK_INLINE Bits look_up(const Table& table, Bits places) {
  const Bits lower = places & 0x0f0f0f0fu;
#if defined(__AVX512BW__)
  return (Bits)_mm512_shuffle_epi8((__m512i)table.of, (__m512i)lower);
#elif defined(__AVX2__)
  return (Bits)_mm256_shuffle_epi8((__m256i)table.of, (__m256i)lower);
#elif defined(__aarch64__)
  return (Bits)vqtbl1q_u8((uint8x16_t)table.of, (uint8x16_t)lower);
#else
  uint8_t from[16], bytes[16];
  std::memcpy(from, &table.of, sizeof from);
  std::memcpy(bytes, &lower, sizeof bytes);
  for (uint8_t& byte : bytes) byte = from[byte];
  return load_bits(bytes);
#endif
}

// Of each 16 bytes of both, in turn: `first` takes of the first eight, `second` of the others.
PENSTOCK_INLINE void interleave(Bits low, Bits high, Bits* first, Bits* second) {
#if defined(__AVX512BW__)
  *first = (Bits)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
  *second = (Bits)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
  *first = (Bits)_mm256_unpacklo_epi8((__m256i)low, (__m256i)high);
  *second = (Bits)_mm256_unpackhi_epi8((__m256i)low, (__m256i)high);
#elif defined(__aarch64__)
  *first = (Bits)vzip1q_u8((uint8x16_t)low, (uint8x16_t)high);
  *second = (Bits)vzip2q_u8((uint8x16_t)low, (uint8x16_t)high);
#else
  uint8_t lows[16], highs[16], both[32];
  std::memcpy(lows, &low, sizeof lows);
  std::memcpy(highs, &high, sizeof highs);
  for (int i = 0; i < 16; i++) {
    both[2 * i] = lows[i];
    both[2 * i + 1] = highs[i];
  }
  *first = load_bits(both);
  *second = load_bits(both + 16);
#endif
}

// --- the exponential --------------------------------------------------------------------------

// 2^f for |f| <= 1/2, fitted for the least relative error with 1 as the constant: here below 2e-7.
PENSTOCK_INLINE Native exp2_of_fraction(Native f) {
  Native p = splat(0x1.5bba14p-10f);
  p = fma(p, f, splat(0x1.3cea88p-7f));
  p = fma(p, f, splat(0x1.c6b752p-5f));
  p = fma(p, f, splat(0x1.ebf9bcp-3f));
  p = fma(p, f, splat(0x1.62e42ap-1f));
  return fma(p, f, splat(1.0f));
}

// For results that are rounded to bfloat16: below 2e-4, where its eight bits make 2e-3.
PENSTOCK_INLINE Native exp2_of_fraction_coarsely(Native f) {
  Native p = splat(0x1.c2a218p-5f);
  p = fma(p, f, splat(0x1.f00c4ep-3f));
  p = fma(p, f, splat(0x1.62f5fap-1f));
  return fma(p, f, splat(1.0f));
}

// Adding it to a number leaves a whole one in the lowest bits.
constexpr float kShifter = 0x1.8p+23f;

// 2^(x - whole), for a whole number below 2^22 in magnitude, which is given as `shifter`, kShifter - whole:
// taking it off costs nothing so. x - whole = n + f with n whole and |f| <= 1/2; 2^f is `of`(f), and n is
// added to the exponent of that. x is finite and x - whole below 127; what would be less than 2^-125 is about
// that. Exactly 1 where x is the whole number.
template <class Polynomial>
PENSTOCK_INLINE Vec exp2_less(const Vec& x, const Native& shifter, const Polynomial& of) {
  Vec v;
  PENSTOCK_EACH(i) {
    const Native shifted = x.part[i] + shifter;
    const Native fraction = x.part[i] - (shifted - shifter);
    v.part[i] = (Native)((Bits)of(fraction) + (larger(shifted, kShifter - 125.0f) << 23));
  }
  return v;
}

// 2^n for a whole n <= 0; 0 below -126.
PENSTOCK_INLINE float power_of_two(float n) {
  if (n < -126.0f) return 0.0f;
  const uint32_t bits = static_cast<uint32_t>(127 + static_cast<int32_t>(n)) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

}  // namespace penstock
