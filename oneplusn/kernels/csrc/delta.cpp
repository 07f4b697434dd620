#include "delta.h"

#include <atomic>
#include <utility>

#include "delta_layout.h"
#include "team.h"
#include "vector.h"

namespace {

constexpr int kShrinkRows = 4;  // rows that meet rank rows at once
constexpr int64_t kParallelWork = 100'000;  // bytes + multiply-adds that outweigh telling the team

template <typename T>
constexpr int kRankDepth = 4 / sizeof(T);  // rank rows that one step of the expansion takes

template <typename T, int M>
void shrink_rows(const Site& site, const Layout<T>& layout, const Group& group, Atom atom, int first,
                 T* h, Ahead& ahead) {
  const T* a = (const T*)site.a +
               ((group.first_page + atom.part) * site.slices + atom.slice) * kPage * site.width;
  const Meeting<T>* meetings = layout.meetings.data() + group.begin + first;
  const T* xs[M];
  for (int m = 0; m < M; ++m) xs[m] = meetings[m].x;
  h += group.h + atom.slice * group.of_slice + (int64_t)first * padded(group.total);
  const int end = std::min(group.total - atom.part * kPage, kPage);
  for (int lane = 0; lane < end; lane += kLanes) {
    const int lanes = std::min(end - lane, kLanes), row = atom.part * kPage + lane;
    alignas(16) float values[M][kLanes];
    dots<T, M>(a + lane * site.width, lanes, xs, site.width, values,
               [&] { ahead.fetch(); });
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < lanes; ++i) values[m][i] *= meetings[m].gates[row + i];
      for (int i = lanes; i < kLanes; ++i) values[m][i] = 0.0f;
      store_lanes(h + m * padded(group.total) + row, values[m]);
    }
  }
}

template <typename T>
void shrink_page(const Site& site, const Layout<T>& layout, Atom atom, T* h, Ahead& ahead) {
  const Group& group = layout.groups[atom.owner];
  const int rows = group.end - group.begin;
  int at = 0;
  for (; at + kShrinkRows <= rows; at += kShrinkRows)
    shrink_rows<T, kShrinkRows>(site, layout, group, atom, at, h, ahead);
  switch (rows - at) {
    case 3: return shrink_rows<T, 3>(site, layout, group, atom, at, h, ahead);
    case 2: return shrink_rows<T, 2>(site, layout, group, atom, at, h, ahead);
    case 1: return shrink_rows<T, 1>(site, layout, group, atom, at, h, ahead);
  }
}

// The words of a block of columns for one step of rank rows: two rows mixed in bf16, one in fp32.
template <bool kPart>
inline void rank_words(const BFloat16* row, int64_t stride, bool both, int rest, Words& low,
                       Words& high) {
  alignas(64) BFloat16 part[2][kBlock] = {};
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves x, y = {};
  if (kPart) {
    std::memcpy(part[0], row, rest * sizeof *row);
    if (both) std::memcpy(part[1], row + stride, rest * sizeof *row);
    std::memcpy(&x, part[0], sizeof x);
    std::memcpy(&y, part[1], sizeof y);
  } else {
    std::memcpy(&x, row, sizeof x);
    if (both) std::memcpy(&y, row + stride, sizeof y);
  }
  const Halves even = __builtin_shufflevector(
      x, y, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51,
      24, 56, 25, 57, 26, 58, 27, 59);
  const Halves odd = __builtin_shufflevector(
      x, y, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23,
      55, 28, 60, 29, 61, 30, 62, 31, 63);
  std::memcpy(&low, &even, sizeof low);
  std::memcpy(&high, &odd, sizeof high);
}

template <bool kPart>
inline void rank_words(const float* row, int64_t, bool, int rest, Words& low, Words& high) {
  alignas(64) float part[kBlock] = {};
  if (kPart) std::memcpy(part, row, rest * sizeof *row);
  const float* from = kPart ? part : row;
  std::memcpy(&low, from, sizeof low);
  std::memcpy(&high, from + kBlock / 2, sizeof high);
}

