"""The extension, as csrc/bindings.cpp defines it. All arguments are positional."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastclip.policies import ThresholdPolicy
from fastclip.statistics import GradStatistics

_Tensors = Tensor | Sequence[Tensor]  # a list, a tuple, or one tensor
_Number = float | Tensor  # a tensor is 0-d
_Threshold = _Number | ThresholdPolicy
# Or a str, the reason why torch has to do the call; or None, where there are no gradients. Callers tell them apart by
# `type(result) is str`, which says nothing to a type checker: so it is told nothing.
_OrReason = Any

compiler: str
cuda: int | None  # 13000 for CUDA 13.0, None without the CUDA part

# The functions of fastclip.clip: on parameters, counted.
def get_total_norm(tensors: _Tensors, norm_type: float, error_if_nonfinite: bool, /) -> Tensor | _OrReason: ...
def clip_grad_norm_(
    parameters: _Tensors, max_norm: _Threshold, norm_type: float, error_if_nonfinite: bool, /
) -> Tensor | _OrReason: ...
def clip_grad_norm_and_tell(
    parameters: _Tensors,
    max_norm: _Threshold,
    norm_type: float,
    error_if_nonfinite: bool,
    statistics: GradStatistics | None,
    nonfinite: str | None,
    report: ClipReport | None,
    /,
) -> Tensor | _OrReason: ...
def clip_grads_with_norm_(parameters: _Tensors, max_norm: _Number, total_norm: Tensor, /) -> str | None: ...
def clip_grad_value_(parameters: _Tensors, clip_value: _Number, /) -> str | None: ...
def clip_grad_adaptive_(parameters: _Tensors, clipping: float, eps: float, norm_type: float, /) -> str | None: ...
def clip_grad_norms_(
    groups: list[_Tensors], max_norms: Any, norm_type: float, error_if_nonfinite: bool, /
) -> Tensor | _OrReason: ...

# Before an optimizer's step: (total_norm, grad_scale or None where it is 1, found_inf).
def prepare_step(
    parameters: _Tensors, max_norm: _Threshold, norm_type: float, grad_scale: Tensor | None, in_place: bool, /
) -> tuple[Tensor, Tensor | None, Tensor] | _OrReason: ...
def prepare_step_and_tell(
    parameters: _Tensors,
    max_norm: _Threshold,
    norm_type: float,
    grad_scale: Tensor | None,
    in_place: bool,
    statistics: GradStatistics | None,
    nonfinite: str | None,
    report: ClipReport | None,
    /,
) -> tuple[Tensor, Tensor | None, Tensor] | _OrReason: ...

# The parts of a call over several ranks: on gradients, not counted.
def norm_of(grads: _Tensors, norm_type: float, /) -> Tensor | _OrReason: ...
def norm_and_statistics_of(grads: _Tensors, norm_type: float, /) -> tuple[Tensor, Tensor] | _OrReason: ...
def scale_by_norm_(grads: _Tensors, max_norm: _Number, total_norm: _Number, nonfinite: str | None, /) -> str | None: ...
def report_on(
    report: ClipReport,
    grads: _Tensors,
    passed_over: Sequence[int],
    max_norm: _Number,
    total_norm: Tensor,
    returned: Tensor,
    nonfinite: str | None,
    /,
) -> str | None: ...
def clamp_(grads: _Tensors, clip_value: float, /) -> str | None: ...

# Lets a policy follow a norm: changes its state.
def follow_norm(state: Tensor, total_norm: Tensor, /) -> None: ...

# What a call did, filled by calls that are given it. Reading may wait for a device.
class ClipReport:
    def __init__(self) -> None: ...
    def is_filled(self) -> bool: ...
    def total_norm(self) -> float: ...
    def clip_coef(self) -> float: ...
    def first_bad(self) -> int: ...  # -1 if there is none

# Counts.
def count_native_call() -> None: ...
def native_calls() -> int: ...
def operator_fallback_reasons() -> dict[str, int]: ...
def reset_counts() -> None: ...

# The instruction set of the CPU's kernels.
def kernels() -> str: ...
def available_kernels() -> list[str]: ...
def select_kernels(name: str, /) -> None: ...

# For tests, in a build with CUDA only.
def force_cuda_blocks(blocks: int, /) -> None: ...
def allow_cooperative_launches(allowed: bool, /) -> None: ...
