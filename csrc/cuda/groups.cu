#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstring>

#include "../groups.h"
#include "group_kernels.cuh"
#include "launch.h"

namespace fastclip::cuda {
namespace {

template <class Table>
void launch_kernel(GroupJob job, const void* table, int blocks, c10::cuda::CUDAStream stream) {
  const auto* const kernel = reinterpret_cast<const void*>(&group_kernel<Table>);
  void* args[] = {&job, const_cast<void*>(table)};
  if (job.task == GroupTask::Scale) return launch_plain(kernel, blocks, args, stream);
  if (launch_cooperative(kernel, blocks, args, stream)) return;
  // The end of a launch is a barrier as well.
  const bool all = job.task == GroupTask::All;
  for (const GroupTask task : {GroupTask::Reduce, GroupTask::Decide, GroupTask::Scale}) {
    if (task == GroupTask::Scale && !all) break;
    job.task = task;
    launch_plain(kernel, blocks, args, stream);
  }
}

void launch(const GroupJob& job, const PackedTable& table, int blocks, c10::cuda::CUDAStream stream) {
  if (table.size() <= kFewEntries) return launch_kernel<InlineTable<kFewEntries>>(job, table.entries(), blocks, stream);
  if (table.size() <= kManyEntries) {
    return launch_kernel<InlineTable<kManyEntries>>(job, table.entries(), blocks, stream);
  }
  const TableOnDevice copy = on_device(table, stream);
  const RemoteTable remote{copy.entries};
  launch_kernel<RemoteTable>(job, &remote, blocks, stream);
}

}  // namespace

at::Tensor clip_grad_norms(Group& grads, const std::vector<int64_t>& ends, const MaxNorms& max_norms, NormType type,
                           bool error_if_nonfinite, at::ScalarType norm_dtype) {
  const c10::cuda::CUDAGuard guard(grads.device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(grads.device.index());
  const int64_t groups = static_cast<int64_t>(ends.size());
  const auto on_this_device = at::TensorOptions(grads.device);

  PackedTable table(grads.dense.size() + groups);
  table.add(grads.dense);
  const int blocks = blocks_for(table, grads.device.index());
  for (int64_t g = 0; g < groups; ++g) {
    const GroupRecord record{max_norms.tensor.defined() ? 0 : max_norms.values[g], static_cast<int32_t>(ends[g]), 0};
    Entry entry;
    std::memcpy(static_cast<void*>(&entry), &record, sizeof(entry));
    table.append(entry);
  }

  // Apart, since the user keeps the norms for as long as he likes.
  at::Tensor norms = at::empty({groups}, on_this_device.dtype(norm_dtype));
  const int64_t pairs = static_cast<int64_t>(blocks) * kWarps + groups;
  const at::Tensor workspace = at::empty({groups + pairs * kPartNumbers}, on_this_device.dtype(at::kDouble));
  at::Tensor thresholds;
  if (max_norms.tensor.defined()) thresholds = max_norms.tensor.to(on_this_device.dtype(at::kDouble)).contiguous();

  GroupJob job{};
  job.task = error_if_nonfinite ? GroupTask::ReduceThenDecide : GroupTask::All;
  job.norm_type = type;
  job.norms_are_f64 = norm_dtype == at::kDouble;
  job.entries = static_cast<int>(grads.dense.size());
  job.groups = static_cast<int>(groups);
  job.rows = table.rows();
  job.max_norms = thresholds.defined() ? thresholds.const_data_ptr<double>() : nullptr;
  job.norms = norms.mutable_data_ptr();
  job.coefs = workspace.mutable_data_ptr<double>();
  job.parts = job.coefs + groups;
  launch(job, table, blocks, stream);
  if (error_if_nonfinite) {
    check_finite_groups(norms, type);  // waits
    job.task = GroupTask::Scale;
    launch(job, table, blocks, stream);
  }
  for (at::TensorImpl* impl : grads.impls) impl->bump_version();
  return norms;
}

}  // namespace fastclip::cuda
