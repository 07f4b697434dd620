// One token of each row: temperature, top-k, top-p, min-p, and where a uniform number falls.
//
// A row is turned into weights once, by groups of 128 columns with their sum and their largest. What
// the filters keep are the weights from a limit on; that is found among few: groups whose largest
// is below a bound that is certain are never looked at again.

#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "team.h"
#include "vector.h"

namespace {

constexpr int kGroup = 128;
constexpr int64_t kFew = 64;  // values that are sorted instead of being split again
constexpr int kReadings = 3;   // of a whole row for its sum, each of which halves what is in question
constexpr int kCounts = 10;    // the same for a count, where less is known at first
constexpr float kBeyond = 1.0f + std::numeric_limits<float>::epsilon();  // more than any weight
constexpr float kNothing = -std::numeric_limits<float>::infinity();      // the logit of none

typedef double Doubles __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));

inline double total(Doubles d) {
  double out = 0;
  for (int i = 0; i < 8; ++i) out += d[i];
  return out;
}

inline Floats from(const float* p, float limit) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v >= limit ? v : Floats{};
}

// Add 64 values, of those not below the limit: a few to each other, and these sums in fp64.
inline void add_from(Doubles (&acc)[2], const float* p, float limit) {
  const Floats sum = (from(p, limit) + from(p + 16, limit)) +
                     (from(p + 32, limit) + from(p + 48, limit));
  Eight half[2];
  std::memcpy(half, &sum, sizeof half);
  for (int i = 0; i < 2; ++i) acc[i] += __builtin_convertvector(half[i], Doubles);
}

// The sum of those not below the limit.
double sum_from(const float* p, int64_t count, float limit) {
  Doubles acc[2] = {};
  const int64_t whole = count / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64) add_from(acc, p + i, limit);
  double out = total(acc[0] + acc[1]);
  for (int64_t i = whole; i < count; ++i) out += p[i] >= limit ? p[i] : 0.0f;
  return out;
}

// Append those not below `low` and below `high`; `to` has room for 16 more than there are.
inline float* append(float* to, const float* p, int64_t count, float low, float high) {
  int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BF16__)
  for (; i + 16 <= count; i += 16) {
    const __m512 v = _mm512_loadu_ps(p + i);
    const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GE_OQ) &
                           _mm512_cmp_ps_mask(v, _mm512_set1_ps(high), _CMP_LT_OQ);
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, v));
    to += __builtin_popcount(kept);
  }
#endif
  for (; i < count; ++i) {
    *to = p[i];
    to += p[i] >= low && p[i] < high;
  }
  return to;
}

inline uint32_t bits_of(float f) {
  uint32_t w;
  std::memcpy(&w, &f, sizeof w);
  return w;
}

inline float float_of(uint32_t w) {
  float f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}

// Values that are not negative are ordered as their bits are.
inline float halfway(float low, float high) {
  return float_of(bits_of(low) + (bits_of(high) - bits_of(low)) / 2);
}

// The largest value such that those not below it come to `target`; all of them do.
//
// What is in question is halved until few are left. `other` has as much room as `values`.
float reaching(float* values, int64_t count, double target, float* other) {
  uint32_t low = bits_of(values[0]), high = low;
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, bits_of(values[i]));
    high = std::max(high, bits_of(values[i]));
  }
  double above = 0;
  while (count > kFew && low < high) {
    const uint32_t middle = low + (high - low + 1) / 2;
    const float split = float_of(middle);
    const double upper = sum_from(values, count, split);
    const bool enough = above + upper >= target;
    const float* end = enough ? append(other, values, count, split, float_of(high + 1))
                              : append(other, values, count, float_of(low), split);
    if (enough) {
      low = middle;
    } else {
      above += upper;
      high = middle - 1;
    }
    count = end - other;
    std::swap(values, other);
  }
  std::sort(values, values + count, std::greater<float>());
  for (int64_t i = 0; i < count; ++i)
    if ((above += values[i]) >= target) return values[i];
  return values[count - 1];
}

// What one thread works with; kept, as fresh memory costs more than the arithmetic on it.
struct Scratch {
  std::vector<float> weights, tops, picked, other;
  std::vector<double> sums;
  int64_t groups = 0;

