// Work for the threads that torch allows, a share each.
#pragma once

#include <ATen/Parallel.h>

namespace fastclip::cpu {

// OpenMP's threads do not exist in a forked child, and GNU's runtime waits for them for ever: a child works alone.
extern bool forked;

// Runs work(share) for every share, each on a thread of its own where threads may be used. The same share number gets
// the same thread in every call, so what a thread read it finds in its own cache when it scales.
template <class Work>
void for_each_share(int shares, Work work) {
  if (shares == 1 || forked) {
    for (int share = 0; share < shares; ++share) work(share);
    return;
  }
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) work(static_cast<int>(share));
  });
}

}  // namespace fastclip::cpu
