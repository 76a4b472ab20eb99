#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <memory>

#include "../adaptive.h"
#include "adaptive_kernels.cuh"

namespace fastclip::cuda {
namespace {

bool by_block(const UnitTensor& tensor) {
  return tensor.numel * (item_size(tensor.weight_dtype) + item_size(tensor.grad_dtype)) >= 2 * kBlockBytes;
}

// A list is independent of the next: what does not fit into the parameters of one launch is for another one.
template <int N>
void launch(const UnitTensor* tensors, int count, UnitLimit limit, c10::cuda::CUDAStream stream) {
  const auto list = std::make_unique<UnitList<N>>();
  list->limit = limit;
  int64_t units[2] = {0, 0};
  for (const bool blocks : {true, false}) {
    for (int i = 0; i < count; ++i) {
      const UnitTensor& tensor = tensors[i];
      if (by_block(tensor) != blocks) continue;
      units[blocks] += tensor.units;
      list->entry[list->entries++] = {tensor.weight, tensor.grad,         units[blocks],
                                      tensor.numel,  tensor.weight_dtype, tensor.grad_dtype};
    }
    if (blocks) list->by_blocks = list->entries;
  }
  int processors;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, static_cast<int>(stream.device_index())));
  const int64_t wanted = std::max<int64_t>(units[true], (units[false] + kWarps - 1) / kWarps);
  const int blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, 2 * processors));
  adapt_kernel<N><<<blocks, kThreads, 0, stream>>>(*list);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void adapt(const std::vector<UnitTensor>& tensors, UnitLimit limit, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  for (size_t first = 0; first < tensors.size(); first += kManyUnitEntries) {
    const int count = static_cast<int>(std::min<size_t>(tensors.size() - first, kManyUnitEntries));
    if (count <= kFewUnitEntries) {
      launch<kFewUnitEntries>(tensors.data() + first, count, limit, stream);
    } else {
      launch<kManyUnitEntries>(tensors.data() + first, count, limit, stream);
    }
  }
}

}  // namespace fastclip::cuda
