// The CPU backend: divides a table among threads and runs the kernels of this processor on the shares.
#include <ATen/Parallel.h>
#include <pthread.h>

#include <cmath>

#include "../backend.h"
#include "../clip_math.h"
#include "dispatch.h"

namespace fastclip::cpu {
namespace {

// OpenMP's threads do not exist in a forked child, and GNU's runtime waits for them for ever: a child works alone.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int shares_for(const TensorTable& table) {
  return table.bytes() < kSmallBytes ? 1 : at::get_num_threads();
}

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

}  // namespace

double total_norm(const TensorTable& table, NormType type) {
  const int shares = shares_for(table);
  const auto cuts = table.cut(shares);
  const Kernels& run = kernels();
  struct alignas(64) Partial {
    long double value;
  };
  std::vector<Partial> partials(shares);
  for_each_share(shares, [&](int i) { partials[i].value = run.reduce(table.slices(), cuts[i], cuts[i + 1], type); });

  long double total = 0;
  for (const Partial& partial : partials) {
    total = type == NormType::Inf ? nan_max(total, partial.value) : total + partial.value;
  }
  return static_cast<double>(type == NormType::L2 ? std::sqrt(total) : total);
}

// Slices with common bytes are written one after the other, as often as they occur, as in torch's loop.
static int shares_in_place(const TensorTable& table) {
  const int shares = shares_for(table);
  return shares > 1 && table.has_overlaps() ? 1 : shares;
}

void scale(const TensorTable& table, double coef) {
  const int shares = shares_in_place(table);
  const auto cuts = table.cut(shares);
  const Kernels& run = kernels();
  const Factors factors(coef);
  for_each_share(shares, [&](int i) {
    run.scale(table.slices(), cuts[i], cuts[i + 1], factors.first);
    if (factors.second != 1) run.scale(table.slices(), cuts[i], cuts[i + 1], factors.second);
  });
}

void clamp(TensorTable& table, double clip_value) {
  const int shares = shares_in_place(table);
  const auto cuts = table.cut(shares);
  const Kernels& run = kernels();
  for_each_share(shares, [&](int i) { run.clamp(table.slices(), cuts[i], cuts[i + 1], clip_value); });
}

}  // namespace fastclip::cpu
