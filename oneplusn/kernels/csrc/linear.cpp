#include "linear.h"

#include <algorithm>

#include "team.h"
#include "vector.h"
#include "widen.h"

namespace {

constexpr int kPanel = 32;                // outputs of a panel
constexpr int kLine = 64;                 // bytes fetched at once
constexpr int kMostRows = 12;             // whose sums fit in registers beside the weights
constexpr int kGroupRows = 8;             // of each group where there are more
constexpr int64_t kParallelMacs = 20'000; // that outweigh telling the team

template <typename T>
constexpr int kDepth = 4 / sizeof(T);  // inputs of a word

// A step of a panel of W, before a row of T: words of every output, bytes of all.
template <typename T, typename W>
constexpr int kWords = sizeof(W) == 1 && sizeof(T) == 4 ? 2 : 1;
template <typename T, typename W>
constexpr int kStepBytes = kPanel * kWords<T, W> * kDepth<T> * (int)sizeof(W);

template <typename T, typename W>
constexpr int64_t steps_of(int64_t width) {
  return width / (kWords<T, W> * kDepth<T>);
}

// What to fetch while a group of rows meets a panel: so many bytes a step, from `at` on.
struct Fetch {
  const char* at;
  int64_t stride;
};

// The words of a step, each for the outputs of either half.
inline void load_step(const char* w, Words (&out)[1][2], const void*, const void*) {
  for (int half = 0; half < 2; ++half) {
    Words words;
    std::memcpy(&words, w + half * sizeof words, sizeof words);
    out[0][half] = words;
  }
}

inline void load_step(const char* w, Words (&out)[1][2], const BFloat16*, const int8_t*) {
  widen(w, out[0]);
}

inline void load_step(const char* w, Words (&out)[2][2], const float*, const int8_t*) {
  Words pairs[2];
  widen(w, pairs);
  for (int half = 0; half < 2; ++half) {
    out[0][half] = pairs[half] << 16;
    out[1][half] = pairs[half] & 0xffff0000u;
  }
}

template <typename T, typename W, int M>
inline void panel_rows(const char* w, const T* x, int64_t x_stride, int64_t steps, Fetch fetch,
                       Floats (&acc)[M][2]) {
  constexpr int bytes = kStepBytes<T, W>, words = kWords<T, W>;
  for (int64_t i = 0; i < steps; ++i, w += bytes) {
    Words weights[words][2];
    load_step(w, weights, (const T*)nullptr, (const W*)nullptr);
    for (int line = 0; line < bytes; line += kLine)
      __builtin_prefetch(fetch.at + i * fetch.stride + line * fetch.stride / bytes);
    for (int word = 0; word < words; ++word)
      for (int m = 0; m < M; ++m) {
        uint32_t inputs;
        std::memcpy(&inputs, x + m * x_stride + (i * words + word) * kDepth<T>, sizeof inputs);
        multiply_add(acc[m][0], weights[word][0], inputs, x);
        multiply_add(acc[m][1], weights[word][1], inputs, x);
      }
  }
}

template <typename T, typename W, int M>
void panel_group(const Linear& linear, int64_t panel, const T* x, int64_t x_stride, T* y,
                 int64_t y_stride, Fetch fetch) {
  const int64_t steps = steps_of<T, W>(linear.width), begin = panel * kPanel;
  Floats acc[M][2] = {};
  panel_rows<T, W, M>((const char*)linear.panels + panel * steps * kStepBytes<T, W>, x, x_stride,
                      steps, fetch, acc);
  const int count = (int)std::min<int64_t>(kPanel, linear.columns - begin);
  Floats bias[2] = {}, scale[2];
  if (linear.bias) {
    alignas(64) T values[kPanel] = {};
    std::memcpy(values, (const T*)linear.bias + begin, count * sizeof(T));
    load_columns(values, bias);
  }
  if (sizeof(W) == 1) load_columns(linear.scales + begin, scale);
  for (int m = 0; m < M; ++m) {
    Floats out[2];
    for (int half = 0; half < 2; ++half)
      out[half] = (sizeof(W) == 1 ? acc[m][half] * scale[half] : acc[m][half]) + bias[half];
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

template <typename T, typename W, int M = kMostRows>
void panel_group_of(int rows, const Linear& linear, int64_t panel, const T* x, int64_t x_stride,
                    T* y, int64_t y_stride, Fetch fetch) {
  if (rows == M) return panel_group<T, W, M>(linear, panel, x, x_stride, y, y_stride, fetch);
  if constexpr (M > 1)
    panel_group_of<T, W, M - 1>(rows, linear, panel, x, x_stride, y, y_stride, fetch);
}

template <typename T, typename W>
void multiply_by(const Linear& linear, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                 int64_t rows, int threads) {
  const int64_t groups = rows <= kMostRows ? 1 : (rows + kGroupRows - 1) / kGroupRows;
  const int64_t panels = (linear.columns + kPanel - 1) / kPanel;
  if (rows * linear.columns * linear.width < kParallelMacs) threads = 1;
  const int64_t together = std::max<int64_t>(1, std::min<int64_t>(4, panels / (4 * threads)));
  constexpr int step_bytes = kStepBytes<T, W>;
  const int64_t bytes = steps_of<T, W>(linear.width) * step_bytes;
  share(threads, (panels + together - 1) / together, [&](int64_t item, int64_t next_item) {
    const int64_t end = std::min(panels, (item + 1) * together);
    for (int64_t panel = item * together; panel < end; ++panel) {
      const int64_t other = panel + 1 < end || next_item == kNone ? panel + 1 : next_item * together;
      const char* next = (const char*)linear.panels + std::min(other, panels - 1) * bytes;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = rows * group / groups, stop = rows * (group + 1) / groups;
        const Fetch fetch = groups == 1 ? Fetch{next, step_bytes}
                            : group < 2 ? Fetch{next + group * bytes / 2, step_bytes / 2}
                                        : Fetch{next, 0};
        panel_group_of<T, W>((int)(stop - begin), linear, panel, x + begin * x_stride, x_stride,
                          y + begin * y_stride, y_stride, fetch);
      }
    }
  });
}

}  // namespace

template <typename T>
void multiply(const Linear& linear, const T* x, int64_t x_stride, T* y, int64_t y_stride,
              int64_t rows, int threads) {
  const auto by = linear.scales ? multiply_by<T, int8_t> : multiply_by<T, T>;
  by(linear, x, x_stride, y, y_stride, rows, threads);
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

// In the order that `widen` undoes.
void pack(const int8_t* codes, uint8_t* panels, int64_t columns, int64_t width) {
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t place = column % kPanel;
    uint8_t* to = panels + column / kPanel * kPanel * width + place % 16 / 4 * 16 + place / 16 * 8 + place % 4 * 2;
    for (int64_t k = 0; k < width; ++k) {
      const int8_t code = codes[column * width + k];
      to[k / 2 * 2 * kPanel + k % 2] = code < 0 ? 0x80 | -code : code;
    }
  }
}

}  // namespace

extern "C" {

// codes [N, K] into panels, which are zero.
void oneplusn_pack_int8_linear(const void* codes, void* panels, int64_t columns, int64_t width) {
  pack((const int8_t*)codes, (uint8_t*)panels, columns, width);
}

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