  void fit(int64_t columns) {
    groups = (columns + kGroup - 1) / kGroup;
    if ((int64_t)sums.size() >= groups) return;
    weights.resize(groups * kGroup);
    picked.resize(groups * kGroup + 16);
    other.resize(groups * kGroup + 16);
    tops.resize(groups);
    sums.resize(groups);
  }
};

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats f) {
  f = larger(f, __builtin_shufflevector(f, f, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  f = larger(f, __builtin_shufflevector(f, f, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  f = larger(f, __builtin_shufflevector(f, f, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return std::max(f[0], f[1]);
}

// Write logits times factor, padded with what has no weight; return the largest.
template <typename T>
float scale(const T* logits, int64_t columns, float factor, float* out) {
  Floats best = Floats{} + kNothing, v[2];
  const int64_t whole = columns / kBlock * kBlock, width = (columns + kGroup - 1) / kGroup * kGroup;
  for (int64_t i = 0; i < whole; i += kBlock) {
    load_columns(logits + i, v);
    for (int j = 0; j < 2; ++j) best = larger(v[j] *= factor, best);
    std::memcpy(out + i, v, sizeof v);
  }
  std::fill(out + whole, out + width, kNothing);
  if (whole == columns) return largest(best);
  T rest[kBlock] = {};
  std::memcpy(rest, logits + whole, (columns - whole) * sizeof(T));
  load_columns(rest, v);
  for (int j = 0; j < 2; ++j) v[j] *= factor;
  std::memcpy(out + whole, v, (columns - whole) * sizeof(float));
  std::memcpy(v, out + whole, sizeof v);
  return largest(larger(larger(v[0], v[1]), best));
}

// Turn scaled logits into weights, the largest of which is 1; return their sum.
double weigh(Scratch& own, float best) {
  double mass = 0;
  for (int64_t g = 0; g < own.groups; ++g) {
    float* p = own.weights.data() + g * kGroup;
    Floats top = {}, all = {}, v[4];
    for (int i = 0; i < kGroup; i += 64) {
      std::memcpy(v, p + i, sizeof v);
      for (int j = 0; j < 4; ++j) v[j] = exponential(v[j] - best);
      std::memcpy(p + i, v, sizeof v);
      top = larger(larger(larger(v[0], v[1]), larger(v[2], v[3])), top);
      all += (v[0] + v[1]) + (v[2] + v[3]);
    }
    own.tops[g] = largest(top);
    mass += own.sums[g] = sum(all);
  }
  return mass;
}

// Collect the weights not below `low` and below `high`; return how many there are.
int64_t pick(Scratch& own, float low, float high = kBeyond) {
  float* end = own.picked.data();
  for (int64_t g = 0; g < own.groups; ++g)
    if (own.tops[g] >= low) end = append(end, &own.weights[g * kGroup], kGroup, low, high);
  return end - own.picked.data();
}

// How many of a row's weights are not below the limit.
int64_t count_from(const Scratch& own, float limit) {
  Ints acc = {};
  for (int64_t g = 0; g < own.groups; ++g) {
    if (own.tops[g] < limit) continue;
    for (int i = 0; i < kGroup; i += 16) {
      Floats v;
      std::memcpy(&v, &own.weights[g * kGroup + i], sizeof v);
      acc -= (Ints)(v >= limit);
    }
  }
  int64_t out = 0;
  for (int i = 0; i < 16; ++i) out += acc[i];
  return out;
}

// The weight that is number k.
float number(Scratch& own, int64_t k) {
  float low = 0, high = kBeyond;
  int64_t above = 0;
  if (k <= own.groups) {
    // The k largest of groups' largest are not below it.
    float* tops = own.other.data();
    std::copy_n(own.tops.data(), own.groups, tops);
    std::nth_element(tops, tops + k - 1, tops + own.groups, std::greater<float>());
    low = tops[k - 1];
  } else {
    for (int i = 0; i < kCounts; ++i) {
      const float middle = halfway(low, high);
      const int64_t count = count_from(own, middle);
      if (count >= k) {
        low = middle;
      } else {
        high = middle;
        above = count;
      }
    }
  }
  const int64_t count = pick(own, low, high);
  float* picked = own.picked.data();
  std::nth_element(picked, picked + k - above - 1, picked + count, std::greater<float>());
  return picked[k - above - 1];
}

// The sum of a row's weights not below the limit.
double row_from(const Scratch& own, float limit) {
  Doubles acc[2] = {};
  for (int64_t g = 0; g < own.groups; ++g)
    if (own.tops[g] >= limit)
      for (int i = 0; i < kGroup; i += 64) add_from(acc, &own.weights[g * kGroup + i], limit);
  return total(acc[0] + acc[1]);
}

// The largest weight such that those not below it come to `target`, which those from `low` on do.
float nucleus(Scratch& own, float low, double target) {
  float high = kBeyond;
  double above = 0;
  // Where most of the row is in question, reading it is cheaper than copying it.
  for (int i = 0; i < kReadings; ++i) {
    const float middle = halfway(low, high);
    const double upper = row_from(own, middle);
    if (upper >= target) {
      low = middle;
    } else {
      high = middle;
      above = upper;
    }
  }
  const int64_t count = pick(own, low, high);
  return count ? reaching(own.picked.data(), count, target - above, own.other.data()) : low;
}

// The smallest weight that passes the filters, 0 where none is on.
float smallest_kept(Scratch& own, int64_t columns, double mass, int64_t k, double p, double m) {
  float limit = 0;
  const bool is_cut = k > 0 && k < columns;
  if (is_cut) limit = number(own, k);
  if (p < 1 && is_cut) {
    const int64_t count = pick(own, limit);
    mass = sum_from(own.picked.data(), count, limit);
    limit = reaching(own.picked.data(), count, p * mass, own.other.data());
  } else if (p < 1) {
    // What is below this bound may, all of it together, be missing from the target.
    limit = nucleus(own, (float)((1 - p) * mass / columns * (1 - 1e-6)), p * mass);
  }
  return std::max(limit, (float)m);  // the largest weight is 1
}

// Where u of the kept weights' sum is reached, in the order of the columns.
int64_t find(Scratch& own, float limit, double u) {
  double all = 0;
  for (int64_t g = 0; g < own.groups; ++g) {
    if (limit > 0)
      own.sums[g] = own.tops[g] >= limit ? sum_from(&own.weights[g * kGroup], kGroup, limit) : 0;
    all += own.sums[g];
  }
  const double target = u * all;
  double reach = 0;
  int64_t last = -1;
  for (int64_t g = 0; g < own.groups; ++g) {
    if (own.sums[g] <= 0) continue;
    const double before = reach;
    reach += own.sums[g];
    if (reach <= target && g + 1 < own.groups) {
      last = g;
      continue;
    }
    // Group sums are rounded; what they leave over falls to the last member.
    int64_t token = -1;
    double inside = before;
    for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
      const float w = own.weights[i];
      if (w < limit || w <= 0) continue;
      token = i;
      if ((inside += w) > target) break;
    }
    return token;
  }
  if (last < 0) return -1;
  int64_t token = last * kGroup + kGroup - 1;
  while (own.weights[token] < limit || own.weights[token] <= 0) --token;
  return token;
}

template <typename T>
int64_t draw_row(const Draw& draw, int64_t item, Scratch& own) {
  own.fit(draw.columns);
  const T* logits = (const T*)draw.logits + draw.rows[item] * draw.stride;
  const float best = scale(logits, draw.columns, draw.factors[item], own.weights.data());
  const double mass = weigh(own, best);
  if (!(mass > 0) || !std::isfinite(mass)) return -1;
  const int64_t k = draw.top_k[item];
  const double p = draw.top_p[item], m = draw.min_p[item];
  return find(own, smallest_kept(own, draw.columns, mass, k, p, m), draw.uniform[item]);
}

}  // namespace

extern "C" void oneplusn_draw(const Draw* draw, int threads) {
  share(threads, draw->count, [&](int64_t item, int64_t) {
    static thread_local Scratch own;
    draw->tokens[item] = draw->is_bf16 ? draw_row<BFloat16>(*draw, item, own)
                                       : draw_row<float>(*draw, item, own);
  });
}
