#include "attention.h"

#include <cmath>
#include <vector>

#include "team.h"
#include "vector.h"

namespace {

constexpr int kBatch = 24;    // queries that read keys and values together
constexpr int kFew = 4;       // queries for which it does not pay to turn the keys round
constexpr int kScored = 4;    // queries whose sums with sixteen keys are held in registers
constexpr int kSummed = 6;    // queries whose sums of values are
constexpr int kKeys = 16;     // that are scored at once, one to a place in a vector
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
  float sink, whole = 0.0f;  // what its weights are to be divided by
};

// Queries that are attended from together, and the tokens that one of them sees.
template <typename T>
struct Batch {
  Query<T> queries[kBatch];
  int count = 0;
  Context context = {};

  void add(const Query<T>& query) {
    context.first = count ? std::min(context.first, query.first) : query.first;
    context.stop = count ? std::max(context.stop, query.stop) : query.stop;
    queries[count++] = query;
  }
};

// What a thread attends with, kept from item to item.
template <typename T>
struct Scratch {
  std::vector<float> scores;  // [queries][tokens, and some]
  std::vector<T> queries;     // [queries][dim, and zeros]
  std::vector<Words> keys;    // of sixteen tokens, column by column
};

// Sixteen rows of sixteen words become sixteen columns: words of neighbours side by side, then pairs
// of words, then every other lane of four words, twice.
inline void transpose(Words (&r)[kKeys]) {
  Words t[kKeys];
  for (int i = 0; i < kKeys; i += 2) {
    const Words x = r[i], y = r[i + 1];
    t[i] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] =
        __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < kKeys; i += 4)
    for (int half = 0; half < 2; ++half) {
      const Words x = t[i + half], y = t[i + half + 2];
      r[i + 2 * half] =
          __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * half + 1] =
          __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  const auto even = [](Words x, Words y) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](Words x, Words y) {
    return __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,
                                   31);
  };
  for (int c = 0; c < 4; ++c) {
    const Words p = even(r[c], r[4 + c]), q = odd(r[c], r[4 + c]);
    const Words u = even(r[8 + c], r[12 + c]), v = odd(r[8 + c], r[12 + c]);
    t[c] = even(p, u), t[4 + c] = even(q, v), t[8 + c] = odd(p, u), t[12 + c] = odd(q, v);
  }
  std::memcpy(&r, &t, sizeof r);
}

// s[m] = queries[m] . keys, which lie column by column. Adds up in the order of `dots`.
template <typename T, int M>
inline void score(const Words* keys, const T* queries, int64_t width, float* s, int64_t stride) {
  constexpr int depth = 4 / sizeof(T);
  Floats total[M];
  const auto product = [&](int m, int word) {
    Floats acc = {};
    for (int64_t i = word; i < width / depth; i += kKeys) {
      uint32_t x;
      std::memcpy(&x, queries + m * width + i * depth, sizeof x);
      multiply_add(acc, keys[i], x, queries);
    }
    return acc;
  };
  const auto four = [&](int m, int word) {
    const Floats first = product(m, word) + product(m, word + 1);
    return first + (product(m, word + 2) + product(m, word + 3));
  };
  for (int m = 0; m < M; ++m) total[m] = four(m, 0) + four(m, 8);
  for (int m = 0; m < M; ++m) total[m] += four(m, 4) + four(m, 12);
  for (int m = 0; m < M; ++m) std::memcpy(s + m * stride, &total[m], sizeof total[m]);
}

template <typename T, int M = kScored>
inline void score_some(int count, const Words* keys, const T* queries, int64_t width, float* s,
                       int64_t stride) {
  if (count == M) return score<T, M>(keys, queries, width, s, stride);
  if constexpr (M > 1) score_some<T, M - 1>(count, keys, queries, width, s, stride);
}

// The scores of many queries with the keys at `rows`, one key to a place of a vector.
template <typename T>
void score_keys(const T* const (&rows)[kKeys], int dim, int count, Scratch<T>& scratch, float* s,
                int64_t stride) {
  constexpr int elements = 64 / sizeof(T);
  const int64_t width = (dim + elements - 1) / elements * elements;
  scratch.keys.resize(width / elements * kKeys);
  for (int d = 0; d < dim; d += elements) {
    Words keys[kKeys] = {};
    for (int j = 0; j < kKeys; ++j)
      dim - d < elements ? std::memcpy(&keys[j], rows[j] + d, (dim - d) * sizeof(T))
                         : std::memcpy(&keys[j], rows[j] + d, sizeof keys[j]);
    transpose(keys);
    std::memcpy(scratch.keys.data() + d / elements * kKeys, keys, sizeof keys);
  }
  const int groups = (count + kScored - 1) / kScored;
  for (int group = 0; group < groups; ++group) {
    const int begin = count * group / groups;
    score_some<T>(count * (group + 1) / groups - begin, scratch.keys.data(),
                  scratch.queries.data() + begin * width, width, s + begin * stride, stride);
  }
}

