// Attention over the paged KV cache: rows that see a whole context each, as decoding has them.
//
// A cache lies head by head, [Hkv][tokens][D], and a block of it is contiguous. The query heads of
// a KV head are computed together, so keys and values are read once for all of them. Scores, sums
// and weights are fp32; a row's bits depend on its own context alone.

#include <cmath>
#include <vector>

#include "vector.h"

extern "C" {

struct Attention {
  const void* q;                // [rows, H, D], strided
  const void* k;                // [Hkv][tokens][D]
  const void* v;                // [Hkv][tokens][Dv]
  void* out;                    // [rows, H, Dv]
  const int32_t* block_tables;  // [rows, table_stride]
  const int32_t* context_lens;  // [rows]
  const float* sinks;           // [H] or null
  int64_t q_row_stride, q_head_stride, tokens, table_stride;
  int32_t rows, kv_heads, group, k_dim, v_dim, block_size;
  int32_t window;               // 0 = the whole context
  float scale, softcap;         // softcap 0 = none
};

}  // extern "C"

namespace {

constexpr int kHeads = 4;  // query heads whose sums are held in registers at once
constexpr int64_t kParallelWork = 300'000;  // keys and values times heads that outweigh a barrier

// Where the tokens of a row lie: block by block, from the first that the window leaves.
struct Context {
  const int32_t* table;
  int first, length, block_size;

  template <typename Visit>
  void each_block(Visit visit) const {
    for (int at = first; at < length;) {
      const int inside = at % block_size;
      const int count = std::min(block_size - inside, length - at);
      visit(at - first, (int64_t)table[at / block_size] * block_size + inside, count);
      at += count;
    }
  }
};

template <typename T>
void write_scores(const Attention& a, const Context& context, const T* q, const T* k, float* s) {
  context.each_block([&](int at, int64_t place, int count) {
    const T* keys = k + place * a.k_dim;
    for (int j = 0; j < count; j += kLanes)
      dots_of(std::min(kLanes, count - j), keys + j * a.k_dim, q, a.k_dim, s + at + j);
  });
}

// Turn scores into weights that sum to 1 with the sink's; the tail of the last vector is unused.
void soften(const Attention& a, float* s, int length, const float* sink) {
  float top = sink ? *sink : -INFINITY;
  for (int j = 0; j < length; ++j) {
    s[j] *= a.scale;
    if (a.softcap != 0.0f) s[j] = a.softcap * std::tanh(s[j] / a.softcap);
    top = std::max(top, s[j]);
  }
  for (int j = length; j % 16; ++j) s[j] = -INFINITY;
  Floats total = {};
  for (int j = 0; j < length; j += 16) {
    Floats x;
    std::memcpy(&x, s + j, sizeof x);
    x = exponential(x - top);
    total += x;
    std::memcpy(s + j, &x, sizeof x);
  }
  const float whole = sum(total) + (sink ? std::exp(*sink - top) : 0.0f);
  for (int j = 0; j < length; ++j) s[j] /= whole;
}

template <typename T, int V, int H>
void add_values(const Attention& a, const Context& context, const T* v, const float* s,
                int64_t s_stride, T* out) {
  Pair acc[H][V] = {};
  context.each_block([&](int at, int64_t place, int count) {
    const T* values = v + place * a.v_dim;
    for (int j = 0; j < count; ++j, values += a.v_dim)
      for (int i = 0; i < V; ++i) {
        const Pair value = load(values + i * kBlock);
        for (int h = 0; h < H; ++h) {
          const float weight = s[h * s_stride + at + j];
          acc[h][i].first += weight * value.first;
          acc[h][i].second += weight * value.second;
        }
      }
  });
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < V; ++i) store(out + h * a.v_dim + i * kBlock, acc[h][i]);
}

template <typename T, int V>
void add_values_of(int heads, const Attention& a, const Context& context, const T* v,
                   const float* s, int64_t s_stride, T* out) {
  switch (heads) {
    case 4: return add_values<T, V, 4>(a, context, v, s, s_stride, out);
    case 3: return add_values<T, V, 3>(a, context, v, s, s_stride, out);
    case 2: return add_values<T, V, 2>(a, context, v, s, s_stride, out);
    default: return add_values<T, V, 1>(a, context, v, s, s_stride, out);
  }
}