// Put the sums over `rank_words` into the order of the columns.
inline void in_order(Floats (&v)[2], const BFloat16*) {
  const Floats a = v[0], b = v[1];
  v[0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  v[1] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}

inline void in_order(Floats (&)[2], const float*) {}

// Columns of one slice, from `begin` on: whole blocks, or one of `rest` columns.
struct Columns {
  int slice, begin, rest;
};

// acc[m] += h[m] B, over the rank rows of a run, in blocks of columns side by side.
template <typename T, int M, int V, bool kPart>
__attribute__((always_inline)) inline void add_run(const T* at, int64_t stride, int total, int rest,
                                                   const T* h, Floats (*sums)[V][2], Ahead& ahead) {
  const int of_row = padded(total);
  Floats acc[M][V][2];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < 2; ++i) acc[m][v][i] = sums[m][v][i];
  Ahead local = ahead;
  for (int r = 0; r < total; r += kRankDepth<T>, at += kRankDepth<T> * stride) {
    uint32_t scales[M];
    for (int m = 0; m < M; ++m) std::memcpy(&scales[m], h + m * of_row + r, sizeof scales[m]);
    for (int byte = 0; byte < V * kRankDepth<T> * kBlock * (int)sizeof(T); byte += kFour) local.fetch();
    for (int v = 0; v < V; ++v) {
      Words low, high;
      rank_words<kPart>(at + v * kBlock, stride, r + 1 < total, rest, low, high);
      for (int m = 0; m < M; ++m) {
        multiply_add(acc[m][v][0], low, scales[m], at);
        multiply_add(acc[m][v][1], high, scales[m], at);
      }
    }
  }
  ahead = local;
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < 2; ++i) sums[m][v][i] = acc[m][v][i];
}

template <typename T, int M, int V, bool kPart>
void expand_rows(const Site& site, const Step& step, const Layout<T>& layout, const Tile& tile,
                 Columns columns, T* y, int64_t y_stride, Ahead& ahead) {
  const int64_t stride = site.bounds[site.slices];
  const T* b = (const T*)site.b + site.bounds[columns.slice] + columns.begin;
  Floats acc[M][V][2] = {};
  for (int u = tile.begin; u < tile.end; ++u) {
    const Use use = layout.uses[u];
    const Group& group = layout.groups[use.group];
    const T* at = b + group.first_page * kPage * stride;
    const T* h = layout.h.data() + group.h + columns.slice * group.of_slice +
                 (int64_t)(use.meeting - group.begin) * padded(group.total);
    if (use.mask == (1u << M) - 1) {
      add_run<T, M, V, kPart>(at, stride, group.total, columns.rest, h, acc, ahead);
      continue;
    }
    const auto one = [&](int m) __attribute__((always_inline)) {
      if (!(use.mask >> m & 1)) return;
      add_run<T, 1, V, kPart>(at, stride, group.total, columns.rest, h, acc + m, ahead);
      h += padded(group.total);
    };
    [&]<int... m>(std::integer_sequence<int, m...>) __attribute__((always_inline)) {
      (one(m), ...);
    }(std::make_integer_sequence<int, M>());
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = y + step.rows[tile.first + m] * y_stride + columns.begin + v * kBlock;
      alignas(64) T part[kBlock] = {};
      if (kPart) std::memcpy(part, to, columns.rest * sizeof(T));
      Floats out[2];
      load_columns(kPart ? part : to, out);
      in_order(acc[m][v], to);
      for (int i = 0; i < 2; ++i) out[i] += acc[m][v][i];
      store_columns(kPart ? part : to, out);
      if (kPart) std::memcpy(to, part, columns.rest * sizeof(T));
    }
}

// The columns of one atom, for the rows of one tile.
template <typename T, int M = kTile>
void expand_tile(const Site& site, const Step& step, const Layout<T>& layout, const Tile& tile,
                 Columns columns, int count, T* y, int64_t y_stride, Ahead& ahead) {
  if constexpr (M > 1)
    if (tile.rows < M)
      return expand_tile<T, M - 1>(site, step, layout, tile, columns, count, y, y_stride, ahead);
  constexpr int V = M <= 2 ? 4 : M <= 4 ? 2 : 1;
  const int end = columns.begin + count;
  int& at = columns.begin;
  for (; at + V * kBlock <= end; at += V * kBlock)
    expand_rows<T, M, V, false>(site, step, layout, tile, columns, y, y_stride, ahead);
  if constexpr (V > 1)
    for (; at + kBlock <= end; at += kBlock)
      expand_rows<T, M, 1, false>(site, step, layout, tile, columns, y, y_stride, ahead);
  columns.rest = end - at;
  if (columns.rest)
    expand_rows<T, M, 1, true>(site, step, layout, tile, columns, y, y_stride, ahead);
}

