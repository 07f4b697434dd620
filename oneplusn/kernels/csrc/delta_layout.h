// What a site makes of a step before the first product: which rows meet which runs, in what tiles
// and items, and what of the pages an item reads, so that it can be fetched before its turn.

#pragma once

#include <vector>

#include "delta.h"
#include "vector.h"

namespace {

constexpr int kPage = 16;
constexpr int kTile = 8;       // rows whose sums fit in registers, for a block of columns
constexpr int kColumns = 256;  // columns of one atom of the expansion
constexpr int kLine = 64;      // bytes of a line of memory
constexpr int64_t kItemBytes = 24 << 10;  // of an item, from which on taking it costs little
constexpr int kManyRows = 16;  // from which on the arithmetic counts, not the bytes

// One row of the batch and one run.
template <typename T>
struct Meeting {
  const T* x;
  const float* gates;
};

// A run, and the rows of one cluster that use it.
struct Group {
  int64_t first_page;
  int64_t h, of_slice;    // where its shrunken rows begin: [S][meetings][padded rank rows]
  int total, begin, end;  // rank rows; its meetings
};

// The rows of a tile that use a group: bit m is the tile's row m.
struct Use {
  int group, meeting;  // the first of them
  uint32_t mask;
};

// Rows of one cluster that are expanded together.
struct Tile {
  int first, rows;  // in `Step::rows`
  int begin, end;   // its uses
};

struct Cluster {
  int first_group, end_group, first_tile, end_tile;
};

// A piece of work: a page of one slice of a group, or columns of one slice of a cluster.
struct Atom {
  int owner, slice, part;
};

// Lines of memory that lie `stride` bytes apart, row by row.
struct Stretch {
  const char* from;
  int64_t stride;
  int rows, lines;
};

inline int padded(int total) { return (total + kLanes - 1) / kLanes * kLanes; }

template <typename T>
struct Layout {
  std::vector<Meeting<T>> meetings;
  std::vector<Group> groups;
  std::vector<Cluster> clusters;
  std::vector<Use> uses;
  std::vector<Tile> tiles;
  std::vector<Atom> atoms;
  std::vector<int> items;  // [items + 1] bounds in the atoms
  std::vector<T> h;
  int shrinks;             // of the items, which come first
  int64_t work;            // bytes and multiply-adds

  void make(const Site& site, const Step& step, const T* x, int64_t x_stride);

 private:
  std::vector<int> segment_of_, row_of_, next_;

