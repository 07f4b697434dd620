// What lies between the matrix products of a decoder layer: norms, rotations, the gated activation.
//
// Each rounds where the modules of transformers round, except the rotation, which rounds once.

#include <cmath>

#include "vector.h"

namespace {

constexpr int64_t kParallelElements = 1 << 16;

template <typename T>
inline float mean_square(const T* x, int64_t width) {
  Floats total = {};
  for (int64_t i = 0; i < width; i += kBlock) {
    const Pair v = load_some(x + i, width - i);
    total += v.first * v.first;
    total += v.second * v.second;
  }
  return sum(total) / (float)width;
}

// out = w * (x / sqrt(mean(x^2) + eps)), for one row.
template <typename T>
inline void normalize(const T* x, const T* w, T* out, int64_t width, float eps) {
  const float scale = 1.0f / std::sqrt(mean_square(x, width) + eps);
  for (int64_t i = 0; i < width; i += kBlock) {
    const Pair v = load_some(x + i, width - i), weight = load_some(w + i, width - i);
    const Pair n = as_stored(x, {v.first * scale, v.second * scale});
    store_some(out + i, {n.first * weight.first, n.second * weight.second}, width - i);
  }
}

template <typename T>
void rms_norm(T* hs, const T* added, const T* w, T* out, int64_t rows, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    T* h = hs + row * width;
    if (added)
      for (int64_t i = 0; i < width; i += kBlock) {
        const Pair a = load_some(h + i, width - i);
        const Pair b = load_some(added + row * width + i, width - i);
        store_some(h + i, {a.first + b.first, a.second + b.second}, width - i);
      }
    normalize(h, w, out + row * width, width, eps);
  }
}

template <typename T>
void rotate_head(T* x, const T* cos, const T* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kBlock) {
    const int64_t left = half - i;
    const Pair a = load_some(x + i, left), b = load_some(x + half + i, left);
    const Pair c1 = load_some(cos + i, left), s1 = load_some(sin + i, left);
    const Pair c2 = load_some(cos + half + i, left), s2 = load_some(sin + half + i, left);
    store_some(x + i, {a.first * c1.first - b.first * s1.first,
                       a.second * c1.second - b.second * s1.second}, left);
    store_some(x + half + i, {b.first * c2.first + a.first * s2.first,
                              b.second * c2.second + a.second * s2.second}, left);
  }
}

template <typename T>
void rotate(T* x, int64_t stride, const T* cos, const T* sin, const T* q_norm, const T* k_norm,
            int64_t rows, int q_heads, int k_heads, int64_t dim, float eps, int threads) {
  const int heads = q_heads + k_heads;
  const bool parallel = threads > 1 && rows * heads * dim >= kParallelElements;
#pragma omp parallel for num_threads(threads) if (parallel)
  for (int64_t row = 0; row < rows; ++row)
    for (int head = 0; head < heads; ++head) {
      T* at = x + row * stride + head * dim;
      const T* w = head < q_heads ? q_norm : k_norm;
      if (w) normalize(at, w, at, dim, eps);
      rotate_head(at, cos + row * dim, sin + row * dim, dim / 2);
    }
}

// out = silu(x[:, :width]) * x[:, width:]
template <typename T>
void silu_mul(const T* x, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = x + row * 2 * width, *up = gate + width;
    T* to = out + row * width;
    for (int64_t i = 0; i < width; i += kBlock) {
      const Pair g = load_some(gate + i, width - i), u = load_some(up + i, width - i);
      const Pair s = as_stored(x, {g.first / (1.0f + exponential(-g.first)),
                                   g.second / (1.0f + exponential(-g.second))});
      store_some(to + i, {s.first * u.first, s.second * u.second}, width - i);
    }
  }
}

}  // namespace

extern "C" {

// h += added, if there is any; out = w * rms(h). h, added, out [rows, width].
void oneplusn_rms_norm(void* h, const void* added, const void* w, void* out, int bf16, int64_t rows,
                       int64_t width, float eps, int threads) {
  if (bf16)
    rms_norm((BFloat16*)h, (const BFloat16*)added, (const BFloat16*)w, (BFloat16*)out, rows, width,
             eps, threads);
  else
    rms_norm((float*)h, (const float*)added, (const float*)w, (float*)out, rows, width, eps,
             threads);
}

// Normalise, if there are weights, and rotate the heads at the start of each row, in place.
void oneplusn_rotate(void* x, int64_t stride, const void* cos, const void* sin, const void* q_norm,
                     const void* k_norm, int bf16, int64_t rows, int q_heads, int k_heads,
                     int64_t dim, float eps, int threads) {
  if (bf16)
    rotate((BFloat16*)x, stride, (const BFloat16*)cos, (const BFloat16*)sin,
           (const BFloat16*)q_norm, (const BFloat16*)k_norm, rows, q_heads, k_heads, dim, eps,
           threads);
  else
    rotate((float*)x, stride, (const float*)cos, (const float*)sin, (const float*)q_norm,
           (const float*)k_norm, rows, q_heads, k_heads, dim, eps, threads);
}

void oneplusn_silu_mul(const void* x, void* out, int bf16, int64_t rows, int64_t width,
                       int threads) {
  if (bf16)
    silu_mul((const BFloat16*)x, (BFloat16*)out, rows, width, threads);
  else
    silu_mul((const float*)x, (float*)out, rows, width, threads);
}

}  // extern "C"
