// torch's ATen/Parallel.h for a program without torch: threads that a sanitizer sees, instead of OpenMP's.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline thread_local int num_threads = 4;

inline int get_num_threads() {
  return num_threads;
}

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back([&work, i] { work(i, i + 1); });
  work(begin, begin + 1);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
