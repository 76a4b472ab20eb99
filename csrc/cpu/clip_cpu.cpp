// The CPU backend: divides a table among threads and runs the kernels of this processor on the shares.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../backend.h"
#include "../clip_math.h"
#include "../factors.h"
#include "dispatch.h"
#include "shares.h"

namespace fastclip::cpu {
namespace {

int shares_for(const TensorTable& table) {
  return table.bytes() < kSmallBytes ? 1 : at::get_num_threads();
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

namespace {

double norm_from(long double sum, NormType type) {
  return static_cast<double>(type == NormType::L2 ? std::sqrt(sum) : sum);
}

void add(StatisticsRow& row, double norm, const PartStatistics& part, NormType type) {
  row.norm = combine_norms(row.norm, norm, type);
  row.abs_max = nan_max(row.abs_max, static_cast<double>(part.abs_max));
  row.zeros += static_cast<double>(part.zeros);
  row.infs += static_cast<double>(part.infs);
  row.nans += static_cast<double>(part.nans);
  row.subnormals += static_cast<double>(part.subnormals);
}

void add(PartStatistics& total, const PartStatistics& part) {
  total.sum += part.sum;
  total.abs_max = part.abs_max > total.abs_max || std::isnan(part.abs_max) ? part.abs_max : total.abs_max;
  total.zeros += part.zeros;
  total.infs += part.infs;
  total.nans += part.nans;
  total.subnormals += part.subnormals;
}

}  // namespace

double total_norm(const TensorTable& table, NormType type, StatisticsRow* rows) {
  const int shares = shares_for(table);
  const auto cuts = table.cut(shares);
  const Kernels& run = kernels();
  // A share's parts begin at its first slice plus its own number: a slice that is cut has a part in each share.
  std::vector<PartStatistics> parts(table.size() + shares, PartStatistics{});
  for_each_share(shares, [&](int i) {
    run.examine(table.slices(), cuts[i], cuts[i + 1], type, parts.data() + cuts[i].slice + i);
  });

  long double total = 0;
  double largest = 0;
  PartStatistics whole{};  // of the slice at hand
  for (int i = 0; i < shares; ++i) {
    long double sum = 0;  // added up share by share, as the plain sum is
    const int64_t end = cuts[i + 1].slice + (cuts[i + 1].byte > 0);
    for (int64_t s = cuts[i].slice; s < end; ++s) {
      const PartStatistics& part = parts[s + i];
      sum += part.sum;
      add(whole, part);
      if (s == cuts[i + 1].slice) break;  // the next share goes on with it
      const double norm = type == NormType::Inf ? static_cast<double>(whole.abs_max) : norm_from(whole.sum, type);
      add(rows[table.slices()[s].row], norm, whole, type);
      largest = nan_max(largest, static_cast<double>(whole.abs_max));
      whole = {};
    }
    total += sum;
  }
  return type == NormType::Inf ? largest : norm_from(total, type);
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
  const Factors factors = factors_of(coef);
  for_each_share(shares, [&](int i) {
    run.scale(table.slices(), cuts[i], cuts[i + 1], factors.first);
    if (factors.second != 1) run.scale(table.slices(), cuts[i], cuts[i + 1], factors.second);
  });
}

void zero(const TensorTable& table) {
  const int shares = shares_in_place(table);
  const auto cuts = table.cut(shares);
  for_each_share(shares, [&](int i) {
    for (int64_t s = cuts[i].slice; s < cuts[i + 1].slice + (cuts[i + 1].byte > 0); ++s) {
      const Slice& slice = table.slices()[s];
      const int64_t begin = s == cuts[i].slice ? cuts[i].byte : 0;
      const int64_t end = s == cuts[i + 1].slice ? cuts[i + 1].byte : slice.bytes;
      std::memset(slice.data + begin, 0, end - begin);
    }
  });
}

int64_t first_nonfinite(const TensorTable& table) {
  const int shares = shares_for(table);
  const auto cuts = table.cut(shares);
  const Kernels& run = kernels();
  std::vector<int64_t> found(shares, table.size());
  for_each_share(shares, [&](int i) {
    for (int64_t s = cuts[i].slice; s < cuts[i + 1].slice + (cuts[i + 1].byte > 0) && found[i] == table.size(); ++s) {
      const Cut begin = s == cuts[i].slice ? cuts[i] : Cut{s, 0};
      const Cut end = s == cuts[i + 1].slice ? cuts[i + 1] : Cut{s + 1, 0};
      if (!std::isfinite(run.reduce(table.slices(), begin, end, NormType::Inf))) found[i] = s;
    }
  });
  const int64_t first = *std::min_element(found.begin(), found.end());
  return first < table.size() ? first : -1;
}

void clamp(TensorTable& table, double clip_value) {
  const int shares = shares_in_place(table);
  const auto cuts = table.cut(shares);
  const Kernels& run = kernels();
  for_each_share(shares, [&](int i) { run.clamp(table.slices(), cuts[i], cuts[i + 1], clip_value); });
}

}  // namespace fastclip::cpu
