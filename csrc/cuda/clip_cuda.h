// The functions of clip.h, for gradients of which some are on CUDA devices.
#pragma once

#include "../clip.h"

namespace fastclip::cuda {

at::Tensor get_total_norm(Gradients& grads, NormType type, bool error_if_nonfinite, at::Tensor* statistics);
at::Tensor clip_grad_norm(Gradients& grads, const Threshold& max_norm, NormType type, Nonfinite nonfinite,
                          at::Tensor* statistics, ClipReport* report);
void clip_grads_with_norm(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite);
void report_on(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite,
               ClipReport& report);
void clip_grad_value(Gradients& grads, double clip_value);
void follow_norm(const at::Tensor& policy, const at::Tensor& total_norm);
Prepared prepare_step(Gradients& grads, const Threshold& max_norm, NormType type, const Number& grad_scale,
                      bool in_place, Nonfinite nonfinite, at::Tensor* statistics, ClipReport* report);

}  // namespace fastclip::cuda
