#include "attention.h"

#include <cmath>
#include <vector>

#include "team.h"
#include "vector.h"

namespace {

constexpr int kQueries = 4;   // whose sums are held in registers at once
constexpr int kItemRows = 4;  // rows of one sequence that an item takes
constexpr int64_t kParallelScores = 20'000;  // multiply-adds that outweigh telling the team

// Where the tokens from `first` to `stop` of a sequence lie, block by block.
struct Context {
  const int32_t* table;
  int first, stop, block_size;

  template <typename Visit>
  void each_block(Visit visit) const {
    for (int at = first; at < stop;) {
      const int inside = at % block_size;
      const int count = std::min(block_size - inside, stop - at);
      visit(at - first, (int64_t)table[at / block_size] * block_size + inside, count);
      at += count;
    }
  }
};

// The keys of what this thread attends to next: fetched while values are added up.
template <typename T>
struct Ahead {
  const T* k = nullptr;
  Context context = {};
  int dim = 0;

  void fetch(int at, int count) const {
    if (!k || context.first + at >= context.stop) return;
    const int token = context.first + at;
    const int64_t place = (int64_t)context.table[token / context.block_size] * context.block_size +
                          token % context.block_size;
    for (int i = 0; i < count * dim; i += 64 / (int)sizeof(T)) __builtin_prefetch(k + place * dim + i);
  }
};

template <typename T>
struct Query {
  const T* q;
  T* out;
  int first, stop;  // of the tokens that it sees
  float sink;
};

template <typename T, int M>
void write_scores(const Attention& a, const Context& context, const Query<T>* queries, const T* k,
                  int64_t to_values, float* s, int64_t stride) {
  const T* qs[M];
  for (int m = 0; m < M; ++m) qs[m] = queries[m].q;
  context.each_block([&](int at, int64_t place, int count) {
    const T* keys = k + place * a.k_dim;
    for (int i = 0; i < count * a.k_dim; i += 64 / (int)sizeof(T))
      __builtin_prefetch((const char*)(keys + i) + to_values);
    for (int j = 0; j < count; j += kLanes) {
      float values[M][kLanes];
      const char* behind = (const char*)(keys + (j + kLanes) * a.k_dim);
      dots<T, M>(keys + j * a.k_dim, std::min(kLanes, count - j), qs, a.k_dim, values,
                 [&] {
                   for (int i = 0; i < kLanes; ++i, behind += 64) __builtin_prefetch(behind);
                 });
      for (int m = 0; m < M; ++m) std::memcpy(s + m * stride + at + j, values[m], sizeof values[m]);
    }
  });
}

// Turn the scores from `first` to `stop` into weights that sum to 1 with the sink's; others get 0.
inline void soften(const Attention& a, float* s, int first, int stop, int count, float sink) {
  constexpr int kWide = 16;
  for (int j = 0; j < first; ++j) s[j] = -INFINITY;
  for (int j = stop; j < (count + kWide - 1) / kWide * kWide; ++j) s[j] = -INFINITY;
  Floats top = Floats{} + sink;
  const auto each = [&](auto visit) {
    for (int j = first / kWide * kWide; j < stop; j += kWide) {
      Floats x;
      std::memcpy(&x, s + j, sizeof x);
      visit(x);
      std::memcpy(s + j, &x, sizeof x);
    }
  };
  each([&](Floats& x) {
    x *= a.scale;
    if (a.softcap != 0.0f)
      for (int i = 0; i < kWide; ++i) x[i] = x[i] == -INFINITY ? x[i] : a.softcap * std::tanh(x[i] / a.softcap);
    top = x > top ? x : top;
  });
  float highest = top[0];
  for (int i = 1; i < kWide; ++i) highest = std::max(highest, top[i]);
  Floats total = {};
  each([&](Floats& x) {
    x = exponential(x - highest);
    total += x;
  });
  const float whole = sum(total) + (sink == -INFINITY ? 0.0f : std::exp(sink - highest));
  each([&](Floats& x) { x /= whole; });
  for (int j = 0; j < first / kWide * kWide; ++j) s[j] = 0.0f;
  for (int j = (stop + kWide - 1) / kWide * kWide; j < count; ++j) s[j] = 0.0f;
}

// Sums over the values' dimensions from `begin` on: V whole blocks, or the last ones that fill none.
template <typename T, int V, int M, bool kPart = false>
void add_values(const Attention& a, const Context& context, const Query<T>* queries, const T* v,
                const float* s, int64_t stride, int begin, const Ahead<T>& ahead) {
  const int rest = a.v_dim - begin;
  Pair acc[M][V] = {};
  context.each_block([&](int at, int64_t place, int count) {
    const T* values = v + place * a.v_dim + begin;
    if (begin == 0) ahead.fetch(at, count);
    for (int j = 0; j < count; ++j, values += a.v_dim)
      for (int i = 0; i < V; ++i) {
        const Pair value = kPart ? load_part(values, rest) : load(values + i * kBlock);
        for (int m = 0; m < M; ++m) {
          const float weight = s[m * stride + at + j];
          acc[m][i].first += weight * value.first;
          acc[m][i].second += weight * value.second;
        }
      }
  });
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < V; ++i) {
      T* to = queries[m].out + begin + i * kBlock;
      kPart ? store_part(to, acc[m][i], rest) : store(to, acc[m][i]);
    }
}

