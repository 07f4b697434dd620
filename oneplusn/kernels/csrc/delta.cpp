// The delta of a few rows on CPU, straight from the pages: nothing is packed, nothing copied.
//
// Two passes over one site. Shrink: h[use, slice, r] = gate * (A row . x row) for every rank row
// of every (row, run) that belong together, with each page read once for all rows of its run.
// Expand: y[row] += sum over r of h * B row, in column blocks, cluster by cluster, so that what
// several rows share stays in the cache. Sums are fp32; every row's order of additions depends on
// its own runs alone, so its bits are the same in any batch and on any number of threads.

#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

constexpr int kPage = 16;
constexpr int kColumns = 128;   // columns of one expand item
constexpr int kAhead = 4;       // rank rows to fetch ahead of their use
constexpr int64_t kParallelWork = 300'000;  // bytes + multiply-adds / 2 that outweigh a barrier

}  // namespace

extern "C" {

// The site: where its pages and tables lie. Strides of pages follow from the shape.
struct Site {
  const void* a;               // [P, S, 16, K]
  const void* b;               // [P, 16, N]
  const int32_t* run_first;    // [runs]
  const int32_t* run_rows;     // [runs]
  const int32_t* gate_first;   // [slots, max_runs]
  const float* gates;          // [capacity]
  const int32_t* bounds;       // [S + 1]
  int64_t width;               // K
  int32_t slices;              // S
  int32_t max_runs;
};

// The step: which row uses which run. Uses are sorted by run, and again by row.
struct Step {
  const int32_t* runs;         // [num_runs] run ids
  const int32_t* run_uses;     // [num_runs + 1] bounds in uses sorted by run
  const int32_t* use_row;      // [uses] row in the batch
  const int32_t* use_slot;     // [uses]
  const int32_t* use_k;        // [uses]
  const int32_t* use_run;      // [uses] index of the use's run in `runs`
  const int32_t* rows;         // [num_rows] rows in the batch, cluster by cluster
  const int32_t* row_uses;     // [num_rows + 1] bounds in by_row
  const int32_t* by_row;       // [uses] positions among the uses sorted by run
  const int32_t* clusters;     // [num_clusters + 1] bounds in rows
  int32_t num_runs, num_rows, num_clusters, num_uses;
};

}  // extern "C"

