// Adaptive clipping on the CPU: divides units among threads by their bytes.
#include "../adaptive.h"
#include "../backend.h"
#include "../clip_math.h"
#include "dispatch.h"
#include "shares.h"

namespace fastclip::cpu {
namespace {

int64_t unit_bytes(const UnitTensor& tensor) {
  return tensor.numel * (item_size(tensor.weight_dtype) + item_size(tensor.grad_dtype));
}

// Boundaries of shares of about equal bytes, between units.
std::vector<UnitCut> cut(const std::vector<UnitTensor>& tensors, int64_t bytes, int shares) {
  std::vector<UnitCut> cuts{{0, 0}};
  const int64_t count = static_cast<int64_t>(tensors.size());
  int64_t tensor = 0, before = 0;  // bytes in all tensors before `tensor`
  for (int share = 1; share < shares; ++share) {
    const int64_t target = bytes / shares * share;
    const auto bytes_of = [&](int64_t t) { return tensors[t].units * unit_bytes(tensors[t]); };
    while (tensor < count && before + bytes_of(tensor) <= target) before += bytes_of(tensor++);
    cuts.push_back({tensor, tensor < count ? (target - before) / unit_bytes(tensors[tensor]) : 0});
  }
  cuts.push_back({count, 0});
  return cuts;
}

// Units so large that a share of them for each thread would leave some idle: all threads do one after the other.
void adapt_large(UnitTensor& tensor, UnitLimit limit) {
  for (int64_t unit = 0; unit < tensor.units; ++unit) {
    const int64_t first = unit * tensor.numel;
    TensorTable weight, grad;
    weight.add(tensor.weight + first * item_size(tensor.weight_dtype), tensor.numel, tensor.weight_dtype);
    grad.add(tensor.grad + first * item_size(tensor.grad_dtype), tensor.numel, tensor.grad_dtype);
    const double weight_norm = total_norm(weight, limit.norm_type);
    const double coef = unit_coef(limit, weight_norm, total_norm(grad, limit.norm_type));
    if (!must_scale(coef)) continue;
    scale(grad, coef);
    tensor.written = 1;
  }
}

}  // namespace

void adapt(std::vector<UnitTensor>& tensors, UnitLimit limit) {
  int64_t bytes = 0;
  for (const UnitTensor& tensor : tensors) bytes += tensor.units * unit_bytes(tensor);
  const Kernels& run = kernels();
  if (bytes < kSmallBytes || at::get_num_threads() == 1) {
    return run.adapt(tensors.data(), {0, 0}, {static_cast<int64_t>(tensors.size()), 0}, limit);
  }
  std::vector<UnitTensor> shared;
  std::vector<UnitTensor*> originals;
  for (UnitTensor& tensor : tensors) {
    if (unit_bytes(tensor) >= 2 * kSmallBytes) {
      bytes -= tensor.units * unit_bytes(tensor);
      adapt_large(tensor, limit);
    } else {
      shared.push_back(tensor);
      originals.push_back(&tensor);
    }
  }
  const int shares = bytes < kSmallBytes ? 1 : at::get_num_threads();
  const auto cuts = cut(shared, bytes, shares);
  for_each_share(shares, [&](int i) { run.adapt(shared.data(), cuts[i], cuts[i + 1], limit); });
  for (size_t i = 0; i < shared.size(); ++i) originals[i]->written = shared[i].written;
}

}  // namespace fastclip::cpu
