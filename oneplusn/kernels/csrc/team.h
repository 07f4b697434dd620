// Threads that share a loop item by item, where nobody who comes late is waited for.
//
// The caller takes items too, and returns when all are done, not when all threads have come. So a
// thread that the system keeps from running costs the others its share of the work, and no more.
// Everyone knows the item that they do next, and can fetch what it reads while they do this one.

#pragma once

#include <cstdint>

constexpr int64_t kNone = -1;

using TeamBody = void (*)(const void* context, int64_t item, int64_t next);

void run_on_team(int threads, int64_t items, TeamBody body, const void* context);

namespace {

// Wait for a moment while spinning.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Call body(i, next) for every i < items, on so many threads; in order where there is but one.
// `next` is what the same thread does after it, or kNone.
template <typename Body>
void share(int threads, int64_t items, const Body& body) {
  if (threads <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i, i + 1 < items ? i + 1 : kNone);
    return;
  }
  const auto call = [](const void* b, int64_t i, int64_t next) { (*(const Body*)b)(i, next); };
  run_on_team(threads, items, call, &body);
}

}  // namespace
