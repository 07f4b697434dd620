// Decoder layers of Llama's shape, one after another, in one call.
//
// Rounds where the modules of transformers round, except the rotation, which rounds once.

#include <chrono>
#include <cmath>
#include <vector>

#include "attention.h"
#include "delta.h"
#include "linear.h"
#include "team.h"
#include "vector.h"

extern "C" {

struct Layer {
  Linear qkv, o, gate_up, down;
  const Site *qkv_site, *o_site, *gate_up_site, *down_site;  // null where no adapter reaches
  const void *input_norm, *post_norm;                        // [K]
  const void *q_norm, *k_norm;                               // [D] or null
  void *k_cache, *v_cache;                                   // [Hkv][tokens][D]
  int64_t window;                                            // 0 = the whole context
};

struct Shape {
  int64_t hidden, inner, q_heads, kv_heads, dim, tokens, block_size;
  float eps, scale;
};

struct Batch {
  const int64_t* places;         // [rows] in the cache
  const void *cos, *sin;         // [rows, D]
  const int32_t* block_tables;   // [sequences, table_stride]
  const int32_t* sequences;      // [rows]
  const int32_t* lengths;        // [rows]
  const Step* step;              // null when no row is adapted
  double* seconds;               // [4] added to: linears, deltas, attention, others; or null
  int64_t rows, table_stride;
};

}  // extern "C"

