#include "team.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

constexpr int kCountBits = 20;
constexpr int64_t kMostItems = (1 << kCountBits) - 1024;  // leaves room for claims that find nothing
constexpr uint64_t kCountMask = (1 << kCountBits) - 1;
constexpr auto kSpin = std::chrono::microseconds(100);  // between two products of a layer, and more

// One word holds which loop it is, how many items that has and the next to be taken. So a claim is
// one addition, and can never be of a loop that is over.
class Team {
 public:
  void run(int threads, int64_t items, TeamBody body, const void* context) {
    const std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
    if (!alone || items > kMostItems) {
      for (int64_t i = 0; i < items; ++i) body(context, i, i + 1 < items ? i + 1 : kNone);
      return;
    }
    while (size_ < threads - 1) std::thread(&Team::work, this, size_++).detach();
    invited_.store(threads - 1, std::memory_order_relaxed);
    body_ = body;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t loop = loop_of(state_.load(std::memory_order_relaxed)) + 1;
    state_.store(loop << (2 * kCountBits) | (uint64_t)items << kCountBits);
    if (sleeping_.load()) {
      { const std::lock_guard<std::mutex> lock(sleep_); }
      woken_.notify_all();
    }
    work_off();
    while (done_.load(std::memory_order_acquire) != items) relax();
  }

 private:
  static uint64_t loop_of(uint64_t state) { return state >> (2 * kCountBits); }

  // Take an item of the present loop, if one is left.
  int64_t claim() {
    const uint64_t claim = state_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t item = claim & kCountMask;
    return item < (claim >> kCountBits & kCountMask) ? (int64_t)item : kNone;
  }

  void work_off() {
    for (int64_t item = claim(), next; item != kNone; item = next) {
      next = claim();
      body_(context_, item, next);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void work(int index) {
    for (uint64_t seen = 0;;) {
      wait_for_other_than(seen);
      seen = loop_of(state_.load(std::memory_order_acquire));
      if (index < invited_.load(std::memory_order_relaxed))
        work_off();
    }
  }

  void wait_for_other_than(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i, relax())
        if (loop_of(state_.load(std::memory_order_acquire)) != seen) return;
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(sleep_);
    ++sleeping_;
    woken_.wait(lock, [&] { return loop_of(state_.load()) != seen; });
    --sleeping_;
  }

  std::mutex callers_, sleep_;
  std::condition_variable woken_;
  TeamBody body_ = nullptr;
  const void* context_ = nullptr;
  int size_ = 0;
  std::atomic<int> invited_{0}, sleeping_{0};
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace

void run_on_team(int threads, int64_t items, TeamBody body, const void* context) {
  static Team& team = *new Team;  // never destroyed: its threads end with the process
  team.run(threads, items, body, context);
}
