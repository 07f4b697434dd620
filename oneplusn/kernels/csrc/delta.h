// The delta of a step's rows at one site, straight from the pages: nothing is packed, nothing copied.
//
// Two passes, cluster by cluster, so that what several tasks share is read once. Shrink: h = gate *
// (A row . x). Expand: y += sum over the rank rows of h * B row, in blocks of columns. Experts are
// small and lie apart, so while one item is computed, what the next one reads is fetched line by
// line, and nothing else. Sums are fp32, h rounds to the dtype of x; every row's order of additions
// depends on its own runs alone, so its bits are the same in any batch and on any number of threads.

#pragma once

#include <cstdint>

extern "C" {

// Where the site's pages and tables lie. Strides of pages follow from the shape.
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

// Which rows use which runs. A segment is the rows of one slot, a use one run of a segment.
struct Step {
  const int32_t* rows;         // rows of the batch, segment by segment
  const int32_t* segment_rows; // [segments + 1] bounds in rows
  const int32_t* segment_uses; // [segments + 1] bounds in the uses
  const int32_t* slots;        // [segments]
  const int32_t* clusters;     // [clusters + 1] bounds in the segments
  const int32_t* use_run;      // [uses] in the order of their keys within a segment
  const int32_t* use_k;        // [uses]
  const int32_t* by_key;       // [uses] those of a cluster in the order of their runs' keys
  int32_t segments, num_clusters, uses;
};

}  // extern "C"

// y[slice][row] += delta for the rows of the step. Strides are in elements; columns lie together.
template <typename T>
void gated_delta(const Site& site, const Step& step, const T* x, int64_t x_stride, T* const* ys,
                 const int64_t* y_strides, int threads);
