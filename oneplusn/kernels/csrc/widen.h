// Weights in 8 bits, on their way into a product of bf16.

#pragma once

#include "vector.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

// 32 pairs of numbers in 8 bits, sign and magnitude, become as many pairs in bf16, which holds all
// such numbers. Pairs come four of out[0], four of out[1], and so on.
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
struct Bf16Bytes {
  uint8_t low[128], high[128];  // of the bf16 of 0 .. 127
};

constexpr Bf16Bytes bf16_bytes() {
  Bf16Bytes out = {};
  for (int i = 1; i < 128; ++i) {
    const int log = 31 - __builtin_clz(i), bits = (127 + log) << 7 | (i << (7 - log) & 0x7f);
    out.low[i] = bits & 0xff;
    out.high[i] = bits >> 8;
  }
  return out;
}

alignas(64) constexpr Bf16Bytes kBf16Bytes = bf16_bytes();

inline void widen(const char* p, Words (&out)[2]) {
  const __m512i codes = _mm512_loadu_si512(p);
  const auto lookup = [&](const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
  };
  const __m512i sign = _mm512_set1_epi8((char)0x80), low = lookup(kBf16Bytes.low);
  const __m512i high = _mm512_ternarylogic_epi32(lookup(kBf16Bytes.high), codes, sign, 0xf8);
  out[0] = (Words)_mm512_unpacklo_epi8(low, high);
  out[1] = (Words)_mm512_unpackhi_epi8(low, high);
}
#else
inline void widen(const char* p, Words (&out)[2]) {
  typedef uint16_t Pairs __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  Pairs all;
  std::memcpy(&all, p, sizeof all);
  const Halves halves[2] = {
      __builtin_shufflevector(all, all, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
      __builtin_shufflevector(all, all, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)};
  const auto one = [](Words code) {
    const Ints magnitude = (Ints)(code & 0x7fu);
    return as_words(__builtin_convertvector(magnitude, Floats)) | (code & 0x80u) << 24;
  };
  for (int i = 0; i < 2; ++i) {
    const Words pair = __builtin_convertvector(halves[i], Words);
    out[i] = one(pair) >> 16 | one(pair >> 8);
  }
}
#endif

}  // namespace
