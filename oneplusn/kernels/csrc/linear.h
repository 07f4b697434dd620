// A linear layer over weights that lie in the order in which they are read.
//
// A panel is 32 outputs. Step by step it holds the weights of two inputs in bf16, of one in fp32,
// for all 32: 128 bytes, read from first to last for every group of rows. In 8 bits it holds those of
// two inputs, 64 bytes, which every group widens in registers (widen.h); scales come last. A row's
// sums run over its inputs in their order, so its bits depend on nothing else in the batch.

#pragma once

#include <cstdint>

extern "C" {

// Weights `[ceil(N / 32)][ceil(K / depth)][32][depth]`, zeros where there are none.
struct Linear {
  const void* panels;
  const void* bias;     // [N] or null
  const float* scales;  // [N] up to whole panels, where these are in 8 bits; or null
  int64_t width;        // K, a multiple of the depth
  int64_t columns;      // N
};

}  // extern "C"

// y = x W^T + bias, for all rows; strides are in elements, columns lie together.
template <typename T>
void multiply(const Linear& linear, const T* x, int64_t x_stride, T* y, int64_t y_stride,
              int64_t rows, int threads);
