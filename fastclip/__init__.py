"""Gradient clipping for PyTorch at the speed of memory: a drop-in for ``torch.nn.utils.clip_grad_norm_``."""

import os

from fastclip._native import build_info
from fastclip._version import __version__
from fastclip.adaptive import clip_grad_adaptive_
from fastclip.amp import GradScaler
from fastclip.clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from fastclip.clip_report import ClipReport, last_report
from fastclip.counters import counters, reset_counters
from fastclip.groups import clip_grad_norms_
from fastclip.optim import ClippedOptimizer
from fastclip.patching import is_patched, patch, patched, unpatch
from fastclip.policies import AutoClip, ZClip
from fastclip.statistics import GradStatistics

__all__ = [
    "AutoClip",
    "ClipReport",
    "ClippedOptimizer",
    "GradScaler",
    "GradStatistics",
    "GradientMonitor",
    "ZClip",
    "__version__",
    "build_info",
    "clip_grad_adaptive_",
    "clip_grad_norm_",
    "clip_grad_norms_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "counters",
    "get_total_norm",
    "is_patched",
    "last_report",
    "patch",
    "patched",
    "reset_counters",
    "unpatch",
]


def __getattr__(name: str):
    if name == "GradientMonitor":  # only who monitors imports it
        from fastclip.health.monitor import GradientMonitor

        return GradientMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if os.environ.get("FASTCLIP_AUTOPATCH") == "1":
    patch()
