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

namespace {

constexpr int kBlock = 32;  // elements of a block
constexpr int kLanes = 4;   // rows that meet a vector at once in `dots`

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

struct BFloat16 {
  uint16_t bits;
};

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
  const Words w = (rounded(v.first) >> 16) | (rounded(v.second) & 0xffff0000u);
  std::memcpy(p, &w, sizeof w);
}

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

inline void multiply_add(Floats& acc, Pair a, Pair x) {
  acc += a.first * x.first;
  acc += a.second * x.second;
}

template <typename T>
inline void dot_step(Floats& acc, const T* a, const T* x) {
  multiply_add(acc, load(a), load(x));
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
inline void dot_step(Floats& acc, const BFloat16* a, const BFloat16* x) {
  const __m512i left = _mm512_loadu_si512(a), right = _mm512_loadu_si512(x);
  acc = (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)left, (__m512bh)right);
}
#endif

// out[i] = a[i] . x for up to kLanes rank rows that lie `width` apart.
template <typename T, int N>
inline void dots(const T* a, const T* x, int64_t width, float* out) {
  Floats acc[N] = {};
  int64_t k = 0;
  for (; k + kBlock <= width; k += kBlock)
    for (int i = 0; i < N; ++i) dot_step(acc[i], a + i * width + k, x + k);
  if (k < width) {
    alignas(64) T xs[kBlock] = {}, as[kBlock] = {};
    std::memcpy(xs, x + k, (width - k) * sizeof(T));
    for (int i = 0; i < N; ++i) {
      std::memcpy(as, a + i * width + k, (width - k) * sizeof(T));
      dot_step(acc[i], as, xs);
    }
  }
  for (int i = 0; i < N; ++i) out[i] = sum(acc[i]);
}

template <typename T>
inline void dots_of(int lanes, const T* a, const T* x, int64_t width, float* out) {
  switch (lanes) {
    case 4: return dots<T, 4>(a, x, width, out);
    case 3: return dots<T, 3>(a, x, width, out);
    case 2: return dots<T, 2>(a, x, width, out);
    default: return dots<T, 1>(a, x, width, out);
  }
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
