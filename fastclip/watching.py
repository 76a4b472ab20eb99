"""Who records the calls of the clipping functions: nobody, or gradient monitors.

The functions of ``clip`` and ``ClippedOptimizer`` ask ``begin`` before they clip. It costs them the look at an empty
list as long as nobody watches.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from fastclip.statistics import GradStatistics

Record = Callable[..., None]  # takes (parameters, statistics, …), where … is what Recording.finish was given


class Watcher(Protocol):
    def recorder_of(self, parameters: Sequence[Tensor]) -> Record | None:
        """Asked once for each call that clips: what records it, None if nobody does. Counts the step."""


watchers: list[Watcher] = []  # those of patch(monitor=…) and patched(monitor=…)
_thread = threading.local()


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """In this thread the watchers are not asked inside the block: they were before it."""
    before, _thread.unasked = getattr(_thread, "unasked", False), True
    try:
        yield
    finally:
        _thread.unasked = before


def forget(watcher: Watcher) -> None:
    watchers[:] = [other for other in watchers if other is not watcher]


class Recording:
    """One call that somebody records: hand ``statistics`` to the pass over the gradients, then finish."""

    def __init__(self, parameters: Sequence[Tensor], recorders: list[Record], statistics: GradStatistics | None = None):
        self.parameters = parameters
        self.recorders = recorders
        self.statistics = GradStatistics() if statistics is None else statistics

    def measure(self) -> None:
        """Takes the statistics in a pass of its own, for what clips in a way that has none."""
        from fastclip.health.measure import measure

        measure(self.parameters, self.statistics)

    def finish(
        self,
        total_norm: Tensor | None,
        max_norm: float | Tensor | None,
        norm_type: float = 2.0,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Records.

        Args:
            total_norm: of the gradients; None where the call did not get as far as that.
            max_norm: the threshold, None where nothing is clipped by norm.
            norm_type: order of the norms.
            grad_scale: what was taken out of all that, a 0-d tensor.
        """
        for record in self.recorders:
            record(
                self.parameters,
                self.statistics,
                total_norm=total_norm,
                max_norm=max_norm,
                norm_type=norm_type,
                grad_scale=grad_scale,
            )


def begin(
    parameters: Tensor | Sequence[Tensor], attached: Sequence[Watcher] = (), statistics: GradStatistics | None = None
) -> Recording | None:
    """A recording of the call that is about to clip these parameters, None where nobody wants one.

    Args:
        parameters: of the call.
        attached: watchers of this caller, beside those of everybody.
        statistics: those that the caller wants filled for himself.
    """
    if getattr(_thread, "unasked", False):
        return None
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    asked = [watcher.recorder_of(parameters) for watcher in dict.fromkeys([*attached, *watchers])]
    recorders = [recorder for recorder in asked if recorder is not None]
    return Recording(parameters, recorders, statistics) if recorders else None
