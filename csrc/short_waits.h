// How long the threads of a team spin before they sleep, while they wait for one another.
//
// GNU's OpenMP runtime, which torch brings, lets them spin for some milliseconds: right while every thread has a core.
// Beside another busy process one of them often has no core, and the others waste the time that it needs. The runtime
// shortens the spinning three-thousandfold while it has more threads than there are cores. Its other knobs are read once,
// when it is loaded; so this makes it have more threads, which sleep.
#pragma once

#if defined(_OPENMP)
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace fastalign {

class ShortWaits {
 public:
  explicit ShortWaits(int threads) : sleeper_([this, threads] { sleep(omp_get_num_procs() - threads + 2); }) {}

  ~ShortWaits() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    wake_.notify_one();
    sleeper_.join();  // the runtime ends a thread's team with the thread
  }

 private:
  void sleep(int team) {
#pragma omp parallel num_threads(std::max(2, team))
    members_.fetch_add(1);  // a region of nothing might start nobody
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [this] { return over_; });
  }

  std::atomic<int> members_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  bool over_ = false;
  std::thread sleeper_;
};

}  // namespace fastalign
#endif
