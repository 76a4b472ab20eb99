"""Puts fastclip under ``torch.nn.utils``, and takes it away again.

torch's clipping functions are wrappers that keep the real function in a closure cell. Setting that cell changes the
function for everybody, also for modules that imported it long before, and leaves its identity as it was. Where a
version of torch has no such cell, the attributes of ``torch.nn.utils`` and ``torch.nn.utils.clip_grad`` are set, which
reaches those who look the function up when they call it.
"""

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from torch.compiler import is_dynamo_compiling
from torch.nn import utils as torch_utils
from torch.nn.utils import clip_grad as torch_module

from fastclip import clip, watching
from fastclip._torch_functions import NAMES, cell_of

_lock = threading.Lock()
_switched_on = False  # by patch(), until unpatch()
_contexts = 0  # how many `with patched():` are open, in all threads
_originals: dict[str, Callable] = {}  # what to put back; empty when nothing is patched
_monitors: "weakref.WeakSet[watching.Watcher]" = weakref.WeakSet()  # of patch(); the watchers' list keeps them alive
_seconds = 0.0


def patch(*, monitor: watching.Watcher | None = None) -> dict[str, str]:
    """Puts fastclip under torch's four clipping functions until ``unpatch()``; more calls change nothing.

    Args:
        monitor: a ``fastclip.GradientMonitor`` that records, until then or its ``close()``, whatever clips its model's
            gradients: torch's functions, fastclip's, and ClippedOptimizer.

    Returns a dict from each public name (``"clip_grad_norm_"``, ...) to how far the patch reaches: ``"everybody"``,
    ``"attribute"`` (not those who imported the function by name before) or ``"missing"`` (this torch has no such
    function).
    """
    global _switched_on
    _check_monitor(monitor)
    with _lock:
        _switched_on = True
        if monitor is not None and monitor not in _monitors:
            _monitors.add(monitor)
            watching.watchers.append(monitor)
        _update()
    return {name: _reach(name) for name in NAMES}


def unpatch() -> None:
    """Gives torch its own functions back, unless a ``with patched():`` is still open somewhere."""
    global _switched_on
    with _lock:
        _switched_on = False
        while _monitors:
            _remove(_monitors.pop())
        _update()


@contextlib.contextmanager
def patched(*, monitor: watching.Watcher | None = None) -> Iterator[None]:
    """Patches inside a ``with`` block, in all threads. Nests; afterwards everything is as it was before.

    Args:
        monitor: a ``fastclip.GradientMonitor`` that records, inside the block, whatever clips its model's gradients.
    """
    global _contexts
    _check_monitor(monitor)
    with _lock:
        _contexts += 1
        if monitor is not None:
            watching.watchers.append(monitor)
        _update()
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            if monitor is not None:
                _remove(monitor)
            _update()


def is_patched() -> bool:
    """Whether torch's functions run on fastclip now."""
    return bool(_originals)


def seconds_spent() -> float:
    """Seconds of wall-clock time in patched functions since fastclip was imported, over all threads."""
    return _seconds


def _check_monitor(monitor: watching.Watcher | None) -> None:
    if monitor is not None and not hasattr(monitor, "recorder_of"):
        raise TypeError(f"monitor: expected a fastclip.GradientMonitor, got {type(monitor).__name__}")


def _remove(monitor: watching.Watcher) -> None:
    if monitor in watching.watchers:  # it was closed
        watching.watchers.remove(monitor)


def _reach(name: str) -> str:
    if cell_of(name) is not None:
        return "everybody"
    return "attribute" if hasattr(torch_module, NAMES[name]) else "missing"


def _update() -> None:
    wanted = _switched_on or _contexts > 0
    if wanted and not _originals:
        for name in NAMES:
            if _reach(name) != "missing":
                _originals[name] = _swap(name, _replacement(name))
    elif not wanted and _originals:
        for name, original in _originals.items():
            _swap(name, original)
        _originals.clear()


def _swap(name: str, function: Callable) -> Callable:
    """Puts a function in place and returns the one that was there. One assignment where torch has a cell."""
    cell = cell_of(name)
    if cell is not None:
        before, cell.cell_contents = cell.cell_contents, function
        return before
    before = getattr(torch_module, NAMES[name])
    for module, attribute in ((torch_module, NAMES[name]), (torch_utils, name)):
        if getattr(module, attribute, None) is before:
            setattr(module, attribute, function)
    return before


def _replacement(name: str) -> Callable:
    """fastclip's function, timed; torch.compile traces it without the clock."""
    native = getattr(clip, name)

    @functools.wraps(native)
    def function(*args, **kwargs):
        global _seconds
        if is_dynamo_compiling():
            return native(*args, **kwargs)
        start = time.perf_counter()
        try:
            return native(*args, **kwargs)
        finally:
            _seconds += time.perf_counter() - start

    return function
