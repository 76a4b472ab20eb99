"""Statistics of gradients that are not clipped by norm, and norms of parameters."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastclip._native import _C
from fastclip.statistics import GradStatistics, by_torch


def norms_of(parameters: Iterable[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """The L2 norm of each parameter by its number: 0-d, on its device; of a sharded one the global norm."""
    return {number: _norm(parameter.detach()) for number, parameter in parameters}


def _norm(parameter: Tensor) -> Tensor:
    norm = _C.norm_of([parameter], 2.0) if _C else None  # which is no call for fastclip.counters()
    if not isinstance(norm, Tensor):
        dtype = torch.promote_types(parameter.dtype, torch.float64)
        norm = torch.linalg.vector_norm(parameter, dtype=dtype)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def measure(parameters: Sequence[Tensor], statistics: GradStatistics) -> None:
    """Fills statistics, with L2 norms, in a pass that changes nothing."""
    # What is no tensor is the caller's mistake: the clipping that follows says so.
    grads = [grad for p in parameters if (grad := getattr(p, "grad", None)) is not None]
    result = _C.norm_and_statistics_of(grads, 2.0) if _C else None
    statistics.values = result[1] if isinstance(result, tuple) else by_torch(grads, 2.0)