// What lies behind the last token is written too.
template <typename T>
void score_many(const Attention& a, const Batch<T>& batch, const T* k, Scratch<T>& scratch,
                int64_t stride) {
  constexpr int elements = 64 / sizeof(T);
  const int64_t width = (a.k_dim + elements - 1) / elements * elements;
  scratch.queries.assign(batch.count * width, T{});
  for (int m = 0; m < batch.count; ++m)
    std::memcpy(scratch.queries.data() + m * width, batch.queries[m].q, a.k_dim * sizeof(T));
  const T* rows[kKeys];
  int found = 0;
  float* s = scratch.scores.data();
  batch.context.each_block([&](int, int64_t place, int count) {
    const T* key = k + place * a.k_dim;
    for (int j = 0; j < count; ++j, key += a.k_dim) {
      rows[found++] = key;
      if (found < kKeys) continue;
      score_keys(rows, a.k_dim, batch.count, scratch, s, stride);
      found = 0, s += kKeys;
    }
  });
  if (!found) return;
  for (int j = found; j < kKeys; ++j) rows[j] = rows[found - 1];
  score_keys(rows, a.k_dim, batch.count, scratch, s, stride);
}

template <typename T, int M>
void score_few(const Attention& a, const Batch<T>& batch, const T* k, int64_t to_values, float* s,
               int64_t stride) {
  const T* qs[M];
  for (int m = 0; m < M; ++m) qs[m] = batch.queries[m].q;
  batch.context.each_block([&](int at, int64_t place, int count) {
    const T* keys = k + place * a.k_dim;
    for (int i = 0; i < count * a.k_dim; i += 64 / (int)sizeof(T))
      __builtin_prefetch((const char*)(keys + i) + to_values);
    for (int j = 0; j < count; j += kLanes) {
      float values[M][kLanes];
      const char* behind = (const char*)(keys + (j + kLanes) * a.k_dim);
      dots<T, M>(keys + j * a.k_dim, std::min(kLanes, count - j), qs, a.k_dim, values, [&] {
        for (int i = 0; i < kLanes; ++i, behind += 64) __builtin_prefetch(behind);
      });
      for (int m = 0; m < M; ++m) std::memcpy(s + m * stride + at + j, values[m], sizeof values[m]);
    }
  });
}

template <typename T, int M = kFew>
void write_scores(const Attention& a, const Batch<T>& batch, const T* k, int64_t to_values,
                  Scratch<T>& scratch, int64_t stride) {
  if (batch.count > M) return score_many(a, batch, k, scratch, stride);
  if (batch.count == M)
    return score_few<T, M>(a, batch, k, to_values, scratch.scores.data(), stride);
  if constexpr (M > 1) write_scores<T, M - 1>(a, batch, k, to_values, scratch, stride);
}

// Turn the scores from `first` to `stop` into weights, others into 0; return what they sum to.
inline float soften(const Attention& a, float* s, int first, int stop, int count, float sink) {
  for (int j = 0; j < first; ++j) s[j] = -INFINITY;
  for (int j = stop; j < (count + kKeys - 1) / kKeys * kKeys; ++j) s[j] = -INFINITY;
  Floats top = Floats{} + sink;
  const auto each = [&](auto visit) {
    for (int j = first / kKeys * kKeys; j < stop; j += kKeys) {
      Floats x;
      std::memcpy(&x, s + j, sizeof x);
      visit(x);
      std::memcpy(s + j, &x, sizeof x);
    }
  };
  each([&](Floats& x) {
    x *= a.scale;
    if (a.softcap != 0.0f)
      for (int i = 0; i < kKeys; ++i)
        if (x[i] != -INFINITY) x[i] = a.softcap * std::tanh(x[i] / a.softcap);
    top = x > top ? x : top;
  });
  float highest = top[0];
  for (int i = 1; i < kKeys; ++i) highest = std::max(highest, top[i]);
  Floats total = {};
  each([&](Floats& x) {
    x = exponential(x - highest);
    total += x;
  });
  for (int j = 0; j < first / kKeys * kKeys; ++j) s[j] = 0.0f;
  for (int j = (stop + kKeys - 1) / kKeys * kKeys; j < count; ++j) s[j] = 0.0f;
  return sum(total) + (sink == -INFINITY ? 0.0f : std::exp(sink - highest));
}

