"""Counts which calls ran natively and which went through torch, and why."""

import threading
from collections import Counter

from fastclip._native import _C

_lock = threading.Lock()
_fallback_reasons: Counter[str] = Counter()


def count_fallback(reason: str) -> None:
    with _lock:
        _fallback_reasons[reason] += 1


def counters() -> dict:
    """What the clipping functions did since the start of the process or the last ``reset_counters()``.

    Returns a dict with ``calls`` (int, ``native + fallback``), ``native`` (int, done by fastclip's own kernels),
    ``fallback`` (int, handed to torch's function) and ``fallback_reasons`` (dict from reason to int, for example
    ``{"sparse": 3}``). Calls that raise an error before either are not counted.
    """
    with _lock:
        reasons = _fallback_reasons + Counter(_C.operator_fallback_reasons() if _C else {})
    native = _C.native_calls() if _C else 0
    fallback = sum(reasons.values())
    return {"calls": native + fallback, "native": native, "fallback": fallback, "fallback_reasons": dict(reasons)}


def reset_counters() -> None:
    """Sets all counters to zero."""
    with _lock:
        _fallback_reasons.clear()
    if _C:
        _C.reset_counts()