template <typename T, int M>
void attend_together(const Attention& a, const Query<T>* queries, const int32_t* table, const T* k,
                     const T* v, const Ahead<T>& ahead, std::vector<float>& scores) {
  Context context{table, queries[0].first, queries[0].stop, a.block_size};
  for (int m = 1; m < M; ++m) {
    context.first = std::min(context.first, queries[m].first);
    context.stop = std::max(context.stop, queries[m].stop);
  }
  context.first -= context.first % 16;  // so that a token's place in a vector is its own
  const int count = context.stop - context.first;
  const int64_t stride = (count + 15) / 16 * 16 + kLanes;
  scores.resize(M * stride);
  float* s = scores.data();
  const int64_t to_values = a.k_dim == a.v_dim ? (const char*)v - (const char*)k : 0;
  write_scores<T, M>(a, context, queries, k, to_values, s, stride);
  for (int m = 0; m < M; ++m)
    soften(a, s + m * stride, queries[m].first - context.first, queries[m].stop - context.first,
           count, queries[m].sink);
  int d = 0;
  for (; d + 4 * kBlock <= a.v_dim; d += 4 * kBlock)
    add_values<T, 4, M>(a, context, queries, v, s, stride, d, ahead);
  for (; d + 2 * kBlock <= a.v_dim; d += 2 * kBlock)
    add_values<T, 2, M>(a, context, queries, v, s, stride, d, ahead);
  for (; d + kBlock <= a.v_dim; d += kBlock)
    add_values<T, 1, M>(a, context, queries, v, s, stride, d, ahead);
  if (d < a.v_dim) add_values<T, 1, M, true>(a, context, queries, v, s, stride, d, ahead);
}

// Some rows of one sequence, and one KV head.
struct Item {
  int begin, end, kv_head;
};

inline int first_of(const Attention& a, int row) {
  return a.window && a.lengths[row] > a.window ? a.lengths[row] - a.window : 0;
}

inline Context context_of(const Attention& a, Item item) {
  const int32_t* table = a.block_tables + a.sequences[item.begin] * a.table_stride;
  const int first = first_of(a, item.begin);
  return {table, first - first % 16, a.lengths[item.end - 1], a.block_size};
}

