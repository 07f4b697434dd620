#include "linear.h"

#include <algorithm>

#include "team.h"
#include "vector.h"

namespace {

constexpr int kPanel = 32;                // outputs of a panel
constexpr int kStepBytes = 128;           // of a panel
constexpr int kMostRows = 12;             // whose sums fit in registers beside the weights
constexpr int kGroupRows = 8;             // of each group where there are more
constexpr int64_t kParallelMacs = 20'000; // that outweigh telling the team

template <typename T>
constexpr int kDepth = 4 / sizeof(T);  // inputs of a step

// What to fetch while a group of rows meets a panel: so many bytes a step, from `at` on.
struct Fetch {
  const char* at;
  int64_t stride;
};

template <typename T, int M>
inline void panel_rows(const char* w, const T* x, int64_t x_stride, int64_t steps, Fetch fetch,
                       Floats (&acc)[M][2]) {
  for (int64_t i = 0; i < steps; ++i, w += kStepBytes) {
    Words low, high;
    std::memcpy(&low, w, sizeof low);
    std::memcpy(&high, w + 64, sizeof high);
    __builtin_prefetch(fetch.at + i * fetch.stride);
    __builtin_prefetch(fetch.at + i * fetch.stride + fetch.stride / 2);
    for (int m = 0; m < M; ++m) {
      uint32_t inputs;
      std::memcpy(&inputs, x + m * x_stride + i * kDepth<T>, sizeof inputs);
      multiply_add(acc[m][0], low, inputs, x);
      multiply_add(acc[m][1], high, inputs, x);
    }
  }
}

template <typename T, int M>
void panel_group(const Linear& linear, int64_t panel, const T* x, int64_t x_stride, T* y,
                 int64_t y_stride, Fetch fetch) {
  const int64_t steps = linear.width / kDepth<T>, begin = panel * kPanel;
  Floats acc[M][2] = {};
  panel_rows<T, M>((const char*)linear.panels + panel * steps * kStepBytes, x, x_stride, steps,
                   fetch, acc);
  const int count = (int)std::min<int64_t>(kPanel, linear.columns - begin);
  Floats bias[2] = {};
  if (linear.bias) {
    alignas(64) T values[kPanel] = {};
    std::memcpy(values, (const T*)linear.bias + begin, count * sizeof(T));
    load_columns(values, bias);
  }
  for (int m = 0; m < M; ++m) {
    const Floats out[2] = {acc[m][0] + bias[0], acc[m][1] + bias[1]};
    T* to = y + m * y_stride + begin;
    if (count == kPanel) {
      store_columns(to, out);
    } else {
      T values[kPanel];
      store_columns(values, out);
      std::memcpy(to, values, count * sizeof(T));
    }
  }
}

template <typename T, int M = kMostRows>
void panel_group_of(int rows, const Linear& linear, int64_t panel, const T* x, int64_t x_stride,
                    T* y, int64_t y_stride, Fetch fetch) {
  if (rows == M) return panel_group<T, M>(linear, panel, x, x_stride, y, y_stride, fetch);
  if constexpr (M > 1)
    panel_group_of<T, M - 1>(rows, linear, panel, x, x_stride, y, y_stride, fetch);
}

}  // namespace

template <typename T>
void multiply(const Linear& linear, const T* x, int64_t x_stride, T* y, int64_t y_stride,
              int64_t rows, int threads) {
  const int64_t groups = rows <= kMostRows ? 1 : (rows + kGroupRows - 1) / kGroupRows;
  const int64_t panels = (linear.columns + kPanel - 1) / kPanel;
  if (rows * linear.columns * linear.width < kParallelMacs) threads = 1;
  const int64_t together = std::max<int64_t>(1, std::min<int64_t>(4, panels / (4 * threads)));
  const int64_t steps = linear.width / kDepth<T>, bytes = steps * kStepBytes;
  share(threads, (panels + together - 1) / together, [&](int64_t item, int64_t next_item) {
    const int64_t end = std::min(panels, (item + 1) * together);
    for (int64_t panel = item * together; panel < end; ++panel) {
      const int64_t other = panel + 1 < end || next_item == kNone ? panel + 1 : next_item * together;
      const char* next = (const char*)linear.panels + std::min(other, panels - 1) * bytes;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = rows * group / groups, stop = rows * (group + 1) / groups;
        const Fetch fetch = groups == 1 ? Fetch{next, kStepBytes}
                            : group < 2 ? Fetch{next + group * bytes / 2, kStepBytes / 2}
                                        : Fetch{next, 0};
        panel_group_of<T>((int)(stop - begin), linear, panel, x + begin * x_stride, x_stride,
                          y + begin * y_stride, y_stride, fetch);
      }
    }
  });
}

template void multiply(const Linear&, const float*, int64_t, float*, int64_t, int64_t, int);
template void multiply(const Linear&, const BFloat16*, int64_t, BFloat16*, int64_t, int64_t, int);

namespace {

template <typename T>
void pack(const T* weight, T* panels, int64_t columns, int64_t width) {
  constexpr int64_t depth = kDepth<T>;
  for (int64_t column = 0; column < columns; ++column) {
    T* to = panels + column / kPanel * kPanel * width + column % kPanel * depth;
    for (int64_t k = 0; k < width; k += depth)
      std::memcpy(to + k * kPanel, weight + column * width + k, depth * sizeof(T));
  }
}

}  // namespace

extern "C" {

// weight [N, K] into panels, which are zero.
void oneplusn_pack_linear(const void* weight, void* panels, int bf16, int64_t columns,
                          int64_t width) {
  if (bf16)
    pack((const BFloat16*)weight, (BFloat16*)panels, columns, width);
  else
    pack((const float*)weight, (float*)panels, columns, width);
}

void oneplusn_linear(const Linear* linear, int bf16, const void* x, int64_t x_stride, void* y,
                     int64_t y_stride, int64_t rows, int threads) {
  if (bf16)
    multiply(*linear, (const BFloat16*)x, x_stride, (BFloat16*)y, y_stride, rows, threads);
  else
    multiply(*linear, (const float*)x, x_stride, (float*)y, y_stride, rows, threads);
}

}  // extern "C"
