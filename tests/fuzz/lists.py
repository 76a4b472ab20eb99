"""Random lists of gradients: everything about one follows from its seed."""

from dataclasses import dataclass, field

import numpy as np
import torch
from support import DTYPES, EDGES, INF, NAN, bits

LARGE_SHARE = 0.003  # of the lists have a gradient that threads share; the oracle needs some 20 ms for one
NUMPY_INTEGERS = {torch.float64: np.int64, torch.float32: np.int32, torch.float16: np.int16, torch.bfloat16: np.int16}
SPECIAL = [0.0, -0.0, 1e-45, 1e-40, 6e-8, 1e-38, 1.2e-38, 65504.0, 3e38, 1e200, 1e-200, 5e-324, 1.0]
NOT_FINITE = [INF, -INF, NAN]


@dataclass
class GradientList:
    """Gradients, some of which may be None, in memory that is known byte by byte."""

    random: np.random.Generator
    grads: list[torch.Tensor | None] = field(default_factory=list)
    arenas: list[torch.Tensor] = field(default_factory=list)  # 1-d, each with the memory of one or several gradients
    written: list[torch.Tensor] = field(default_factory=list)  # which elements of an arena belong to a gradient
    is_shared: bool = False  # a gradient is listed twice, or two of them share elements
    is_expanded: bool = False  # several elements of a gradient share one place
    threads: int = 1

    def __post_init__(self):
        self.before: list[torch.Tensor] = []

    @property
    def present(self) -> list[torch.Tensor]:
        return [grad for grad in self.grads if grad is not None]

    def remember(self) -> None:
        self.before = [arena.clone() for arena in self.arenas]
        self.versions = [arena._version for arena in self.arenas]

    def as_before(self) -> list[torch.Tensor]:
        """The gradients that are present, as they were."""
        index = {arena.untyped_storage()._cdata: i for i, arena in enumerate(self.arenas)}
        return [
            self.before[index[g.untyped_storage()._cdata]].as_strided(g.shape, g.stride(), g.storage_offset())
            for g in self.present
        ]

    def check_untouched(self) -> None:
        for arena, before, version in zip(self.arenas, self.before, self.versions, strict=True):
            assert torch.equal(bits(arena), bits(before)), "a gradient, or memory beside it, was modified"
            assert arena._version == version, "a version counter rose"

    def check_surroundings(self) -> None:
        """What lies beside and between the elements of the gradients stays as it is."""
        for arena, before, mask in zip(self.arenas, self.before, self.written, strict=True):
            outside = ~mask
            assert torch.equal(bits(arena)[outside], bits(before)[outside]), "memory beside a gradient was modified"

    def describe(self) -> str:
        rows = [
            "None"
            if g is None
            else f"{g.dtype} shape={tuple(g.shape)} stride={g.stride()} offset={g.storage_offset()} "
            f"data_ptr%64={g.data_ptr() % 64}"
            for g in self.grads
        ]
        return f"threads={self.threads} shared={self.is_shared} expanded={self.is_expanded}\n  " + "\n  ".join(rows)


def generate(random: np.random.Generator) -> GradientList:
    """A list of 0 to 5 gradients, in one list of a hundred up to 60."""
    result = GradientList(random)
    is_large = random.random() < LARGE_SHARE
    result.threads = int(random.integers(1, 5)) if is_large else 1
    is_finite = random.random() < 0.85
    dtypes = DTYPES if random.random() < 0.4 else [DTYPES[random.integers(4)]]
    scale = 10.0 ** random.uniform(-45, 38) if random.random() < 0.4 else 10.0 ** random.uniform(-3, 3)
    count = int(random.integers(0, 6) if random.random() < 0.99 else random.integers(6, 61))
    count = max(count, 1) if is_large else count
    for i in range(count):
        draw = random.random()
        if draw < 0.04:
            result.grads.append(None)
        elif draw < 0.055 and result.present:
            result.grads.append(result.present[random.integers(len(result.present))])
            result.is_shared = True
        elif draw < 0.065 and result.arenas and len(result.arenas[-1]) > 2:
            _add_view(result, len(result.arenas) - 1, _shape(random, int(random.integers(1, len(result.arenas[-1])))))
            result.is_shared = True
        else:
            numel = int(random.integers(150_000, 700_000)) if is_large and i == 0 else _size(random)
            own = scale if random.random() < 0.8 else 10.0 ** random.uniform(-45, 38)
            _add_new(result, numel, dtypes[random.integers(len(dtypes))], own, is_finite)
    return result


