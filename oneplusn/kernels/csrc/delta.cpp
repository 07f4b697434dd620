#include "delta.h"

#include <type_traits>
#include <vector>

#include "team.h"
#include "vector.h"

namespace {

constexpr int kPage = 16;
constexpr int kColumns = 128;  // columns of one expand item
constexpr int kAhead = 4;      // rank rows to fetch ahead of their use
constexpr int kTile = 4;       // rows that meet rank rows at once
constexpr int64_t kParallelWork = 100'000;  // bytes + multiply-adds that outweigh telling the team

// One row of the batch and one run: what it reads, and where its shrunken rows go.
template <typename T>
struct Meeting {
  const T* x;
  const float* gates;
  T* h;
};

// The meetings of one run, which has `total` rank rows at this site.
struct Group {
  int64_t first_page;
  int total, begin, end;
};

// What a site makes of a step before the first product.
template <typename T>
struct Layout {
  std::vector<Meeting<T>> meetings;
  std::vector<Group> groups;
  std::vector<int64_t> first;  // [uses] where the h of a use's rows begin
  std::vector<T> h;            // per use [rows of its segment][S][padded rank rows]
  int64_t work = 0;
};

template <typename T>
constexpr int kRankDepth = 4 / sizeof(T);  // rank rows that one step of the expansion takes

template <typename T>
inline int padded(int total) {
  return (total + kRankDepth<T> - 1) / kRankDepth<T> * kRankDepth<T>;
}

template <typename T>
void lay_out(const Site& site, const Step& step, const T* x, int64_t x_stride, Layout<T>& out) {
  out.first.resize(step.uses);
  int64_t used = 0;
  for (int s = 0; s < step.segments; ++s) {
    const int64_t rows = step.segment_rows[s + 1] - step.segment_rows[s];
    for (int use = step.segment_uses[s]; use < step.segment_uses[s + 1]; ++use) {
      out.first[use] = used;
      used += rows * site.slices * padded<T>(site.run_rows[step.use_run[use]]);
    }
  }
  out.h.assign(used, T{});
  std::vector<int> segment_of(step.uses);
  for (int s = 0; s < step.segments; ++s)
    for (int use = step.segment_uses[s]; use < step.segment_uses[s + 1]; ++use) segment_of[use] = s;
  const int64_t of_rank_row = site.slices * site.width + site.bounds[site.slices];
  for (int i = 0; i < step.uses; ++i) {
    const int use = step.by_run[i], run = step.use_run[use], total = site.run_rows[run];
    const int segment = segment_of[use];
    if (!total) continue;
    const int64_t first_page = site.run_first[run];
    const bool same = !out.groups.empty() && i > 0 && step.use_run[step.by_run[i - 1]] == run;
    const int begin = (int)out.meetings.size();
    if (!same) {
      out.groups.push_back({first_page, total, begin, begin});
      out.work += total * of_rank_row * (int64_t)sizeof(T);
    }
    const int64_t slot_k = (int64_t)step.slots[segment] * site.max_runs + step.use_k[use];
    const float* gates = site.gates + site.gate_first[slot_k];
    T* h = out.h.data() + out.first[use];
    for (int r = step.segment_rows[segment]; r < step.segment_rows[segment + 1]; ++r) {
      out.meetings.push_back({x + step.rows[r] * x_stride, gates, h});
      h += (int64_t)site.slices * padded<T>(total);
    }
    out.groups.back().end = (int)out.meetings.size();
    out.work += (int64_t)(out.meetings.size() - begin) * total * of_rank_row / 16;
  }
}

template <typename T, int M>
void shrink_rows(const Site& site, const Group& group, int slice, int page,
                 const Meeting<T>* meetings) {
  const T* a = (const T*)site.a + ((group.first_page + page) * site.slices + slice) * kPage * site.width;
  const T* xs[M];
  for (int m = 0; m < M; ++m) xs[m] = meetings[m].x;
  const int end = std::min(group.total - page * kPage, kPage);
  for (int lane = 0; lane < end; lane += kLanes) {
    const int lanes = std::min(end - lane, kLanes), first = page * kPage + lane;
    float values[M][kLanes];
    dots<T, M>(a + lane * site.width, lanes, xs, site.width, values);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < lanes; ++i) {
        T* h = meetings[m].h + (int64_t)slice * padded<T>(group.total) + first + i;
        store_one(h, meetings[m].gates[first + i] * values[m][i]);
      }
  }
}

template <typename T>
void shrink_page(const Site& site, const Layout<T>& layout, const Group& group, int slice,
                 int page) {
  const Meeting<T>* at = layout.meetings.data() + group.begin;
  int left = group.end - group.begin;
  for (; left >= kTile; left -= kTile, at += kTile)
    shrink_rows<T, kTile>(site, group, slice, page, at);
  switch (left) {
    case 3: return shrink_rows<T, 3>(site, group, slice, page, at);
    case 2: return shrink_rows<T, 2>(site, group, slice, page, at);
    case 1: return shrink_rows<T, 1>(site, group, slice, page, at);
  }
}

