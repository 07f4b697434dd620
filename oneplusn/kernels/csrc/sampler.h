// What is to be drawn; the arguments as `kernels/draw_native.py` lays them out.

#pragma once

#include <cstdint>

struct Draw {
  const void* logits;       // [rows, columns], bf16 or fp32
  const int64_t* rows;      // [count], which of them
  const float* factors;     // [count], 1 / temperature
  const int64_t* top_k;     // [count], 0 keeps everything
  const double* top_p;      // [count], 1 keeps everything
  const double* min_p;      // [count], 0 keeps everything
  const double* uniform;    // [count], in [0, 1)
  int64_t* tokens;          // [count], out; -1 where the logits hold no distribution
  int64_t columns, stride;
  int32_t count, is_bf16;
};
