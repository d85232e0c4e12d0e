// Aligned memory, and a team of threads that run one function together.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace qvit {

template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    template <class U>
    bool operator==(const Aligned<U>&) const {
        return true;
    }
    template <class U>
    bool operator!=(const Aligned<U>&) const {
        return false;
    }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// They wait awake for a moment, then asleep.
class Team {
  public:
    explicit Team(int size) : size_(size) {
        for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { work(i); });
    }
    ~Team() {
        tell([&] { stop_ = true, ++round_; });
        for (auto& thread : threads_) thread.join();
    }
    int size() const { return size_; }

    template <class F>
    void run(F&& task) {
        task_ = [](void* f, int i) {
            (*static_cast<std::remove_reference_t<F>*>(f))(i);
        };
        data_ = &task;
        left_.store(size_ - 1, std::memory_order_relaxed);
        tell([&] { round_.fetch_add(1, std::memory_order_release); });
        task(0);
        wait([this] { return left_.load(std::memory_order_acquire) == 0; });
    }

    // All threads of a running task arrive before one goes on.
    void barrier() {
        if (size_ == 1) return;
        const int phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            tell([&] { phase_.store(phase + 1, std::memory_order_release); });
        } else {
            wait([this, phase] { return phase_.load(std::memory_order_acquire) != phase; });
        }
    }

  private:
    // Changes what others wait for, and wakes those that sleep.
    template <class Change>
    void tell(Change change) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            change();
        }
        wake_.notify_all();
    }
    template <class Done>
    void wait(Done done) {
        for (int i = 0; i < kAwake; ++i) {
            if (done()) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, done);
    }
    void work(int index) {
        for (int seen = 0; true;) {
            wait([&] { return round_.load(std::memory_order_acquire) != seen; });
            seen = round_.load(std::memory_order_acquire);
            if (stop_) return;
            task_(data_, index);
            tell([&] { left_.fetch_sub(1, std::memory_order_acq_rel); });
        }
    }

    static constexpr int kAwake = 4096;

    int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> round_{0}, left_{0}, arrived_{0}, phase_{0};
    bool stop_ = false;
    void (*task_)(void*, int) = nullptr;
    void* data_ = nullptr;
};

}  // namespace qvit
