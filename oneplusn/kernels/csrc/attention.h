// Attention over the paged KV cache, for rows of any length of context.
//
// A cache lies head by head, [Hkv][tokens][D], and a block of it is contiguous. Queries that read
// the same keys are computed together: the heads of a KV group, and in prefill rows of one sequence
// besides. Few queries meet four keys at a time as these lie; for many, sixteen keys are turned round
// first, and the sums run in the same order. Scores, sums and weights are fp32, and weights are
// divided by their sum at the end; a row's bits depend on its own context alone.

#pragma once

#include <cstdint>

extern "C" {

struct Attention {
  const void* q;                // [rows, H, D], strided
  const void* k;                // [Hkv][tokens][D]
  const void* v;                // [Hkv][tokens][Dv]
  void* out;                    // [rows, H, Dv]
  const int32_t* block_tables;  // [sequences, table_stride]
  const int32_t* sequences;     // [rows]
  const int32_t* lengths;       // [rows] tokens that each sees, from the first of its sequence on
  const float* sinks;           // [H] or null
  int64_t q_row_stride, q_head_stride, tokens, table_stride;
  int32_t rows, kv_heads, group, k_dim, v_dim, block_size;
  int32_t window;               // 0 = the whole context
  float scale, softcap;         // softcap 0 = none
};

}  // extern "C"

template <typename T>
void attention(const Attention& a, int threads);

// cache [heads][tokens][dim] at `place` = one row's [heads, dim], by the bits of its values.
template <typename U>
void write_cache(U* cache, const U* row, int64_t place, int heads, int dim, int64_t tokens,
                 int64_t head_stride);