namespace {

// Where the shrunken rows of each use begin: h is [uses][S][rank rows of the run].
struct Shrunken {
  float* h;
  const int64_t* first;  // [uses]
};

// Up to kLanes rank rows of one slice, from `lane` of the run on, for all rows that use the run.
struct LaneItem {
  int run_index, slice, lane;
};

template <typename T>
void shrink_item(const Site& site, const Step& step, const T* x, int64_t x_stride,
                 const Shrunken& out, LaneItem item) {
  const auto [run_index, slice, lane] = item;
  const int run = step.runs[run_index];
  const int total = site.run_rows[run];
  const int count = std::min(total - lane, kLanes);
  const int64_t page = (int64_t)site.run_first[run] + lane / kPage;
  const T* a = (const T*)site.a + ((page * site.slices + slice) * kPage + lane % kPage) * site.width;
  for (int use = step.run_uses[run_index]; use < step.run_uses[run_index + 1]; ++use) {
    const int64_t of_slot = (int64_t)step.use_slot[use] * site.max_runs + step.use_k[use];
    const float* gate = site.gates + site.gate_first[of_slot] + lane;
    float* h = out.h + out.first[use] + (int64_t)slice * total + lane;
    float values[kLanes];
    dots_of(count, a, x + step.use_row[use] * x_stride, site.width, values);
    for (int i = 0; i < count; ++i) h[i] = gate[i] * values[i];
  }
}

// Columns of one slice, from `begin` on, for the rows of one cluster.
struct ColumnItem {
  int slice, begin, count, cluster;
};

// V whole vectors of columns, or one of which only the first `rest` columns are there.
template <typename T, int V, bool kPart>
void expand_columns(const Site& site, const Step& step, T* y, int64_t y_stride,
                    const Shrunken& in, ColumnItem item, int begin, int rest) {
  const int64_t stride = site.bounds[site.slices];
  const T* b = (const T*)site.b + site.bounds[item.slice] + begin;
  const auto read = [rest](const T* p) { return kPart ? load_part(p, rest) : load(p); };
  for (int i = step.clusters[item.cluster]; i < step.clusters[item.cluster + 1]; ++i) {
    Pair acc[V] = {};
    for (int place = step.row_uses[i]; place < step.row_uses[i + 1]; ++place) {
      const int use = step.by_row[place];
      const int run = step.runs[step.use_run[use]];
      const int total = site.run_rows[run];
      const float* h = in.h + in.first[use] + (int64_t)item.slice * total;
      const T* row = b + (int64_t)site.run_first[run] * kPage * stride;
      for (int r = 0; r < total; ++r, row += stride) {
        const Floats scale = h[r] - Floats{};
        for (int v = 0; v < V; ++v) {
          __builtin_prefetch(row + kAhead * stride + v * kBlock);
          const Pair value = read(row + v * kBlock);
          acc[v].first += scale * value.first;
          acc[v].second += scale * value.second;
        }
      }
    }
    T* target = y + step.rows[i] * y_stride + begin;
    for (int v = 0; v < V; ++v) {
      const Pair old = read(target + v * kBlock);
      const Pair out = {old.first + acc[v].first, old.second + acc[v].second};
      kPart ? store_part(target, out, rest) : store(target + v * kBlock, out);
    }
  }
}

template <typename T>
void expand_item(const Site& site, const Step& step, T* y, int64_t y_stride, const Shrunken& in,
                 ColumnItem item) {
  const auto whole = [&](auto vectors) {
    expand_columns<T, vectors, false>(site, step, y, y_stride, in, item, item.begin, 0);
  };
  switch (item.count / kBlock) {
    case 4: whole(std::integral_constant<int, 4>{}); break;
    case 3: whole(std::integral_constant<int, 3>{}); break;
    case 2: whole(std::integral_constant<int, 2>{}); break;
    case 1: whole(std::integral_constant<int, 1>{}); break;
  }
  const int rest = item.count % kBlock, begin = item.begin + item.count - rest;
  if (rest) expand_columns<T, 1, true>(site, step, y, y_stride, in, item, begin, rest);
}

template <typename T>
void gated_delta(const Site& site, const Step& step, const T* x, int64_t x_stride,
                 void* const* ys, const int64_t* y_strides, int threads) {
  std::vector<LaneItem> lanes;
  std::vector<int64_t> first(step.num_uses);
  int64_t used = 0, work = 0;
  for (int run_index = 0; run_index < step.num_runs; ++run_index) {
    const int total = site.run_rows[step.runs[run_index]];
    const int uses = step.run_uses[run_index + 1] - step.run_uses[run_index];
    for (int use = step.run_uses[run_index]; use < step.run_uses[run_index + 1]; ++use) {
      first[use] = used;
      used += (int64_t)site.slices * total;
    }
    const int64_t weights = total * (site.slices * site.width + site.bounds[site.slices]);
    work += weights * (int64_t)sizeof(T) + weights * uses / 2;
    for (int lane = 0; lane < total; lane += kLanes)
      for (int slice = 0; slice < site.slices; ++slice) lanes.push_back({run_index, slice, lane});
  }
  if (!used) return;
  std::vector<float> h(used);
  const Shrunken shrunken{h.data(), first.data()};
  std::vector<ColumnItem> columns;
  for (int cluster = 0; cluster < step.num_clusters; ++cluster)
    for (int slice = 0; slice < site.slices; ++slice) {
      const int width = site.bounds[slice + 1] - site.bounds[slice];
      for (int begin = 0; begin < width; begin += kColumns)
        columns.push_back({slice, begin, std::min(kColumns, width - begin), cluster});
    }
  const int num_lanes = (int)lanes.size(), num_columns = (int)columns.size();
  const bool parallel = threads > 1 && work >= kParallelWork;
#pragma omp parallel num_threads(threads) if (parallel)
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < num_lanes; ++i) shrink_item(site, step, x, x_stride, shrunken, lanes[i]);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < num_columns; ++i) {
      const int slice = columns[i].slice;
      expand_item(site, step, (T*)ys[slice], y_strides[slice], shrunken, columns[i]);
    }
  }
}

}  // namespace

extern "C" {

// y[slice][row] += delta for the rows of the step. Strides are in elements; columns lie together.
void oneplusn_delta(const Site* site, const Step* step, int bf16, const void* x, int64_t x_stride,
                    void* const* ys, const int64_t* y_strides, int threads) {
  if (bf16)
    gated_delta(*site, *step, (const BFloat16*)x, x_stride, ys, y_strides, threads);
  else
    gated_delta(*site, *step, (const float*)x, x_stride, ys, y_strides, threads);
}

}  // extern "C"