template <typename T>
void attend(const Attention& a, Item item, const Item* next, std::vector<float>& scores) {
  constexpr int kMostHeads = 64;  // of a KV group, at a time
  Query<T> queries[kItemRows * kMostHeads];
  const T* k = (const T*)a.k + (int64_t)item.kv_head * a.tokens * a.k_dim;
  const T* v = (const T*)a.v + (int64_t)item.kv_head * a.tokens * a.v_dim;
  const int32_t* table = context_of(a, item).table;
  Ahead<T> ahead;
  if (next)
    ahead = {(const T*)a.k + (int64_t)next->kv_head * a.tokens * a.k_dim, context_of(a, *next), a.k_dim};
  for (int from = 0; from < a.group; from += kMostHeads) {
    const int heads = std::min(kMostHeads, a.group - from);
    int count = 0;
    for (int row = item.begin; row < item.end; ++row)
      for (int h = 0; h < heads; ++h) {
        const int head = item.kv_head * a.group + from + h;
        queries[count++] = {
            (const T*)a.q + row * a.q_row_stride + head * a.q_head_stride,
            (T*)a.out + ((int64_t)row * a.kv_heads * a.group + head) * a.v_dim,
            first_of(a, row), a.lengths[row], a.sinks ? a.sinks[head] : -INFINITY};
      }
    const Query<T>* at = queries;
    for (; count >= kQueries; count -= kQueries, at += kQueries, ahead.k = nullptr)
      attend_together<T, kQueries>(a, at, table, k, v, ahead, scores);
    switch (count) {
      case 3: attend_together<T, 3>(a, at, table, k, v, ahead, scores); break;
      case 2: attend_together<T, 2>(a, at, table, k, v, ahead, scores); break;
      case 1: attend_together<T, 1>(a, at, table, k, v, ahead, scores); break;
    }
  }
}

}  // namespace

template <typename T>
void attention(const Attention& a, int threads) {
  std::vector<Item> items;
  int64_t work = 0;
  for (int begin = 0, end; begin < a.rows; begin = end) {
    for (end = begin + 1; end < a.rows && end < begin + kItemRows; ++end)
      if (a.sequences[end] != a.sequences[begin]) break;
    for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head) items.push_back({begin, end, kv_head});
    work += (int64_t)a.lengths[end - 1] * (end - begin);
  }
  if (work * a.kv_heads * a.group * (a.k_dim + a.v_dim) / kBlock < kParallelScores) threads = 1;
  share(threads, items.size(), [&](int64_t i, int64_t next) {
    static thread_local std::vector<float> scores;
    attend<T>(a, items[i], next == kNone ? nullptr : &items[next], scores);
  });
}

template void attention<float>(const Attention&, int);
template void attention<BFloat16>(const Attention&, int);

namespace {

// What is not finite is kept as 0 or as the largest number: a stale value must not spread.
inline uint16_t finite(uint16_t x) {
  const bool odd = (x & 0x7f80) == 0x7f80;
  return odd ? ((x & 0x7f) ? 0 : (x & 0x8000) | 0x7f7f) : x;
}

inline uint32_t finite(uint32_t x) {
  const bool odd = (x & 0x7f800000u) == 0x7f800000u;
  return odd ? ((x & 0x7fffffu) ? 0 : (x & 0x80000000u) | 0x7f7fffffu) : x;
}

}  // namespace

template <typename U>
void write_cache(U* cache, const U* row, int64_t place, int heads, int dim, int64_t tokens,
                 int64_t head_stride) {
  for (int head = 0; head < heads; ++head) {
    U* target = cache + (head * tokens + place) * dim;
    const U* from = row + head * head_stride;
    for (int d = 0; d < dim; ++d) target[d] = finite(from[d]);
  }
}

template void write_cache(uint16_t*, const uint16_t*, int64_t, int, int, int64_t, int64_t);
template void write_cache(uint32_t*, const uint32_t*, int64_t, int, int, int64_t, int64_t);

extern "C" {

void oneplusn_attention(const Attention* a, int bf16, int threads) {
  bf16 ? attention<BFloat16>(*a, threads) : attention<float>(*a, threads);
}

// cache [heads][tokens][dim] at places[row] = source [rows, heads, dim], strided.
void oneplusn_write_cache(void* cache, const void* source, const int64_t* places, int bf16,
                          int64_t rows, int heads, int dim, int64_t tokens, int64_t row_stride,
                          int64_t head_stride) {
  for (int64_t row = 0; row < rows; ++row)
    if (bf16)
      write_cache((uint16_t*)cache, (const uint16_t*)source + row * row_stride, places[row], heads,
                  dim, tokens, head_stride);
    else
      write_cache((uint32_t*)cache, (const uint32_t*)source + row * row_stride, places[row], heads,
                  dim, tokens, head_stride);
}

}  // extern "C"