// Columns of one slice, from `begin` on: V whole blocks, or one of `rest` columns.
struct Columns {
  int slice, begin, rest;
};

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

template <typename T, int M, int V, bool kPart>
void expand_rows(const Site& site, const Step& step, const Layout<T>& layout, int segment, int row,
                 Columns columns, T* y, int64_t y_stride) {
  const int64_t stride = site.bounds[site.slices];
  const T* b = (const T*)site.b + site.bounds[columns.slice] + columns.begin;
  Floats acc[M][V][2] = {};
  for (int use = step.segment_uses[segment]; use < step.segment_uses[segment + 1]; ++use) {
    const int run = step.use_run[use], total = site.run_rows[run];
    const int64_t of_row = (int64_t)site.slices * padded<T>(total);
    const T* h = layout.h.data() + layout.first[use] + row * of_row + columns.slice * padded<T>(total);
    const T* at = b + (int64_t)site.run_first[run] * kPage * stride;
    for (int r = 0; r < total; r += kRankDepth<T>, at += kRankDepth<T> * stride) {
      uint32_t scales[M];
      for (int m = 0; m < M; ++m) std::memcpy(&scales[m], h + m * of_row + r, sizeof scales[m]);
      for (int v = 0; v < V; ++v) {
        Words low, high;
        for (int d = 0; d < kRankDepth<T>; ++d)
          __builtin_prefetch(at + (kAhead + d) * stride + v * kBlock);
        rank_words<kPart>(at + v * kBlock, stride, r + 1 < total, columns.rest, low, high);
        for (int m = 0; m < M; ++m) {
          multiply_add(acc[m][v][0], low, scales[m], at);
          multiply_add(acc[m][v][1], high, scales[m], at);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = y + step.rows[step.segment_rows[segment] + row + m] * y_stride + columns.begin + v * kBlock;
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

template <typename T, int M = 8>
void expand_block(int rows, const Site& site, const Step& step, const Layout<T>& layout, int segment,
                  int row, Columns columns, T* y, int64_t y_stride) {
  if (rows == M) {
    if (columns.rest)
      return expand_rows<T, M, 1, true>(site, step, layout, segment, row, columns, y, y_stride);
    return expand_rows<T, M, 1, false>(site, step, layout, segment, row, columns, y, y_stride);
  }
  if constexpr (M > 1)
    expand_block<T, M - 1>(rows, site, step, layout, segment, row, columns, y, y_stride);
}

// The columns of one item, for the rows of one segment.
template <typename T>
void expand_segment(const Site& site, const Step& step, const Layout<T>& layout, int segment,
                    Columns columns, int count, T* y, int64_t y_stride) {
  const int rows = step.segment_rows[segment + 1] - step.segment_rows[segment];
  const int groups = (rows + 7) / 8, end = columns.begin + count;
  for (int group = 0; group < groups; ++group) {
    const int row = rows * group / groups, of_group = rows * (group + 1) / groups - row;
    if (of_group == 1 && count == kColumns) {
      expand_rows<T, 1, kColumns / kBlock, false>(site, step, layout, segment, row, columns, y, y_stride);
      continue;
    }
    for (int begin = columns.begin; begin < end; begin += kBlock) {
      const int rest = end - begin < kBlock ? end - begin : 0;
      expand_block<T>(of_group, site, step, layout, segment, row, {columns.slice, begin, rest}, y,
                      y_stride);
    }
  }
}

}  // namespace

template <typename T>
void gated_delta(const Site& site, const Step& step, const T* x, int64_t x_stride, T* const* ys,
                 const int64_t* y_strides, int threads) {
  Layout<T> layout;
  lay_out(site, step, x, x_stride, layout);
  if (layout.h.empty()) return;
  if (layout.work < kParallelWork) threads = 1;
  struct Item {
    int owner, slice, part;
  };
  std::vector<Item> items;
  for (int group = 0; group < (int)layout.groups.size(); ++group)
    for (int page = 0; page * kPage < layout.groups[group].total; ++page)
      for (int slice = 0; slice < site.slices; ++slice) items.push_back({group, slice, page});
  share(threads, items.size(), [&](int64_t i, int64_t) {
    shrink_page(site, layout, layout.groups[items[i].owner], items[i].slice, items[i].part);
  });
  items.clear();
  for (int cluster = 0; cluster < step.num_clusters; ++cluster)
    for (int slice = 0; slice < site.slices; ++slice)
      for (int begin = 0; begin < site.bounds[slice + 1] - site.bounds[slice]; begin += kColumns)
        items.push_back({cluster, slice, begin});
  share(threads, items.size(), [&](int64_t i, int64_t) {
    const auto [cluster, slice, begin] = items[i];
    const int count = std::min(kColumns, site.bounds[slice + 1] - site.bounds[slice] - begin);
    for (int s = step.clusters[cluster]; s < step.clusters[cluster + 1]; ++s)
      expand_segment(site, step, layout, s, {slice, begin, 0}, count, ys[slice], y_strides[slice]);
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