// Visit what an item reads of the pages, as (from, stride in bytes, rows, bytes of each).
template <typename T, typename Visit>
void each_stretch(const Site& site, const Layout<T>& layout, int64_t item, const Visit& visit) {
  const int64_t stride = site.bounds[site.slices];
  for (int i = layout.items[item]; i < layout.items[item + 1]; ++i) {
    const auto [owner, slice, part] = layout.atoms[i];
    if (item < layout.shrinks) {
      const Group& group = layout.groups[owner];
      const int64_t at = ((group.first_page + part) * site.slices + slice) * kPage * site.width;
      const int64_t rows = std::min(group.total - part * kPage, kPage);
      visit((const T*)site.a + at, 0, 1, rows * site.width * (int64_t)sizeof(T));
      continue;
    }
    const int begin = site.bounds[slice] + part;
    const int64_t count = std::min(kColumns, site.bounds[slice + 1] - begin);
    for (int g = layout.clusters[owner].first_group; g < layout.clusters[owner].end_group; ++g) {
      const Group& group = layout.groups[g];
      visit((const T*)site.b + group.first_page * kPage * stride + begin,
            stride * (int64_t)sizeof(T), group.total, count * (int64_t)sizeof(T));
    }
  }
}

}  // namespace

template <typename T>
void gated_delta(const Site& site, const Step& step, const T* x, int64_t x_stride, T* const* ys,
                 const int64_t* y_strides, int threads) {
  static thread_local Layout<T> kept;  // its memory serves the next site too
  Layout<T>& layout = kept;
  layout.make(site, step, x, x_stride);
  if (!layout.work) return;
  if (layout.work < kParallelWork) threads = 1;
  T* h = layout.h.data();
  std::atomic<int> shrinks = layout.shrinks;
  share(threads, (int64_t)layout.items.size() - 1, [&](int64_t item, int64_t next) {
    static thread_local std::vector<const char*> lines;
    int64_t now = 0, then = 0;
    each_stretch(site, layout, item, [&](const void*, int64_t, int rows, int64_t bytes) {
      now += rows * fours(bytes);
    });
    if (next != kNone) {
      each_stretch(site, layout, next, [&](const void*, int64_t, int rows, int64_t bytes) {
        then += rows * fours(bytes);
      });
      if ((int64_t)lines.size() < then) lines.resize(then);
      const char** to = lines.data();
      each_stretch(site, layout, next, [&](const void* from, int64_t stride, int rows, int64_t bytes) {
        const char* row = (const char*)from;
        for (int r = 0; r < rows; ++r, row += stride)
          for (int64_t at = 0; at < bytes; at += kFour) *to++ = row + at;
      });
    }
    Ahead ahead = {lines.data(), lines.data() + then, now ? (int)((then + now - 1) / now) : 0};
    const bool shrinking = item < layout.shrinks;
    while (!shrinking && shrinks.load(std::memory_order_acquire)) relax();
    for (int i = layout.items[item]; i < layout.items[item + 1]; ++i) {
      const auto [owner, slice, part] = layout.atoms[i];
      if (shrinking) {
        shrink_page(site, layout, layout.atoms[i], h, ahead);
        continue;
      }
      const int count = std::min(kColumns, site.bounds[slice + 1] - site.bounds[slice] - part);
      for (int t = layout.clusters[owner].first_tile; t < layout.clusters[owner].end_tile; ++t)
        expand_tile<T>(site, step, layout, layout.tiles[t], {slice, part, 0}, count, ys[slice],
                       y_strides[slice], ahead);
    }
    if (shrinking) shrinks.fetch_sub(1, std::memory_order_release);
  });
}

template void gated_delta(const Site&, const Step&, const float*, int64_t, float* const*,
                          const int64_t*, int);
template void gated_delta(const Site&, const Step&, const BFloat16*, int64_t, BFloat16* const*,
                          const int64_t*, int);

extern "C" {

void oneplusn_delta(const Site* site, const Step* step, int bf16, const void* x, int64_t x_stride,
                    void* const* ys, const int64_t* y_strides, int threads) {
  if (bf16)
    gated_delta(*site, *step, (const BFloat16*)x, x_stride, (BFloat16* const*)ys, y_strides, threads);
  else
    gated_delta(*site, *step, (const float*)x, x_stride, (float* const*)ys, y_strides, threads);
}

}  // extern "C"
