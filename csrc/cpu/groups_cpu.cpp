// Norms of groups on the CPU: whole groups are divided among threads, and one that is large is shared by all of them.
#include <cmath>

#include "../backend.h"
#include "../clip_math.h"
#include "../factors.h"
#include "dispatch.h"
#include "shares.h"

namespace fastclip::cpu {
namespace {

TensorTable part_of(const TensorTable& table, int64_t begin, int64_t end) {
  TensorTable part;
  part.reserve(end - begin);
  for (const Slice* s = table.slices() + begin; s != table.slices() + end; ++s) {
    part.add(s->data, s->bytes / item_size(s->dtype), s->dtype);
  }
  return part;
}

// Calls large(group, table) for each group of kSmallBytes and more, on this thread; then small(group, begin, end), with
// its slices, for the others: on all threads, by their bytes.
template <class Large, class Small>
void for_each_group(const TensorTable& table, const std::vector<int64_t>& ends, Large large, Small small) {
  const int64_t count = static_cast<int64_t>(ends.size());
  const auto begin_of = [&](int64_t g) { return g > 0 ? ends[g - 1] : 0; };
  std::vector<int64_t> bytes(count, 0);
  int64_t total = 0;
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t s = begin_of(g); s < ends[g]; ++s) bytes[g] += table.slices()[s].bytes;
    if (bytes[g] >= kSmallBytes) {
      large(g, part_of(table, begin_of(g), ends[g]));
    } else {
      total += bytes[g];
    }
  }
  const int shares = total < kSmallBytes ? 1 : at::get_num_threads();
  std::vector<int64_t> cuts(shares + 1, count);
  cuts[0] = 0;
  int64_t before = 0;
  for (int64_t g = 0, share = 1; g < count && share < shares; ++g) {
    if (bytes[g] < kSmallBytes) before += bytes[g];
    while (share < shares && before >= total / shares * share) cuts[share++] = g + 1;
  }
  for_each_share(shares, [&](int share) {
    for (int64_t g = cuts[share]; g < cuts[share + 1]; ++g) {
      if (bytes[g] < kSmallBytes) small(g, Cut{begin_of(g), 0}, Cut{ends[g], 0});
    }
  });
}

void scale_part(const TensorTable& table, Cut begin, Cut end, double coef) {
  const Factors factors = factors_of(coef);
  kernels().scale(table.slices(), begin, end, factors.first);
  if (factors.second != 1) kernels().scale(table.slices(), begin, end, factors.second);
}

}  // namespace

void clip_groups(const TensorTable& table, const std::vector<int64_t>& ends, NormType type,
                 const std::function<double(int64_t, double)>& coef_of) {
  const Kernels& run = kernels();
  for_each_group(
      table, ends,
      [&](int64_t g, const TensorTable& group) {
        const double coef = coef_of(g, total_norm(group, type));
        if (must_scale(coef)) scale(group, coef);
      },
      [&](int64_t g, Cut begin, Cut end) {
        const long double sum = run.reduce(table.slices(), begin, end, type);
        const double coef = coef_of(g, static_cast<double>(type == NormType::L2 ? std::sqrt(sum) : sum));
        if (must_scale(coef)) scale_part(table, begin, end, coef);
      });
}

void scale_groups(const TensorTable& table, const std::vector<int64_t>& ends, const double* coefs) {
  for_each_group(
      table, ends,
      [&](int64_t g, const TensorTable& group) {
        if (must_scale(coefs[g])) scale(group, coefs[g]);
      },
      [&](int64_t g, Cut begin, Cut end) {
        if (must_scale(coefs[g])) scale_part(table, begin, end, coefs[g]);
      });
}

}  // namespace fastclip::cpu