  void add_groups(const Site& site, const Step& step, int cluster, const T* x, int64_t x_stride);
  void add_tiles(const Step& step, int cluster);
  void add_items(const Site& site);
};

template <typename T>
void Layout<T>::make(const Site& site, const Step& step, const T* x, int64_t x_stride) {
  meetings.clear(), groups.clear(), clusters.clear(), uses.clear(), tiles.clear(), row_of_.clear();
  segment_of_.resize(step.uses);
  for (int s = 0; s < step.segments; ++s)
    for (int use = step.segment_uses[s]; use < step.segment_uses[s + 1]; ++use) segment_of_[use] = s;
  for (int c = 0; c < step.num_clusters; ++c) {
    clusters.push_back({(int)groups.size(), 0, (int)tiles.size(), 0});
    add_groups(site, step, c, x, x_stride);
    clusters.back().end_group = (int)groups.size();
    add_tiles(step, c);
    clusters.back().end_tile = (int)tiles.size();
  }
  constexpr int64_t apart = kLine / sizeof(T);
  int64_t used = 0;
  work = 0;
  const int64_t of_rank_row = site.slices * site.width + site.bounds[site.slices];
  for (Group& group : groups) {
    const int64_t met = group.end - group.begin;
    group.h = used;
    group.of_slice = (met * padded(group.total) + apart - 1) / apart * apart;
    used += site.slices * group.of_slice;
    work += group.total * of_rank_row * ((int64_t)sizeof(T) + met / 16);
  }
  if ((int64_t)h.size() < used) h.resize(used);
  add_items(site);
}

// The groups of a cluster in the order of their runs' keys, each with its rows in their order.
template <typename T>
void Layout<T>::add_groups(const Site& site, const Step& step, int cluster, const T* x,
                           int64_t x_stride) {
  const int first_row = step.segment_rows[step.clusters[cluster]];
  const int begin = step.segment_uses[step.clusters[cluster]];
  const int end = step.segment_uses[step.clusters[cluster + 1]];
  for (int i = begin, last = -1; i < end; ++i) {
    const int use = step.by_key[i], run = step.use_run[use], segment = segment_of_[use];
    if (!site.run_rows[run]) continue;
    if (run != last)
      groups.push_back({site.run_first[run], 0, 0, site.run_rows[run], (int)meetings.size(), 0});
    last = run;
    const int64_t slot_k = (int64_t)step.slots[segment] * site.max_runs + step.use_k[use];
    const float* gates = site.gates + site.gate_first[slot_k];
    for (int r = step.segment_rows[segment]; r < step.segment_rows[segment + 1]; ++r) {
      meetings.push_back({x + step.rows[r] * x_stride, gates});
      row_of_.push_back(r - first_row);
    }
    groups.back().end = (int)meetings.size();
  }
}

template <typename T>
void Layout<T>::add_tiles(const Step& step, int cluster) {
  const int first = step.segment_rows[step.clusters[cluster]];
  const int rows = step.segment_rows[step.clusters[cluster + 1]] - first;
  const int count = (rows + kTile - 1) / kTile, first_group = clusters.back().first_group;
  next_.clear();
  for (int g = first_group; g < (int)groups.size(); ++g) next_.push_back(groups[g].begin);
  for (int tile = 0; tile < count; ++tile) {
    const int begin = (int64_t)rows * tile / count, end = (int64_t)rows * (tile + 1) / count;
    tiles.push_back({first + begin, end - begin, (int)uses.size(), 0});
    for (int g = first_group; g < (int)groups.size(); ++g) {
      int& meeting = next_[g - first_group];
      Use use = {g, meeting, 0};
      for (; meeting < groups[g].end && row_of_[meeting] < end; ++meeting)
        use.mask |= 1u << (row_of_[meeting] - begin);
      if (use.mask) uses.push_back(use);
    }
    tiles.back().end = (int)uses.size();
  }
}

// Put atoms side by side until they read enough. All that shrinks comes before all that expands.
template <typename T>
void Layout<T>::add_items(const Site& site) {
  atoms.clear();
  items.assign(1, 0);
  int64_t bytes = 0;
  const auto add = [&](Atom atom, int64_t rank_rows, int64_t of_row, int rows) {
    atoms.push_back(atom);
    bytes += rank_rows * of_row * (int64_t)sizeof(T) * (1 + rows / kManyRows);
    if (bytes < kItemBytes) return;
    items.push_back((int)atoms.size());
    bytes = 0;
  };
  const auto close = [&] {
    if (items.back() != (int)atoms.size()) items.push_back((int)atoms.size());
    bytes = 0;
    return (int)items.size() - 1;
  };
  for (int g = 0; g < (int)groups.size(); ++g)
    for (int page = 0; page * kPage < groups[g].total; ++page)
      for (int slice = 0; slice < site.slices; ++slice)
        add({g, slice, page}, std::min(kPage, groups[g].total - page * kPage), site.width,
            groups[g].end - groups[g].begin);
  shrinks = close();
  for (int c = 0; c < (int)clusters.size(); ++c) {
    int64_t total = 0;
    for (int g = clusters[c].first_group; g < clusters[c].end_group; ++g) total += groups[g].total;
    const int rows = kTile * (clusters[c].end_tile - clusters[c].first_tile);
    if (!total) continue;
    for (int slice = 0; slice < site.slices; ++slice)
      for (int begin = 0; begin < site.bounds[slice + 1] - site.bounds[slice]; begin += kColumns)
        add({c, slice, begin}, total, kColumns, rows);
  }
  close();
}

constexpr int kSecondLevel = 2;  // of the caches: columns of B collide in the first
constexpr int kFour = 4 * kLine;  // bytes that are fetched at once

// What is read next, fetched meanwhile: for every four lines that are read now as many of it.
struct Ahead {
  const char* const* at = nullptr;
  const char* const* end = nullptr;
  int times = 0;

  __attribute__((always_inline)) inline void fetch() {
    for (int i = 0; i < times && at != end; ++i, ++at)
      for (int byte = 0; byte < kFour; byte += kLine) __builtin_prefetch(*at + byte, 0, kSecondLevel);
  }
};

inline int fours(int64_t bytes) { return (int)((bytes + kFour - 1) / kFour); }

}  // namespace
