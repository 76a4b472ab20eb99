#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <atomic>
#include <cmath>

#include "clip_kernels.cuh"
#include "launch.h"

#if CUDART_VERSION < 12010
#error "fastclip's CUDA part needs CUDA 12.1 or later: the table of gradients takes up to 32,764 bytes of parameters"
#endif

namespace fastclip::cuda {
namespace {

std::atomic<int> forced_blocks{0};
std::atomic<bool> cooperative_allowed{true};

int attribute(cudaDeviceAttr name, int device) {
  int value;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Whether all blocks can be resident together, as far as can be known before the launch.
bool fits(const void* kernel, int blocks, int device) {
  if (!cooperative_allowed || !attribute(cudaDevAttrCooperativeLaunch, device)) return false;
  int blocks_an_sm;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_an_sm, kernel, kThreads, 0));
  return blocks <= blocks_an_sm * attribute(cudaDevAttrMultiProcessorCount, device);
}

template <class Table>
const void* kernel_for(const Job& job) {
  return job.parts ? reinterpret_cast<const void*>(&clip_kernel<Table, true>)
                   : reinterpret_cast<const void*>(&clip_kernel<Table, false>);
}

void launch_kernel(const void* kernel, Job job, const void* table, int blocks, c10::cuda::CUDAStream stream) {
  void* args[] = {&job, const_cast<void*>(table)};
  if (job.task != Task::ReduceThenScale && job.task != Task::Norm) return launch_plain(kernel, blocks, args, stream);
  if (launch_cooperative(kernel, blocks, args, stream)) return;
  // The end of a launch is a barrier as well. The same blocks, the same shares, the same order: the same bits.
  const Task whole = job.task;
  job.task = Task::Reduce;
  launch_plain(kernel, blocks, args, stream);
  if (job.parts) {
    job.task = Task::Rows;
    launch_plain(kernel, blocks, args, stream);
  }
  if (job.policy && whole != Task::Norm) {
    Job decision = job;
    decision.task = Task::Decide;
    void* decision_args[] = {&decision, const_cast<void*>(table)};
    launch_plain(kernel, job.finds_bad ? blocks : 1, decision_args, stream);
    job.policy = nullptr;
    job.finds_bad = false;
    job.source = Source::Coef;
  }
  job.task = whole == Task::Norm ? Task::Decide : Task::Scale;
  launch_plain(kernel, whole == Task::Norm && !job.finds_bad ? 1 : blocks, args, stream);
}

}  // namespace

void launch_plain(const void* kernel, int blocks, void** args, c10::cuda::CUDAStream stream) {
  C10_CUDA_CHECK(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), args, 0, stream));
}

bool launch_cooperative(const void* kernel, int blocks, void** args, c10::cuda::CUDAStream stream) {
  if (!fits(kernel, blocks, stream.device_index())) return false;
  const cudaError_t error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), args, 0, stream);
  // Less room than the occupancy calculator knows of, as a share of a card under MPS has.
  if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported) {
    C10_CUDA_CHECK(error);
    return true;
  }
  (void)cudaGetLastError();
  return false;
}

int blocks_for(const PackedTable& table, c10::DeviceIndex device) {
  if (const int blocks = forced_blocks) return blocks;
  // Enough warps for each to have a batch of rows or a gradient.
  const int64_t warps = std::max<int64_t>(table.rows() / kRowsInFlight, table.size());
  const int64_t busy = (warps + kWarps - 1) / kWarps;
  // Every block reads every partial norm. From 8 MB on that is kept under 1% of the gradients' bytes:
  // 8 * blocks^2 <= bytes / 100, 102 blocks at 8 MB.
  const double few = std::sqrt(std::max<double>(table.bytes(), 8 << 20) / 800);
  const int64_t most = std::min<int64_t>(attribute(cudaDevAttrMultiProcessorCount, device), static_cast<int64_t>(few));
  return static_cast<int>(std::max<int64_t>(1, std::min(busy, most)));
}

void launch(Job job, const PackedTable& table, int blocks, c10::cuda::CUDAStream stream) {
  const c10::cuda::CUDAGuard guard(stream.device());
  job.entries = table.size();
  job.rows = table.rows();
  if (table.size() <= kFewEntries) {
    launch_kernel(kernel_for<InlineTable<kFewEntries>>(job), job, table.entries(), blocks, stream);
  } else if (table.size() <= kManyEntries) {
    launch_kernel(kernel_for<InlineTable<kManyEntries>>(job), job, table.entries(), blocks, stream);
  } else {
    const TableOnDevice copy = on_device(table, stream);
    const RemoteTable remote{copy.entries};
    launch_kernel(kernel_for<RemoteTable>(job), job, &remote, blocks, stream);
  }
}

void force_blocks(int blocks) {
  forced_blocks = blocks;
}

void allow_cooperative(bool allowed) {
  cooperative_allowed = allowed;
}

}  // namespace fastclip::cuda
