"""GradientMonitor: records what every clipping of a model's gradients sees, parameter by parameter."""

import atexit
import functools
import io
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastclip import clip, watching
from fastclip.health import log, views
from fastclip.health.activations import Activations
from fastclip.health.history import History, Layer
from fastclip.health.measure import norms_of
from fastclip.health.naming import Layers
from fastclip.health.recording import Draft, Record, Store, Transfer
from fastclip.optim import ClippedOptimizer
from fastclip.statistics import GradStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from fastclip.health.finding import Finding

_open_monitors: "weakref.WeakSet[GradientMonitor]" = weakref.WeakSet()  # those with a file


@atexit.register
def _close_all() -> None:
    """Writes what is still on a device when the program ends."""
    for monitor in list(_open_monitors):
        monitor.close()


class GradientMonitor:
    """Records the gradients' statistics of a model whenever they are clipped.

    ```python
    monitor = fastclip.GradientMonitor(model)
    for batch in data:
        model(batch).backward()
        monitor.clip_grad_norm_(1.0)  # in the place of clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    monitor.table()
    ```

    What is recorded is the gradient before clipping, without the factor of a GradScaler that ClippedOptimizer knows of.
    Values stay on the device; nothing waits for them unless they are asked for. One call is one step.

    Args:
        model: any ``torch.nn.Module``, also inside of DistributedDataParallel, ``torch.compile`` or FSDP. Parameters
            that are added later, or put in the place of others, are noticed.
        every: only every so many steps is recorded, the first one included. The others are plain clipping.
        capacity: how many records are kept, at least 8: the newest half, and a thinned selection of the older ones,
            see ``fastclip.health.recording.Store``. Each takes 48 bytes a parameter tensor.
        path: a file to which all records are appended (JSON lines, ``fastclip.health.log``), so that they survive the
            process. One that exists is read and continued. With several ranks only rank 0 writes.
        activations: watch the outputs of activation modules with forward hooks, in recorded steps.
        weight_norms: look at the norms of the parameters in every so many records, the first one included; 0 for never.
            It reads all parameters once.

    Raises:
        TypeError: ``model`` is not a module; a number is not an integer.
        ValueError: a number is too small; ``path`` is not a monitor's file.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        capacity: int = 2000,
        path: str | os.PathLike | None = None,
        *,
        activations: bool = False,
        weight_norms: int = 100,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._set_up(model, every, capacity, path, activations, weight_norms)

    def _set_up(self, model, every=1, capacity=2000, path=None, activations=False, weight_norms=100) -> None:
        self.every = _integer(every, "every", 1)
        self.weight_norms = _integer(weight_norms, "weight_norms", 0)
        self._capacity = _integer(capacity, "capacity", 8)
        self._store = Store(capacity)
        self._transfer = Transfer(self._arrived)
        self._lock = threading.RLock()
        self.model = model
        self._step = 0
        self._is_closed = False
        self._count = 0  # of records
        self._norm_type: float | None = None
        self._layers = Layers(model)
        self._classes: dict[str, str] = {}  # of the modules whose activations were seen
        self._written_to: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._attached: weakref.WeakSet[ClippedOptimizer] = weakref.WeakSet()
        self._file: io.FileIO | None = None
        self._writer: log.Writer | None = None
        if path is not None:
            self._open_on_first_rank(Path(path))
        self._activations = None
        self._knows_order = False  # of the forward pass
        if activations and model is not None:
            self._activations = Activations(model)
            self._classes.update(self._activations.classes)

    @property
    def step(self) -> int:
        """The number of the step that comes next, from 0 on.

        May be set, as when a checkpoint was loaded. Records of that step and later ones are forgotten: they are of what
        did not happen.
        """
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        value = _integer(value, "step", 0)
        with self._lock:
            self._transfer.drain()
            newest = self._store.newest()
            if newest is not None and newest.step >= value:
                self._store.forget_from(value)
                if self._writer is not None:
                    self._writer.forget_from(value)
            for writer, step in self._written_to.items():
                self._written_to[writer] = min(step, value - 1)
            self._step = value

    # ---- recording ----

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        **others: Any,
    ) -> Tensor:
        """``fastclip.clip_grad_norm_`` of the model's parameters, recorded.

        Arguments, result and errors are those of ``fastclip.clip_grad_norm_``, also ``nonfinite`` and process groups. A
        call that raises because the norm is not finite is recorded too.

        Raises:
            ValueError: ``norm_type`` is not that of the earlier records.
            RuntimeError: the monitor was loaded without a model.
        """
        # As in ClippedOptimizer.step: torch.compile leaves its graph, for which `torch` has to stand in this frame.
        clip_ = _clip_outside_of_graphs if torch.compiler.is_dynamo_compiling() else GradientMonitor._clip
        return clip_(self, max_norm, norm_type, error_if_nonfinite, foreach, **others)

    def _clip(self, max_norm, norm_type, error_if_nonfinite, foreach, **others) -> Tensor:
        if self.model is None:
            raise RuntimeError("clip_grad_norm_: expected a monitor with a model, got one that was loaded without")
        if self._norm_type not in (None, float(norm_type)):
            raise ValueError(f"norm_type: expected {self._norm_type} as in the records before, got {norm_type}")
        parameters = list(self.model.parameters())
        if watching.watchers:
            recording = watching.begin(parameters, [self])
        else:
            record = self._count_step()
            recording = record and watching.Recording(parameters, [record])
        return clip.clip_recorded(
            recording,
            parameters,
            max_norm,
            norm_type,
            error_if_nonfinite,
            foreach,
            **others,
        )

    def attach(self, optimizer: ClippedOptimizer) -> ClippedOptimizer:
        """Records each step of an optimizer that clips, and returns it. ``ClippedOptimizer(…, monitor=…)`` does it too.

        With a closure that is evaluated several times, the first evaluation of a step is recorded.
        """
        if not isinstance(optimizer, ClippedOptimizer):
            raise TypeError(
                f"optimizer: expected a fastclip.ClippedOptimizer, got {type(optimizer).__name__}, which does not clip"
            )
        if self not in optimizer.monitors:
            optimizer.monitors.append(self)
            self._attached.add(optimizer)
        return optimizer

    def detach(self, optimizer: ClippedOptimizer) -> None:
        """Ends what ``attach`` began."""
        if self in optimizer.monitors:
            optimizer.monitors.remove(self)
            self._attached.discard(optimizer)

    def recorder_of(self, parameters: Sequence[Tensor]) -> watching.Record | None:
        """What records a call that clips these parameters, None if nothing does. Counts the model's steps."""
        return self._count_step() if not self._is_closed and self.has_one_of(parameters) else None

    def _count_step(self) -> watching.Record | None:
        """What records the step that has come, None if it is not recorded."""
        with self._lock:
            step = self._step
            is_recorded = step % self.every == 0 and not self._is_closed
            self._step += 1
            if self._activations is not None and not is_recorded:
                self._activations.active = self._step % self.every == 0
            return functools.partial(self._record, step) if is_recorded else None

    def has_one_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether one of the tensors is a parameter of the model, frozen ones included."""
        with self._lock:
            return self._layers.has_one_of(parameters)

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter, as records have it; None if it is not the model's or needs no gradient.

        ``monitor.name_of(parameters[fastclip.last_report().first_bad])`` is that of the first bad gradient.
        """
        with self._lock:
            (number,) = self._layers.numbers_of([parameter])
            return self._layers.layers[number].name if number >= 0 else None

    def _record(
        self,
        step: int,
        parameters: Sequence[Tensor],
        statistics: GradStatistics,
        total_norm: Tensor | None,
        max_norm: float | Tensor | None,
        norm_type: float = 2.0,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Takes the statistics of a call that clipped these parameters; see ``fastclip.watching.Recording.finish``."""
        values = statistics.values
        if values is None:
            return
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            warnings.warn("a clipping that is captured in a CUDA graph is not recorded", stacklevel=2)
            return
        with self._lock:
            if self._norm_type not in (None, float(norm_type)):
                # No error: it would come from a program's own call, after it has clipped.
                warnings.warn(
                    f"a clipping with norm_type={norm_type} is not recorded: the others have {self._norm_type}",
                    stacklevel=2,
                )
                return
            self._norm_type = float(norm_type)
            draft = Draft(
                step,
                self._layers.numbers_of([p for p in parameters if getattr(p, "grad", None) is not None]),
                self._norm_type,
                values if values.is_cuda else values.clone(),  # the caller may have them too
                _plain(total_norm),
                _plain(max_norm),
                _plain(grad_scale),
            )
            if self.weight_norms and self._count % self.weight_norms == 0:
                draft.weight_norms = norms_of(self._layers.items())
            if self._activations is not None:
                draft.activations = self._activations.take()
                if not self._knows_order and self._activations.first_runs:
                    self._layers.order_by(self._activations.first_runs)
                    self._knows_order = True
                self._activations.active = self._step % self.every == 0
            self._count += 1
            self._transfer.add(draft)

    def _arrived(self, record: Record) -> None:
        self._store.add(record)
        if self._writer is not None and self._file is not None:
            try:
                self._writer.write(record, self._norm_type or 2.0)
            except OSError as error:  # a full disk is no reason to end the training
                self._writer = None
                warnings.warn(f"no more records are written to {self._file.name}: {error}", stacklevel=2)

    # ---- reading ----

    def history(self) -> History:
        """All records that are kept, as CPU tensors. Waits for those that are still on a device."""
        with self._lock:
            self._transfer.drain()
            records, layers = self._store.records(), [Layer(**vars(layer)) for layer in self._layers.layers]
            norm_type = 2.0 if self._norm_type is None else self._norm_type
            return views.history(records, layers, norm_type, self._classes)

    def last(self, wait: bool = True) -> dict[str, float]:
        """The newest record as a flat dict for any logger (``wandb.log(monitor.last())``), empty if there is none.

        Keys: ``grad/step``, ``grad/total_norm``, ``grad/max_norm`` and ``grad/clip_coef`` (NaN where nothing is clipped
        by norm), ``grad/nonfinite`` (how many elements are inf or NaN), and for each parameter ``grad/norm/<name>``,
        ``grad/abs_max/<name>``, ``grad/zeros/<name>`` (a share); with ``activations`` also
        ``activation/saturated/<module>``, ``activation/zeros/<module>``. Values are Python numbers.

        Args:
            wait: False returns the newest record that has arrived from the device already, a few steps old on CUDA.
        """
        with self._lock:
            if wait:
                self._transfer.drain()
            record = self._store.newest()
            return {} if record is None else views.flat(record, self._layers.layers)

    def table(self, console: "Console | None" = None, rows: int | None = None) -> "Table":
        """Prints a table of layers and their statistics in the terminal, the worst ones highlighted; returns it.

        Args:
            console: a ``rich.console.Console``; the terminal by default.
            rows: how many layers at most, those that need a look first; None for all in the model's order.

        Raises:
            ImportError: rich is not installed (``pip install "fastclip[health]"``).
        """
        from fastclip.health.table import print_table

        return print_table(self.history(), console, rows)

    def to_tensorboard(self, writer: Any) -> None:
        """Writes the records that this writer has not got yet, as scalars named as in ``last()``.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or whatever has its ``add_scalar``.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: expected a SummaryWriter with add_scalar, got {type(writer).__name__}")
        with self._lock:
            self._transfer.drain()
            records, layers = self._store.records(), list(self._layers.layers)
            after = self._written_to.get(writer, -1)
        for record in records:
            if record.step > after:
                for name, value in views.flat(record, layers).items():
                    if name != "grad/step":
                        writer.add_scalar(name, value, record.step)
                self._written_to[writer] = record.step

    def diagnose(self) -> "list[Finding]":
        """What is wrong with the gradients, worst first; see ``fastclip.health.diagnosis``."""
        from fastclip.health.diagnosis import diagnose

        return diagnose(self.history())

    def report(self, path: str | os.PathLike) -> None:
        """Writes a page with the findings, the norms over time, and a heat map of all layers.

        Raises:
            ImportError: jinja2 is not installed (``pip install "fastclip[health]"``).
        """
        from fastclip.health.diagnosis import diagnose
        from fastclip.health.report import write_report

        history = self.history()
        write_report(history, diagnose(history), path)

    def plot(self, *args: Any, **kwargs: Any) -> "Figure":
        """A matplotlib figure of the records; see ``fastclip.health.plots.plot`` for the arguments.

        Raises:
            ImportError: matplotlib is not installed (``pip install "fastclip[health]"``).
        """
        from fastclip.health.plots import plot

        return plot(self.history(), *args, **kwargs)

    # ---- files, end ----

    def save(self, path: str | os.PathLike) -> None:
        """Writes all records that are kept to a file; one that exists is replaced. Format: ``fastclip.health.log``.

        Raises:
            ValueError: this monitor's own ``path=``, which has all records already.
        """
        with self._lock:
            self._transfer.drain()
            if (
                self._writer is not None
                and self._file is not None
                and os.path.exists(path)
                and os.path.samefile(path, self._file.name)
            ):
                raise ValueError(
                    f"path: expected another file than the one this monitor writes, got {os.fspath(path)!r}"
                )
            log.write_whole(path, self._store.records(), self._layers.layers, self._classes, self._norm_type or 2.0)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module | None = None, **options: Any) -> "GradientMonitor":
        """A monitor with the records of a file that ``save`` or ``path=`` wrote, also of a process that was killed.

        Args:
            path: the file; it is not changed.
            model: to go on recording; without one the monitor can only be read.
            options: as for a new monitor: ``every``, ``capacity``, …

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a monitor's file.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if options.get("path") is not None and os.path.exists(options["path"]):
            raise ValueError(f"path: expected a new file beside the one that is loaded, got {options['path']}")
        monitor = cls.__new__(cls)
        monitor._set_up(model, **options)
        monitor._read(Path(path))
        return monitor

    def _read(self, path: Path) -> int:
        """Takes over the records of a file; returns how many of its bytes are whole lines."""
        reader = log.Reader(path, self._layers.number_of_read, self._forget_from)
        for record in reader.records():
            self._store.add(record)
            self._count += 1
            self._step = record.step + 1
        self._norm_type = reader.norm_type if self._count else None
        self._classes.update(reader.classes)
        return reader.end

    def _forget_from(self, step: int) -> None:
        self._store.forget_from(step)
        self._step = step

    def _open_on_first_rank(self, path: Path) -> None:
        """All ranks go on at the step of the file: what they measure together has to be of the same steps."""
        at: list[tuple[int, int, float | None] | None] = [None]
        try:
            if is_first_rank():
                self._open(path)
                _open_monitors.add(self)
                at = [(self._step, self._count, self._norm_type)]
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(at, src=0)
        if at[0] is not None:
            self._step, self._count, self._norm_type = at[0]

    def _open(self, path: Path) -> None:
        files = [monitor._file for monitor in _open_monitors if monitor._file is not None]
        if path.exists() and any(os.path.samefile(path, file.name) for file in files):
            raise ValueError(f"path: expected a file of its own, got {str(path)!r}, which another monitor writes")
        end = self._read(path) if path.exists() else 0
        self._file = open(path, "r+b" if path.exists() else "xb", buffering=0)  # noqa: SIM115
        self._file.truncate(end)  # of a line that was cut off
        self._file.seek(end)
        self._writer = log.Writer(self._file, self._layers.layers, self._classes, with_header=end == 0)

    def close(self) -> None:
        """Ends recording: takes off the hooks, detaches, and closes the file. What was recorded stays readable."""
        with self._lock:
            self._transfer.drain()
            self._is_closed = True
            if self._activations is not None:
                self._activations.close()
            watching.forget(self)
            for optimizer in list(self._attached):
                self.detach(optimizer)
            self._writer = None
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> "GradientMonitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of what holds a monitor: they have the records, but neither hooks nor the file."""
        with self._lock:
            self._transfer.drain()
            options = {"every": self.every, "capacity": self._capacity, "weight_norms": self.weight_norms}
            return {
                "options": options,
                "model": self.model,
                "records": self._store.records(),
                "layers": self._layers.layers,
                "classes": self._classes,
                "norm_type": self._norm_type,
                "step": self._step,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_up(None, **state["options"])
        self.model = state["model"]
        self._layers = Layers(self.model, state["layers"])
        for record in state["records"]:
            self._store.add(record)
        self._count = len(state["records"])
        self._classes, self._norm_type, self._step = state["classes"], state["norm_type"], state["step"]

    def __repr__(self) -> str:
        model = "no model" if self.model is None else type(self.model).__name__
        return f"{type(self).__name__}({model}, every={self.every}, step={self.step}, records={len(self._store)})"


_clip_outside_of_graphs = torch._disable_dynamo(GradientMonitor._clip)


def _plain(number: float | Tensor | None) -> float | Tensor | None:
    """A number that may be a tensor, or a replicated DTensor, without either's history."""
    if not isinstance(number, Tensor):
        return number
    return (number.full_tensor() if hasattr(number, "full_tensor") else number).detach()


def is_first_rank() -> bool:
    """Whether this process is the one that writes, of those that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # torchrun's, before the group exists


def _integer(value: int, argument: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value}")
    return value
