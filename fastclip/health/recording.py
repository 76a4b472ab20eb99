"""The way of a record: from the device, without waiting, into a bounded store on the host."""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Records of a CUDA device are copied together, this many at a time: one launch, one copy and one event for all of them.
_TOGETHER = 16


@dataclass(slots=True)
class Record:
    """What is known of one step, on the host."""

    step: int
    numbers: tuple[int, ...]  # of each row the layer
    values: Tensor  # float64 [rows, 6], see statistics.COLUMNS
    total_norm: float
    max_norm: float  # NaN: not clipped by norm
    grad_scale: float = math.nan  # of a GradScaler; values are without it
    weight_norms: dict[int, float] | None = None  # by layer, where they were looked at
    activations: dict[str, tuple[float, float]] = field(default_factory=dict)  # by module: saturated, zeros


@dataclass(slots=True)
class Draft:
    """A record whose numbers are still tensors, which may be on a device."""

    step: int
    numbers: tuple[int, ...]
    norm_type: float
    values: Tensor
    total_norm: float | Tensor | None  # None: to be computed from the values
    max_norm: float | Tensor | None
    grad_scale: float | Tensor | None = None  # that was taken out of the others
    weight_norms: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # sums of two shares, and of how many

    def __post_init__(self):
        if self.values.is_cuda:  # it takes a while: others may change in place what is theirs
            self.total_norm, self.grad_scale = _copy(self.total_norm), _copy(self.grad_scale)
            self.max_norm = _copy(self.max_norm)

    def tensors(self) -> list[Tensor]:
        numbers = self.total_norm, self.max_norm, self.grad_scale
        shares = [total for total, _ in self.activations.values()]
        return [self.values, *(x for x in numbers if isinstance(x, Tensor)), *self.weight_norms.values(), *shares]

    def finish(self, tensors: list[Tensor]) -> Record:
        """The record; the tensors are those above, on the CPU in float64."""
        values, rest = tensors[0], iter(tensors[1:])
        total_norm, max_norm, grad_scale = (
            next(rest).item() if isinstance(x, Tensor) else math.nan if x is None else float(x)
            for x in (self.total_norm, self.max_norm, self.grad_scale)
        )
        if self.total_norm is None:
            total_norm = torch.linalg.vector_norm(values[:, 0], self.norm_type).item()
        weight_norms = {number: next(rest).item() for number in self.weight_norms}
        activations = {name: tuple((next(rest) / runs).tolist()) for name, (_, runs) in self.activations.items()}
        return Record(
            self.step, self.numbers, values, total_norm, max_norm, grad_scale, weight_norms or None, activations
        )


def _copy(number: float | Tensor | None) -> float | Tensor | None:
    return number.to(torch.float64, copy=True) if isinstance(number, Tensor) else number


class Transfer:
    """Brings what records are made of to the host, in order, and never waits unless it is told to.

    Tensors on the CPU are there already. Those on a CUDA device are collected, packed into one tensor, copied to pinned
    memory, and looked at when the event behind the copy has passed.
    """

    def __init__(self, arrived: Callable[[Record], None]):
        self._arrived = arrived
        self._stream: torch.cuda.Stream | None = None  # on which the tensors of `_waiting` are made
        self._waiting: list[tuple[list[Tensor], Draft]] = []
        self._on_their_way: deque[_Batch] = deque()

    def add(self, draft: Draft) -> None:
        tensors = draft.tensors()
        devices = [tensor.device for tensor in tensors if tensor.is_cuda]
        if not devices and not self._on_their_way and not self._waiting:
            self._arrived(draft.finish([tensor.double() for tensor in tensors]))
            return
        stream = torch.cuda.current_stream(devices[0]) if devices else None
        if stream != self._stream:
            self._send()
        self._stream = stream
        self._waiting.append((tensors, draft))
        if stream is None:
            self._on_their_way.append(_Batch(self._waiting))
            self._waiting = []
        elif len(self._waiting) >= _TOGETHER:
            self._send()
        while self._on_their_way and self._on_their_way[0].is_there():
            self._deliver(self._on_their_way.popleft())

    def drain(self) -> None:
        """Waits until all is there."""
        self._send()
        while self._on_their_way:
            batch = self._on_their_way.popleft()
            batch.wait()
            self._deliver(batch)

    def _send(self) -> None:
        if self._waiting:
            with torch.cuda.stream(self._stream):
                self._on_their_way.append(_Batch(self._waiting))
            self._waiting = []

    def _deliver(self, batch: "_Batch") -> None:
        for record in batch.records():
            self._arrived(record)