namespace {

constexpr int64_t kParallelElements = 1 << 14;

enum Part { kLinears, kDeltas, kAttention, kOthers };  // of the time of a call

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
inline void add(T* h, const T* added, int64_t width) {
  for (int64_t i = 0; i < width; i += kBlock) {
    const Pair a = load_some(h + i, width - i), b = load_some(added + i, width - i);
    store_some(h + i, {a.first + b.first, a.second + b.second}, width - i);
  }
}

template <typename T>
inline void rotate_head(T* x, const T* cos, const T* sin, int64_t half) {
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

// out = silu(x[:width]) * x[width:], for one row.
template <typename T>
inline void silu_mul(const T* x, T* out, int64_t width) {
  for (int64_t i = 0; i < width; i += kBlock) {
    const Pair g = load_some(x + i, width - i), u = load_some(x + width + i, width - i);
    const Pair s = as_stored(x, {g.first / (1.0f + exponential(-g.first)),
                                 g.second / (1.0f + exponential(-g.second))});
    store_some(out + i, {s.first * u.first, s.second * u.second}, width - i);
  }
}

// Everything that a layer needs beside its weights; the buffers serve all layers in turn.
template <typename T>
struct Pass {
  const Shape& shape;
  const Batch& batch;
  T* h;         // [rows, hidden]
  int threads;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  std::vector<T> x, qkv, attended, out, inner, acted;

  Pass(const Shape& s, const Batch& b, T* h, int threads)
      : shape(s), batch(b), h(h), threads(threads), x(b.rows * s.hidden), qkv(b.rows * qkv_width()),
        attended(b.rows * s.q_heads * s.dim), out(b.rows * s.hidden), inner(b.rows * 2 * s.inner),
        acted(b.rows * s.inner) {}

  int64_t qkv_width() const { return (shape.q_heads + 2 * shape.kv_heads) * shape.dim; }

  // Count the time since the last call as one part's.
  void tally(Part part) {
    if (!batch.seconds) return;
    const auto now = std::chrono::steady_clock::now();
    batch.seconds[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }

  // body(row) for every row, by the team where there is enough to do.
  template <typename Body>
  void each_row(int64_t width, const Body& body) const {
    const int64_t most = std::max<int64_t>(1, kParallelElements / 4 / width);
    const int64_t items = (batch.rows + most - 1) / most;
    share(batch.rows * width < kParallelElements ? 1 : threads, items, [&](int64_t item, int64_t) {
      const int64_t end = std::min(batch.rows, (item + 1) * most);
      for (int64_t row = item * most; row < end; ++row) body(row);
    });
  }

  // y = x W^T, plus the delta of every slice; slices lie side by side.
  void site(const Linear& linear, const Site* adapted, const T* from, std::vector<T>& to) {
    tally(kOthers);
    multiply(linear, from, linear.width, to.data(), linear.columns, batch.rows, threads);
    tally(kLinears);
    if (!adapted || !batch.step) return;
    std::vector<T*> ys;
    for (int s = 0; s < adapted->slices; ++s) ys.push_back(to.data() + adapted->bounds[s]);
    const std::vector<int64_t> strides(adapted->slices, linear.columns);
    gated_delta(*adapted, *batch.step, from, linear.width, ys.data(), strides.data(), threads);
    tally(kDeltas);
  }

  void norm(const T* added, const void* weight) {
    each_row(shape.hidden, [&](int64_t row) {
      T* at = h + row * shape.hidden;
      if (added) add(at, added + row * shape.hidden, shape.hidden);
      normalize(at, (const T*)weight, x.data() + row * shape.hidden, shape.hidden, shape.eps);
    });
  }

  void rotate_and_keep(const Layer& layer) {
    const int64_t q = shape.q_heads, kv = shape.kv_heads, dim = shape.dim;
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    each_row(qkv_width(), [&](int64_t row) {
      T* at = qkv.data() + row * qkv_width();
      for (int64_t head = 0; head < q + kv; ++head) {
        const void* w = head < q ? layer.q_norm : layer.k_norm;
        if (w) normalize(at + head * dim, (const T*)w, at + head * dim, dim, shape.eps);
        rotate_head(at + head * dim, (const T*)batch.cos + row * dim,
                    (const T*)batch.sin + row * dim, dim / 2);
      }
      for (int which = 0; which < 2; ++which)
        write_cache((Bits*)(which ? layer.v_cache : layer.k_cache),
                    (const Bits*)(at + (q + which * kv) * dim), batch.places[row], (int)kv, (int)dim,
                    shape.tokens, dim);
    });
  }

  void attend(const Layer& layer) {
    const Attention a = {
        .q = qkv.data(), .k = layer.k_cache, .v = layer.v_cache, .out = attended.data(),
        .block_tables = batch.block_tables, .sequences = batch.sequences, .lengths = batch.lengths,
        .sinks = nullptr, .q_row_stride = qkv_width(), .q_head_stride = shape.dim,
        .tokens = shape.tokens, .table_stride = batch.table_stride, .rows = (int32_t)batch.rows,
        .kv_heads = (int32_t)shape.kv_heads, .group = (int32_t)(shape.q_heads / shape.kv_heads),
        .k_dim = (int32_t)shape.dim, .v_dim = (int32_t)shape.dim,
        .block_size = (int32_t)shape.block_size, .window = (int32_t)layer.window,
        .scale = shape.scale, .softcap = 0.0f};
    tally(kOthers);
    attention<T>(a, threads);
    tally(kAttention);
  }

  void layer(const Layer& layer, const T* added) {
    norm(added, layer.input_norm);
    site(layer.qkv, layer.qkv_site, x.data(), qkv);
    rotate_and_keep(layer);
    attend(layer);
    site(layer.o, layer.o_site, attended.data(), out);
    norm(out.data(), layer.post_norm);
    site(layer.gate_up, layer.gate_up_site, x.data(), inner);
    each_row(shape.inner, [&](int64_t row) {
      silu_mul(inner.data() + row * 2 * shape.inner, acted.data() + row * shape.inner, shape.inner);
    });
    site(layer.down, layer.down_site, acted.data(), out);
  }

  void layers(const Layer* all, int64_t count) {
    for (int64_t i = 0; i < count; ++i) layer(all[i], i ? out.data() : nullptr);
    each_row(shape.hidden, [&](int64_t row) {
      add(h + row * shape.hidden, out.data() + row * shape.hidden, shape.hidden);
    });
    tally(kOthers);
  }
};

}  // namespace

extern "C" {

// h [rows, hidden] goes through all layers, in place.
void oneplusn_layers(const Layer* layers, int64_t count, const Shape* shape, const Batch* batch,
                     int bf16, void* h, int threads) {
  if (bf16)
    Pass<BFloat16>(*shape, *batch, (BFloat16*)h, threads).layers(layers, count);
  else
    Pass<float>(*shape, *batch, (float*)h, threads).layers(layers, count);
}

}  // extern "C"
