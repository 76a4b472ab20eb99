// Clipping by the norms of groups: each warp reduces its share of all rows, group by group; after a grid-wide barrier a
// warp a group combines the parts of its norm and decides; after another one each warp scales its share, with the
// coefficient of each group in it.
#pragma once

#include "clip_kernels.cuh"

namespace fastclip::cuda {

// A group, in the size of an Entry: it travels in the same table, behind the gradients.
struct GroupRecord {
  double max_norm;
  int32_t end;  // gradients of all groups up to this one
  int32_t unused;
};
static_assert(sizeof(GroupRecord) == sizeof(Entry));

enum class GroupTask : uint8_t { Reduce, Decide, ReduceThenDecide, Scale, All };

constexpr int kPartNumbers = 3;  // as L1, L2 and Inf of clip_kernels.cuh store them

struct GroupJob {
  GroupTask task;
  NormType norm_type;
  bool norms_are_f64;
  int entries, groups;
  int64_t rows;
  const double* max_norms;  // null: those of the records
  void* norms;              // what the user gets, one a group
  double* coefs;            // the same number
  double* parts;            // kPartNumbers for each pair of warp + group: both ascend, so their sum numbers the pairs
};
static_assert(sizeof(GroupJob) <= sizeof(Job), "the parameters hold a Job and the table");

namespace {

__device__ __forceinline__ int64_t own_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// The group that has a gradient: the first that ends behind it.
__device__ int find_group(const GroupRecord* groups, int count, int entry) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (groups[middle].end > entry) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <class Norm>
__device__ void reduce_groups(const GroupJob& job, const Entry* entries, const GroupRecord* groups) {
  const Share share(job.rows);
  if (share.begin >= share.end) return;
  const int lane = threadIdx.x % kWarp;
  int i = find(entries, job.entries, share.begin);
  int group = find_group(groups, job.groups, i);
  Norm norm;
  const auto leave = [&] {
    const Norm whole = warp_norm(norm);
    if (lane == 0) whole.store(job.parts + kPartNumbers * (own_warp() + group));
  };
  for (; i < job.entries; ++i) {
    if (i >= groups[group].end) {
      leave();
      norm = Norm();
      while (groups[group].end <= i) ++group;
    }
    const Segment segment(entries, i, share);
    with_dtype(segment.dtype, [&](auto d) { reduce<decltype(d)>(segment, lane, norm); });
    if (end_row(entries[i]) >= share.end) break;
  }
  leave();
}

template <class Norm>
__device__ void decide_groups(const GroupJob& job, const Entry* entries, const GroupRecord* groups) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t g = own_warp(); g < job.groups; g += warps) {
    const int first = g > 0 ? groups[g - 1].end : 0, end = groups[g].end;
    Norm norm;
    if (first < end) {
      const int64_t start = first > 0 ? end_row(entries[first - 1]) : 0;
      const int64_t last = warp_of(end_row(entries[end - 1]) - 1, job.rows);
      for (int64_t w = warp_of(start, job.rows) + lane; w <= last; w += kWarp) {
        double numbers[kPartNumbers];
        for (int n = 0; n < Norm::kNumbers; ++n) numbers[n] = __ldcg(job.parts + kPartNumbers * (w + g) + n);
        norm.merge(Norm::load(numbers));
      }
    }
    const double total = warp_norm(norm).norm();
    if (lane != 0) continue;
    const double returned = job.norms_are_f64 ? total : static_cast<float>(total);
    if (job.norms_are_f64) {
      static_cast<double*>(job.norms)[g] = returned;
    } else {
      static_cast<float*>(job.norms)[g] = static_cast<float>(returned);
    }
    job.coefs[g] = group_coef(job.max_norms ? job.max_norms[g] : groups[g].max_norm, total, returned);
  }
}

__device__ void scale_groups(const GroupJob& job, const Entry* entries, const GroupRecord* groups) {
  const Share share(job.rows);
  if (share.begin >= share.end) return;
  const int lane = threadIdx.x % kWarp;
  int i = find(entries, job.entries, share.end - 1);
  int group = find_group(groups, job.groups, i);
  for (; i >= 0; --i) {
    while (group > 0 && groups[group - 1].end > i) --group;
    const double coef = __ldcg(job.coefs + group);  // from L2: another SM may have written it
    if (must_scale(coef)) {
      const Factors factors = factors_of(coef);
      const Segment segment(entries, i, share);
      with_dtype(segment.dtype, [&](auto d) {
        using D = decltype(d);
        scale<D>(segment, lane, factors.first);
        if (factors.second != 1) scale<D>(segment, lane, factors.second);
      });
    }
    if (i == 0 || end_row(entries[i - 1]) <= share.begin) break;
  }
}

template <class Table>
__global__ void __launch_bounds__(kThreads, 2)
    group_kernel(const __grid_constant__ GroupJob job, const __grid_constant__ Table table) {
  const Entry* const entries = table.entries;
  const auto* const groups = reinterpret_cast<const GroupRecord*>(entries + job.entries);
  const GroupTask task = job.task;
  const bool both = task == GroupTask::All || task == GroupTask::ReduceThenDecide;
  with_norm_type(job.norm_type, [&](auto norm) {
    using Norm = decltype(norm);
    if (both || task == GroupTask::Reduce) reduce_groups<Norm>(job, entries, groups);
    if (both) cooperative_groups::this_grid().sync();
    if (both || task == GroupTask::Decide) decide_groups<Norm>(job, entries, groups);
    return 0;
  });
  if (task == GroupTask::All) cooperative_groups::this_grid().sync();
  if (task == GroupTask::All || task == GroupTask::Scale) scale_groups(job, entries, groups);
}

}  // namespace
}  // namespace fastclip::cuda
