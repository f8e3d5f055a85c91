// Vectors of the instruction set that a file is compiled for: 16 floats (AVX-512), 8 (AVX2) or 4. Arithmetic is the compiler's;
// here is what it has no operator for. Without AVX2 a multiply-add rounds twice.
// Header-only and static, as math.h is.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef float Half __attribute__((vector_size(2 * kWidth)));
typedef double Wide __attribute__((vector_size(4 * kWidth)));  // of as many bytes, so of half the lanes
typedef int64_t Longs __attribute__((vector_size(4 * kWidth)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  typedef uint16_t Shorts __attribute__((vector_size(2 * kWidth)));
  Shorts v;
  std::memcpy(&v, p, sizeof v);
  return (Vec)(__builtin_convertvector(v, Ints) << 16);
#endif
}

inline Vec load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, Ints), Vec);
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Vec{} + x;
#endif
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Wide fma(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

inline Wide widen(const float* p) {
  Half v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Wide);
}

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  Longs both;
  std::memcpy(&both, &mask, sizeof both);
  return (both[0] | both[1]) != 0;
#endif
}

// 0, 1, 2 ...
inline Ints lanes() {
  Ints v = {};
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// The first `count` elements (of 1..kWidth; more are as many), zeros behind them. What lies behind is not touched.
inline Vec load_first(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16(count >= 16 ? 0xffff : (1u << count) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, (__m256i)(lanes() < int32_t(count < 8 ? count : 8)));
#else
  Vec v = {};
  for (int64_t i = 0; i < (count < kWidth ? count : kWidth); ++i) v[i] = p[i];
  return v;
#endif
}

// Elements of any type, as floats.
inline Vec load_any(const float* p) { return load(p); }
inline Vec load_any(const uint16_t* p) { return load_bf16(p); }
inline Vec load_any(const int8_t* p) { return load_int8(p); }
inline Vec load_any_first(const float* p, int64_t count) { return load_first(p, count); }

template <typename Element>
inline Vec load_any_first(const Element* p, int64_t count) {
  Element some[kWidth] = {};
  std::memcpy(some, p, size_t(count < kWidth ? count : kWidth) * sizeof(Element));
  return load_any(some);
}

inline void store_first(float* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16(count >= 16 ? 0xffff : (1u << count) - 1), v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)(lanes() < int32_t(count < 8 ? count : 8)), v);
#else
  std::memcpy(p, &v, size_t(count < kWidth ? count : kWidth) * 4);
#endif
}

// Halves onto each other until one is left: one order for each width.
inline float add_all(Vec v) {
#pragma GCC unroll 4
  for (int n = kWidth / 2; n > 0; n /= 2) v += __builtin_shuffle(v, lanes() + n);
  return v[0];
}

// `add_all` of each of N vectors.
template <int N>
inline void add_each(const Vec* v, float* sums) {
  int done = 0;
#if defined(__AVX512F__)
  // Sixteen at a time, which share their halvings: a level puts the halves of two vectors' groups of lanes side by side.
  const auto level = [](Vec* to, const Vec* from, int count, int half) __attribute__((always_inline)) {
    Ints low;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) low[i] = i / half * 2 * half + i % half;
    const Ints high = low + half;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      to[i] = _mm512_permutex2var_ps(from[2 * i], (__m512i)low, from[2 * i + 1]) +
              _mm512_permutex2var_ps(from[2 * i], (__m512i)high, from[2 * i + 1]);
  };
#pragma GCC unroll 2
  for (; done + 16 <= N; done += 16) {
    Vec eight[8], four[4], two[2], one;
    level(eight, v + done, 8, 8);
    level(four, eight, 4, 4);
    level(two, four, 2, 2);
    level(&one, two, 1, 1);
    store(sums + done, one);
  }
#endif
  for (; done < N; ++done) sums[done] = add_all(v[done]);
}

inline float greatest(Vec v) {
#pragma GCC unroll 4
  for (int n = kWidth / 2; n > 0; n /= 2) {
    const Vec other = __builtin_shuffle(v, lanes() + n);
    v = other > v ? other : v;
  }
  return v[0];
}

// e^x for x <= 88, within 2 ulp down to -87, 0 from -110 on at the latest and never less; a NaN stays one.
// The polynomial of math.h.
inline Vec exp_of(Vec x) {
  const Vec lowest = broadcast(-110.0f), round = broadcast(12582912.0f);  // 1.5 * 2^23
  const Vec clamped = lowest > x ? lowest : x;
  const Vec shifted = fma(clamped, broadcast(1.44269504088896341f), round);
  const Vec n = shifted - round;
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clamped));
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const Vec y = p * (Vec)(((Ints)shifted + 127) << 23);
  return x < broadcast(-87.0f) ? Vec{} : y;
#endif
}

// The same in fp64, for x <= 700: within 2 ulp down to -700, 0 below. A series, whose 14th term is below half an ulp.
inline Wide exp_of(Wide x) {
  const Wide lowest = Wide{} - 700.0, round = Wide{} + 0x1.8p52;
  const Wide clamped = x < lowest ? lowest : x;
  const Wide shifted = fma(clamped, Wide{} + 0x1.71547652b82fep0, round);  // 1 / ln 2
  const Wide n = shifted - round;
  const Wide r = fma(n, Wide{} - 0x1.7f7d1cf79abcap-20, fma(n, Wide{} - 0x1.62e4p-1, clamped));
  constexpr double kTerms[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                               1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                               1.0 / 6,          0.5,             1.0,            1.0};
  Wide p = Wide{} + kTerms[0];
#pragma GCC unroll 13
  for (int i = 1; i < 14; ++i) p = fma(p, r, Wide{} + kTerms[i]);
  const Wide y = p * (Wide)(((Longs)shifted + 1023) << 52);
  return x < lowest ? Wide{} : y;
}

}  // namespace