template <typename T>
void attend(const Attention& a, int row, int kv_head, std::vector<float>& scores) {
  const int length = a.context_lens[row];
  const int first = a.window && length > a.window ? length - a.window : 0;
  const Context context{a.block_tables + row * a.table_stride, first, length, a.block_size};
  const int count = length - first;
  const int64_t stride = (count + 15) / 16 * 16;
  scores.resize(kHeads * stride);
  const T* k = (const T*)a.k + (int64_t)kv_head * a.tokens * a.k_dim;
  const T* v = (const T*)a.v + (int64_t)kv_head * a.tokens * a.v_dim;
  for (int done = 0; done < a.group; done += kHeads) {
    const int heads = std::min(kHeads, a.group - done), head = kv_head * a.group + done;
    for (int h = 0; h < heads; ++h) {
      const T* q = (const T*)a.q + row * a.q_row_stride + (head + h) * a.q_head_stride;
      write_scores(a, context, q, k, &scores[h * stride]);
      soften(a, &scores[h * stride], count, a.sinks ? a.sinks + head + h : nullptr);
    }
    T* out = (T*)a.out + ((int64_t)row * a.kv_heads * a.group + head) * a.v_dim;
    switch (a.v_dim / kBlock) {
      case 1: add_values_of<T, 1>(heads, a, context, v, scores.data(), stride, out); break;
      case 2: add_values_of<T, 2>(heads, a, context, v, scores.data(), stride, out); break;
      case 3: add_values_of<T, 3>(heads, a, context, v, scores.data(), stride, out); break;
      case 4: add_values_of<T, 4>(heads, a, context, v, scores.data(), stride, out); break;
      default: add_values_of<T, 8>(heads, a, context, v, scores.data(), stride, out); break;
    }
  }
}

template <typename T>
void attention(const Attention& a, int threads) {
  int64_t work = 0;
  for (int row = 0; row < a.rows; ++row)
    work += (int64_t)a.context_lens[row] * a.kv_heads * a.group * (a.k_dim + a.v_dim) / 8;
#pragma omp parallel num_threads(threads) if (threads > 1 && work >= kParallelWork)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
    for (int item = 0; item < a.rows * a.kv_heads; ++item)
      attend<T>(a, item / a.kv_heads, item % a.kv_heads, scores);
  }
}

// What is not finite is kept as 0 or as the largest number: a stale value must not spread.
inline uint16_t finite(uint16_t x) {
  const bool odd = (x & 0x7f80) == 0x7f80;
  return odd ? ((x & 0x7f) ? 0 : (x & 0x8000) | 0x7f7f) : x;
}

inline uint32_t finite(uint32_t x) {
  const bool odd = (x & 0x7f800000u) == 0x7f800000u;
  return odd ? ((x & 0x7fffffu) ? 0 : (x & 0x80000000u) | 0x7f7fffffu) : x;
}

template <typename U>
void write_cache(U* cache, const U* source, const int64_t* places, int rows, int heads, int dim,
                 int64_t tokens, int64_t row_stride, int64_t head_stride) {
  for (int row = 0; row < rows; ++row)
    for (int head = 0; head < heads; ++head) {
      U* target = cache + (head * tokens + places[row]) * dim;
      const U* from = source + row * row_stride + head * head_stride;
      for (int d = 0; d < dim; ++d) target[d] = finite(from[d]);
    }
}

}  // namespace

extern "C" {

void oneplusn_attention(const Attention* a, int bf16, int threads) {
  bf16 ? attention<BFloat16>(*a, threads) : attention<float>(*a, threads);
}

// cache [heads][tokens][dim] at places[row] = source [rows, heads, dim], strided.
void oneplusn_write_cache(void* cache, const void* source, const int64_t* places, int bf16, int rows,
                          int heads, int dim, int64_t tokens, int64_t row_stride,
                          int64_t head_stride) {
  if (bf16)
    write_cache((uint16_t*)cache, (const uint16_t*)source, places, rows, heads, dim, tokens,
                row_stride, head_stride);
  else
    write_cache((uint32_t*)cache, (const uint32_t*)source, places, rows, heads, dim, tokens,
                row_stride, head_stride);
}

}  // extern "C"