def _size(random: np.random.Generator) -> int:
    draw = random.random()
    if draw < 0.6:
        return int(random.integers(0, 40))
    if draw < 0.95:
        return int(random.integers(40, 700))
    return EDGES[random.integers(len(EDGES) - 4)] if draw < 0.999 else EDGES[random.integers(len(EDGES))]


def _shape(random: np.random.Generator, numel: int) -> tuple[int, ...]:
    """Up to four dimensions with about this many elements."""
    if numel <= 1:
        return [(), (1,), (1, 1)][random.integers(3)] if numel else [(0,), (3, 0), (0, 2, 4)][random.integers(3)]
    shape = []
    for _ in range(int(random.integers(0, 4))):
        size = int(random.integers(1, 6))
        if numel // size >= 1:
            shape.append(size)
            numel //= size
    shape.insert(int(random.integers(0, len(shape) + 1)), numel)
    return tuple(shape)


def _strides(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor that is contiguous, permuted, or has gaps, at its innermost dimension or at others."""
    draw = random.random()
    order = list(range(len(shape))) if draw < 0.6 else [int(i) for i in random.permutation(len(shape))]
    stride, strides = int(random.integers(2, 4)) if draw > 0.85 else 1, [1] * len(shape)
    for dim in reversed(order):
        strides[dim] = stride
        stride = stride * max(shape[dim], 1) + (int(random.integers(0, 3)) if 0.75 < draw < 0.9 else 0)
    return tuple(strides)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _add_view(result: GradientList, index: int, shape: tuple[int, ...]) -> None:
    """A contiguous gradient somewhere in an arena that others use."""
    arena, random = result.arenas[index], result.random
    numel = int(np.prod(shape))
    offset = int(random.integers(0, len(arena) - numel + 1))
    result.grads.append(arena[offset : offset + numel].view(shape))
    result.written[index][offset : offset + numel] = True


def _add_new(result: GradientList, numel: int, dtype: torch.dtype, scale: float, is_finite: bool) -> None:
    random = result.random
    shape = _shape(random, numel)
    strides = _strides(random, shape)
    if random.random() < 0.003 and numel > 1 and max(shape) > 1:
        strides = tuple(0 if n == max(shape) else s for n, s in zip(shape, strides, strict=True))
        result.is_expanded = True
    offset = int(random.integers(0, 9)) if random.random() < 0.5 else 0
    arena = _values(random, offset + _extent(shape, strides) + int(random.integers(0, 9)), dtype, scale, is_finite)
    mask = torch.zeros(len(arena), dtype=torch.bool)
    mask.as_strided(shape, strides, offset).fill_(True) if 0 not in strides else mask.fill_(True)
    result.grads.append(arena.as_strided(shape, strides, offset))
    result.arenas.append(arena)
    result.written.append(mask)


def _values(random: np.random.Generator, n: int, dtype: torch.dtype, scale: float, is_finite: bool) -> torch.Tensor:
    draw = random.random()
    if draw < 0.12:  # any bits
        info = np.iinfo(NUMPY_INTEGERS[dtype])
        raw = random.integers(info.min, info.max, n, NUMPY_INTEGERS[dtype], endpoint=True)
        values = torch.from_numpy(raw).view(dtype)
    else:
        if draw < 0.75:
            wide = random.standard_normal(n) * scale
        elif draw < 0.9:  # any order of magnitude
            wide = random.choice((-1.0, 1.0), n) * 2.0 ** random.uniform(-1074, 1023, n)
        else:
            wide = np.full(n, scale if draw < 0.97 else 0.0)
        if n and random.random() < 0.3:
            special = SPECIAL if is_finite else SPECIAL + NOT_FINITE
            for _ in range(int(random.integers(1, 4))):
                wide[random.integers(n)] = special[random.integers(len(special))]
        values = torch.from_numpy(wide).to(dtype)
    return values.nan_to_num_(1.5, 1.5, -1.5) if is_finite else values
