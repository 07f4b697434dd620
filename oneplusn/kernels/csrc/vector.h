// Sixteen floats at a time, in the compilers' own vector extension: AVX-512, AVX2 and NEON alike.
//
// A block is 32 elements, held as two vectors. bf16 splits into its even and its odd elements, which
// costs a shift and a mask; fp32 into halves. What is computed element by element does not care.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

struct BFloat16 {
  uint16_t bits;
};

namespace {

constexpr int kBlock = 32;  // elements of a block
constexpr int kLanes = 4;   // rows that meet others at once in `dots`

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

struct Pair {
  Floats first, second;
};

inline Floats as_floats(Words w) {
  Floats f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

inline Words as_words(Floats f) {
  Words w;
  std::memcpy(&w, &f, sizeof w);
  return w;
}

// Round to nearest even; NaN stays NaN.
inline Words rounded(Floats f) {
  const Words w = as_words(f);
  const Words up = w + 0x7fffu + ((w >> 16) & 1u);
  const Words nan = (Words)((w & 0x7fffffffu) > 0x7f800000u);
  return (up & ~nan) | ((w | 0x00400000u) & nan);
}

inline Pair load(const BFloat16* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return {as_floats(w << 16), as_floats(w & 0xffff0000u)};
}

inline Pair load(const float* p) {
  Pair out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline void store(BFloat16* p, Pair v) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves h = (Halves)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
  const Halves w = __builtin_shufflevector(h, h, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                           23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                           15, 31);
#else
  const Words w = (rounded(v.first) >> 16) | (rounded(v.second) & 0xffff0000u);
#endif
  std::memcpy(p, &w, sizeof w);
}

inline void store_one(BFloat16* p, float v) {
  uint32_t w;
  std::memcpy(&w, &v, sizeof w);
  const bool nan = (w & 0x7fffffffu) > 0x7f800000u;
  p->bits = (uint16_t)((nan ? w | 0x00400000u : w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
}

inline void store_one(float* p, float v) { *p = v; }

// Four values at once.
inline void store_lanes(BFloat16* p, const float* v) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  Four w;
  std::memcpy(&w, v, sizeof w);
  const Four nan = (Four)((w & 0x7fffffffu) > 0x7f800000u);
  const Four up = w + 0x7fffu + ((w >> 16) & 1u);
  const Halves half = __builtin_convertvector(((up & ~nan) | ((w | 0x00400000u) & nan)) >> 16, Halves);
  std::memcpy(p, &half, sizeof half);
}

inline void store_lanes(float* p, const float* v) { std::memcpy(p, v, 4 * sizeof *v); }

inline void store(float* p, Pair v) { std::memcpy(p, &v, sizeof v); }

template <typename T>
inline Pair load_part(const T* p, int count) {
  alignas(64) T whole[kBlock] = {};
  std::memcpy(whole, p, count * sizeof(T));
  return load(whole);
}

template <typename T>
inline void store_part(T* p, Pair v, int count) {
  alignas(64) T whole[kBlock];
  store(whole, v);
  std::memcpy(p, whole, count * sizeof(T));
}

inline float sum(Floats f) {
  f += __builtin_shufflevector(f, f, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  f += __builtin_shufflevector(f, f, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  f += __builtin_shufflevector(f, f, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return f[0] + f[1];
}

// x of every even place beside y's, plus the same of every odd place: half as many partial sums.
inline Floats paired(Floats x, Floats y) {
  return __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

inline Floats paired_twice(Floats x, Floats y) {
  return __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// The sums of four vectors, for the price of one and a half.
inline void sums(const Floats (&v)[4], float* out) {
  Floats f = paired_twice(paired(v[0], v[1]), paired(v[2], v[3]));
  f += __builtin_shufflevector(f, f, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  f += __builtin_shufflevector(f, f, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  std::memcpy(out, &f, 4 * sizeof(float));
}

// A block as it lies in memory, for products of a block with a block.
inline Words raw(const BFloat16* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline Pair raw(const float* p) { return load(p); }

inline void dot(Floats& acc, Pair a, Pair x) {
  acc += a.first * x.first;
  acc += a.second * x.second;
}

inline void dot(Floats& acc, Words a, Words x) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  acc = (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)x);
#else
  acc += as_floats(a << 16) * as_floats(x << 16);
  acc += as_floats(a & 0xffff0000u) * as_floats(x & 0xffff0000u);
#endif
}

// out[m][i] = rows[i] . xs[m] for kLanes rows that lie `width` apart; only the first `lanes` exist.
// For each block of the rows `fetch` is called, which may fetch what comes next.
template <typename T, int M, typename Fetch>
inline void dots(const T* rows, int lanes, const T* const* xs, int64_t width,
                 float (&out)[M][kLanes], const Fetch& fetch) {
  Floats acc[M][kLanes] = {};
  const int64_t whole = width / kBlock * kBlock, rest = width - whole;
  const T* at[kLanes];
  for (int i = 0; i < kLanes; ++i) at[i] = rows + std::min(i, lanes - 1) * width;
  for (int64_t k = 0; k < whole; k += kBlock) {
    decltype(raw(rows)) x[M];
    for (int m = 0; m < M; ++m) x[m] = raw(xs[m] + k);
    fetch();
    for (int i = 0; i < kLanes; ++i) {
      const auto a = raw(at[i] + k);
      for (int m = 0; m < M; ++m) dot(acc[m][i], a, x[m]);
    }
  }
  if (rest) {
    alignas(64) T x[kBlock] = {}, a[kBlock] = {};
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(a, at[i] + whole, rest * sizeof(T));
      for (int m = 0; m < M; ++m) {
        std::memcpy(x, xs[m] + whole, rest * sizeof(T));
        dot(acc[m][i], raw(a), raw(x));
      }
    }
  }
  for (int m = 0; m < M; ++m) sums(acc[m], out[m]);
}

// acc[i] += w[i] * x, where every word of w is one fp32, or two bf16 that meet the two of x.
inline void multiply_add(Floats& acc, Words w, uint32_t x, const float*) {
  acc += as_floats(w) * as_floats(x - Words{});
}

inline void multiply_add(Floats& acc, Words w, uint32_t x, const BFloat16*) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  acc = (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
  acc += as_floats(w << 16) * as_floats((x << 16) - Words{});
  acc += as_floats(w & 0xffff0000u) * as_floats((x & 0xffff0000u) - Words{});
#endif
}

// 32 columns in their order, as two vectors of sixteen.
inline void load_columns(const float* p, Floats (&out)[2]) { std::memcpy(out, p, sizeof out); }

inline void load_columns(const BFloat16* p, Floats (&out)[2]) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  for (int i = 0; i < 2; ++i) {
    Halves half;
    std::memcpy(&half, p + 16 * i, sizeof half);
    out[i] = as_floats(__builtin_convertvector(half, Words) << 16);
  }
}

inline void store_columns(float* p, const Floats (&v)[2]) { std::memcpy(p, v, sizeof v); }

inline void store_columns(BFloat16* p, const Floats (&v)[2]) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  const auto halves = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
  std::memcpy(p, &halves, sizeof halves);
#else
  typedef uint16_t Halves __attribute__((vector_size(32)));
  for (int i = 0; i < 2; ++i) {
    const Halves half = __builtin_convertvector(rounded(v[i]) >> 16, Halves);
    std::memcpy(p + 16 * i, &half, sizeof half);
  }
#endif
}

// e^x within two units in the last place for x <= 88, and 0 far below.
inline Floats exponential(Floats x) {
  const Floats zero = {};
  const Floats low = zero - 87.3f, high = zero + 88.3f;
  const Words below = (Words)(x < low);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = (Words)(__builtin_convertvector(n, Ints) << 23);
  return as_floats((as_words(p) + power) & ~below);
}

// What a value of type T would be after rounding, as floats again.
inline Pair as_stored(const BFloat16*, Pair v) {
  return {as_floats(rounded(v.first) & 0xffff0000u), as_floats(rounded(v.second) & 0xffff0000u)};
}

inline Pair as_stored(const float*, Pair v) { return v; }

// The block at p, or the first `count` elements of it.
template <typename T>
inline Pair load_some(const T* p, int64_t count) {
  return count >= kBlock ? load(p) : load_part(p, (int)count);
}

template <typename T>
inline void store_some(T* p, Pair v, int64_t count) {
  count >= kBlock ? store(p, v) : store_part(p, v, (int)count);
}

}  // namespace