class _Batch:
    """Records whose tensors travel together."""

    def __init__(self, entries: list[tuple[list[Tensor], Draft]]):
        self.entries = entries
        self.events = []
        self.packed: dict[torch.device, tuple[Tensor, Tensor]] = {}  # what is copied from is kept until it is there
        everything = [tensor for tensors, _ in entries for tensor in tensors]
        for device in dict.fromkeys(tensor.device for tensor in everything if tensor.is_cuda):
            with torch.cuda.device(device):
                packed = torch.cat([t.reshape(-1).double() for t in everything if t.device == device])
                host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
                host.copy_(packed, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.packed[device] = packed, host
            self.events.append(event)

    def is_there(self) -> bool:
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()

    def records(self) -> list[Record]:
        used = dict.fromkeys(self.packed, 0)
        records = []
        for tensors, draft in self.entries:
            parts = []
            for tensor in tensors:
                if tensor.device in self.packed:
                    start = used[tensor.device]
                    used[tensor.device] = start + tensor.numel()
                    # A copy: the pinned memory goes back to the next batch.
                    part = self.packed[tensor.device][1][start : used[tensor.device]].clone().reshape(tensor.shape)
                else:
                    part = tensor.double()
                parts.append(part)
            records.append(draft.finish(parts))
        return records


class Store:
    """The newest half of ``capacity`` records, and of the older ones a thinned selection of the same size.

    Of the older ones three quarters stand at equal distances, which doubles whenever they are full: a fair sample of
    the whole run. A quarter are extremes among the others: the first non-finite ones, else those with the largest norm.
    """

    def __init__(self, capacity: int):
        self._newest: deque[tuple[int, Record]] = deque()
        self._grid: list[tuple[int, Record]] = []
        self._extremes: list[tuple[tuple, int, Record]] = []  # a heap, the least extreme one first
        self._distance = 1
        self._sizes = capacity - capacity // 2, capacity // 2 - capacity // 8, capacity // 8
        self._count = 0  # of all records ever, the place of the next one

    def __len__(self) -> int:
        return len(self._newest) + len(self._grid) + len(self._extremes)

    def add(self, record: Record) -> None:
        self._newest.append((self._count, record))
        self._count += 1
        if len(self._newest) > self._sizes[0]:
            self._retire(*self._newest.popleft())

    def records(self) -> list[Record]:
        """All that are kept, by step."""
        everything = [*self._grid, *self._newest, *((place, record) for _, place, record in self._extremes)]
        return sorted((record for _, record in everything), key=lambda record: record.step)

    def newest(self) -> Record | None:
        newest = max((record for _, record in self._newest), key=lambda record: record.step, default=None)
        return newest or next(reversed(self.records()), None)  # the newest half may all have been forgotten

    def forget_from(self, step: int) -> None:
        """A run goes back to an earlier step: what followed it did not happen."""
        self._newest = deque(entry for entry in self._newest if entry[1].step < step)
        self._grid = [entry for entry in self._grid if entry[1].step < step]
        self._extremes = [entry for entry in self._extremes if entry[2].step < step]
        heapq.heapify(self._extremes)

    def _retire(self, place: int, record: Record) -> None:
        if place % self._distance:
            self._consider(place, record)
            return
        self._grid.append((place, record))
        while len(self._grid) > self._sizes[1]:
            self._distance *= 2
            for entry in self._grid:
                if entry[0] % self._distance:
                    self._consider(*entry)
            self._grid = [entry for entry in self._grid if entry[0] % self._distance == 0]

    def _consider(self, place: int, record: Record) -> None:
        key = (0, record.total_norm) if math.isfinite(record.total_norm) else (1, -record.step)
        heapq.heappush(self._extremes, (key, place, record))
        if len(self._extremes) > self._sizes[2]:
            heapq.heappop(self._extremes)
