"""Monitors for models that nobody named: ``python -m fastclip run --monitor`` finds them by what is clipped."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from fastclip import watching
from fastclip.health.monitor import GradientMonitor
from fastclip.health.naming import unwrapped

_MOST = 16  # models that are monitored; a program that makes a new one in each of thousands of trials has had enough


class Discovery:
    """A watcher that starts a monitor for each model whose gradients are clipped, at the first such call.

    Of all modules that exist then (the garbage collector knows them) the model is the one that has the most of the
    clipped parameters; among such, the one with the fewest trainable parameters beside them; among such, the outermost.
    So the generator of a GAN is told from the module that holds it and the discriminator, and names are those of the
    whole model when only its head is trained. Models are not kept alive.

    Args:
        monitor: makes the monitor of a model, ``GradientMonitor`` with its arguments.
    """

    def __init__(self, monitor: Callable[[nn.Module], GradientMonitor] = GradientMonitor):
        self.monitors: list[GradientMonitor] = []
        self.names: list[str] = []  # the class of each monitor's model
        self._models: list[weakref.ref] = []
        self._make = monitor
        self._orphans: set[int] = set()  # ids of parameters for which there is no module
        self._lock = threading.Lock()

    def recorder_of(self, parameters: Sequence[Tensor]) -> watching.Record | None:
        with self._lock:
            monitor = self._monitor_of(parameters)
        return None if monitor is None else monitor.recorder_of(parameters)

    def _monitor_of(self, parameters: Sequence[Tensor]) -> GradientMonitor | None:
        for reference, monitor in zip(self._models, self.monitors, strict=True):
            if reference() is not None and monitor.has_one_of(parameters):
                return monitor
        if len(self.monitors) == _MOST or all(id(parameter) in self._orphans for parameter in parameters):
            return None
        model = find_model(parameters)
        if model is None:
            self._orphans.update(map(id, parameters))
            return None
        self.monitors.append(self._make(cast(nn.Module, weakref.proxy(model))))
        self._models.append(weakref.ref(model))
        self.names.append(type(model).__name__)
        return self.monitors[-1]


def find_model(parameters: Sequence[Tensor]) -> nn.Module | None:
    """The module to which parameters belong, see ``Discovery``; None if there is none."""
    wanted = {id(parameter) for parameter in parameters}
    best: nn.Module | None = None
    best_key: tuple[int, ...] = (0,)
    # By the class of the object: isinstance would ask proxies of all kinds what they stand for.
    for module in [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]:
        try:
            own = list(module.named_modules())
            held = {id(p): p for _, m in own for p in m._parameters.values() if p is not None}
        except (AttributeError, RuntimeError):
            continue  # under construction, maybe in another thread
        covered = len(wanted & held.keys())
        others = sum(p.requires_grad for key, p in held.items() if key not in wanted)
        key = covered, -others, len(own)
        if covered and key > best_key:
            best, best_key = module, key
    return None if best is None else unwrapped(best)
