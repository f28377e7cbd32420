// Threads that share one product at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace hive {

constexpr size_t SHARE_BYTES = 128 << 10;  // read by each part: below it, waking a thread costs more than it gives
constexpr auto SPIN = std::chrono::microseconds(100);  // longer than a layer takes between two products

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `ready` came true soon: going to sleep and being woken takes longer than most products.
template <class Ready>
bool spin(Ready ready) {
    for (auto until = std::chrono::steady_clock::now() + SPIN; std::chrono::steady_clock::now() < until;)
        for (int turn = 0; turn < 8; ++turn) {
            if (ready()) return true;
            relax();
        }
    return ready();
}


// Does part `part` of `parts` of a job.
using Work = void (*)(const void *job, size_t part, size_t parts);

// Helpers that sleep when there is nothing to do. One product at a time: who comes meanwhile does his alone. Work is
// taken in small parts by whoever comes, so a helper that the system lets wait delays nobody: the caller does its share.
class Pool {
  public:
    explicit Pool(int helpers) {
        try {
            for (int index = 0; index < helpers; ++index) threads.emplace_back([this] { serve(); });
        } catch (...) {
            end();
            throw;
        }
    }
    ~Pool() { end(); }
    // `bytes`: how much the job reads. It may be cut into at most `limit` parts.
    void run(Work task, const void *what, size_t bytes, size_t limit) {
        size_t cut = std::min({4 * (threads.size() + 1), bytes / SHARE_BYTES, limit});
        if (threads.empty() || cut < 2) return task(what, 0, 1);
        std::unique_lock<std::mutex> turn(one_at_a_time, std::try_to_lock);
        if (!turn) return task(what, 0, 1);  // the helpers are another engine's now: it may have a whole prompt for them
        uint32_t number = uint32_t(ticket.load(std::memory_order_relaxed) >> 32) + 1;
        ticket.store(uint64_t(number) << 32 | UINT32_MAX);  // late helpers of the last product find nothing to take
        work = task, job = what;
        parts.store((uint32_t)cut);
        done.store(0);
        ticket.store(uint64_t(number) << 32);
        announce();
        while (take(number)) {}
        if (!spin([&] { return done.load(std::memory_order_acquire) == parts; }))
            while (done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
    }

  private:
    void end() {
        ended.store(true);
        announce();
        for (auto &thread : threads) thread.join();
    }
    void announce() {
        round.fetch_add(1, std::memory_order_release);
        round.notify_all();
    }
    // Do one part of product `number`; false when there is none left. The fields are read while a part of it is held,
    // and until that part is done they do not change.
    bool take(uint32_t number) {
        uint64_t now = ticket.load(std::memory_order_acquire);
        do {
            if (uint32_t(now >> 32) != number || uint32_t(now) >= parts.load(std::memory_order_relaxed)) return false;
        } while (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        work(job, uint32_t(now), parts.load(std::memory_order_relaxed));
        done.fetch_add(1, std::memory_order_release);
        return true;
    }
    void serve() {
        for (unsigned seen = 0; !ended.load();) {
            if (!spin([&] { return round.load(std::memory_order_acquire) != seen; }))
                round.wait(seen, std::memory_order_acquire);
            seen = round.load(std::memory_order_acquire);
            while (take(uint32_t(ticket.load(std::memory_order_acquire) >> 32))) {}
        }
    }

    std::vector<std::thread> threads;
    std::mutex one_at_a_time;
    std::atomic<bool> ended{false};
    std::atomic<unsigned> round{0};
    std::atomic<uint64_t> ticket{0};   // number of the product << 32 | its next part
    std::atomic<uint32_t> parts{0}, done{0};
    Work work = nullptr;
    const void *job = nullptr;
};

}  // namespace hive
