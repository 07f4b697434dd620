// Threads that share a loop item by item, where nobody who comes late is waited for.
//
// The caller takes items too, and returns when all are done, not when all threads have come. So a
// thread that the system keeps from running costs the others its share of the work, and no more.

#pragma once

#include <cstdint>

using TeamBody = void (*)(const void* context, int64_t item);

void run_on_team(int threads, int64_t items, TeamBody body, const void* context);

namespace {

// Call body(i) for every i < items, on so many threads; in order where there is but one.
template <typename Body>
void share(int threads, int64_t items, const Body& body) {
  if (threads <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  run_on_team(threads, items, [](const void* b, int64_t i) { (*(const Body*)b)(i); }, &body);
}

}  // namespace