// Sums over the values' dimensions from `begin` on: V whole blocks, or the last ones that fill none.
template <typename T, int V, bool kPart, int M>
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
      acc[m][i].first /= queries[m].whole;
      acc[m][i].second /= queries[m].whole;
      kPart ? store_part(to, acc[m][i], rest) : store(to, acc[m][i]);
    }
}

template <typename T, int V, bool kPart = false, int M = kSummed>
void add_values_of(int count, const Attention& a, const Context& context, const Query<T>* queries,
                   const T* v, const float* s, int64_t stride, int begin, const Ahead<T>& ahead) {
  if (count == M)
    return add_values<T, V, kPart, M>(a, context, queries, v, s, stride, begin, ahead);
  if constexpr (M > 1)
    add_values_of<T, V, kPart, M - 1>(count, a, context, queries, v, s, stride, begin, ahead);
}

template <typename T>
void attend_together(const Attention& a, Batch<T>& batch, const T* k, const T* v, Ahead<T> ahead,
                     Scratch<T>& scratch) {
  Context& context = batch.context;
  context.first -= context.first % kKeys;  // so that a token's place in a vector is its own
  const int count = context.stop - context.first;
  const int64_t stride = (count + kKeys - 1) / kKeys * kKeys + kLanes;
  const size_t needed = batch.count * stride;
  if (scratch.scores.size() < needed) scratch.scores.resize(needed);
  const int64_t to_values = a.k_dim == a.v_dim ? (const char*)v - (const char*)k : 0;
  write_scores(a, batch, k, to_values, scratch, stride);
  for (int m = 0; m < batch.count; ++m) {
    Query<T>& query = batch.queries[m];
    query.whole = soften(a, scratch.scores.data() + m * stride, query.first - context.first,
                         query.stop - context.first, count, query.sink);
  }
  const int groups = (batch.count + kSummed - 1) / kSummed;
  for (int group = 0; group < groups; ++group, ahead.k = nullptr) {
    const int begin = batch.count * group / groups;
    const int of_group = batch.count * (group + 1) / groups - begin;
    const Query<T>* queries = batch.queries + begin;
    const float* s = scratch.scores.data() + begin * stride;
    int d = 0;
    for (; d + 2 * kBlock <= a.v_dim; d += 2 * kBlock)
      add_values_of<T, 2>(of_group, a, context, queries, v, s, stride, d, ahead);
    for (; d + kBlock <= a.v_dim; d += kBlock)
      add_values_of<T, 1>(of_group, a, context, queries, v, s, stride, d, ahead);
    if (d < a.v_dim)
      add_values_of<T, 1, true>(of_group, a, context, queries, v, s, stride, d, ahead);
  }
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
void attend(const Attention& a, Item item, const Item* next, Scratch<T>& scratch) {
  const T* k = (const T*)a.k + (int64_t)item.kv_head * a.tokens * a.k_dim;
  const T* v = (const T*)a.v + (int64_t)item.kv_head * a.tokens * a.v_dim;
  Ahead<T> ahead;
  if (next)
    ahead = {(const T*)a.k + (int64_t)next->kv_head * a.tokens * a.k_dim, context_of(a, *next),
             a.k_dim};
  const int total = (item.end - item.begin) * a.group, batches = (total + kBatch - 1) / kBatch;
  for (int b = 0; b < batches; ++b, ahead.k = nullptr) {
    Batch<T> batch;
    batch.context = context_of(a, item);
    for (int i = (int64_t)total * b / batches; i < (int64_t)total * (b + 1) / batches; ++i) {
      const int row = item.begin + i / a.group, head = item.kv_head * a.group + i % a.group;
      batch.add({(const T*)a.q + row * a.q_row_stride + head * a.q_head_stride,
                 (T*)a.out + ((int64_t)row * a.kv_heads * a.group + head) * a.v_dim,
                 first_of(a, row), a.lengths[row], a.sinks ? a.sinks[head] : -INFINITY});
    }
    attend_together(a, batch, k, v, ahead, scratch);
  }
}

}  // namespace

template <typename T>
void attention(const Attention& a, int threads) {
  std::vector<Item> items;
  int64_t work = 0;
  const int most = std::max(1, kBatch / a.group);
  for (int begin = 0, end; begin < a.rows; begin = end) {
    for (end = begin + 1; end < a.rows && end < begin + most; ++end)
      if (a.sequences[end] != a.sequences[begin]) break;
    for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head) items.push_back({begin, end, kv_head});
    work += (int64_t)a.lengths[end - 1] * (end - begin);
  }
  if (work * a.kv_heads * a.group * (a.k_dim + a.v_dim) / kBlock < kParallelScores) threads = 1;
  share(threads, items.size(), [&](int64_t i, int64_t next) {
    static thread_local Scratch<T> scratch;
    attend<T>(a, items[i], next == kNone ? nullptr : &items[next], scratch);
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
