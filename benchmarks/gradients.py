"""A case's parameters and gradients: made, restored, and checked against what float64 says they should be."""

import math
from collections.abc import Iterator

import torch

from benchmarks import machine
from benchmarks.cases import CLIPPED, NONFINITE, UNCLIPPED, Case

NEVER = 1e30  # a threshold that no norm reaches
ALIGN = 64  # bytes: where torch's allocator begins a tensor on the CPU
POOL = 1 << 22  # elements: random numbers are drawn once and repeated
CHUNK = 1 << 18  # elements: their float64 copies fit the cache, and malloc keeps the memory
PROBES = 512  # elements looked at after every timed call
WHOLE = 1 << 24  # elements looked at after the first call; of more, chunks at even distances
RIVAL_TOLERANCE = 0.05  # torch's float32 norm is 1e-3 off for large models, its bfloat16 norm has 8 bits


class WrongResult(Exception):
    """A timed call did not do what it should have."""


class Gradients:
    """Parameters whose gradients lie in one buffer for each dtype, every one with a storage offset of its own.

    The buffer is what the ceilings read. Parameters themselves take no memory.
    """

    def __init__(self, case: Case, device: str = "cpu"):
        self.case = case
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        self.saved: dict[torch.dtype, torch.Tensor] = {}
        places, sizes = [], {}
        for shape in case.shapes:
            dtype = case.dtype_of(shape)
            places.append((dtype, sizes.get(dtype, 0)))
            step = ALIGN // dtype.itemsize
            sizes[dtype] = places[-1][1] + -(-math.prod(shape) // step) * step
        pool = torch.randn(min(POOL, max(sizes.values())), generator=torch.Generator().manual_seed(0))
        for dtype, size in sizes.items():
            self.buffers[dtype] = torch.empty(size, dtype=dtype, device=device)
            drawn = pool.to(dtype).to(device)
            for chunk in self.buffers[dtype].split(len(drawn)):
                chunk.copy_(drawn[: len(chunk)])
        self.parameters = []
        for shape, (dtype, offset) in zip(case.shapes, places, strict=True):
            count, buffer = math.prod(shape), self.buffers[dtype]
            end = offset + -(-count // (ALIGN // dtype.itemsize)) * (ALIGN // dtype.itemsize)
            if end > offset + count:
                buffer[offset + count : end] = 0
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            # set_() instead of a view: a version counter of its own, as real gradients have
            grad = torch.empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), offset, shape, strides)
            parameter = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape))
            parameter.grad = grad
            self.parameters.append(parameter)
        self.grads = [parameter.grad for parameter in self.parameters]
        self.norm = self._norm()
        self.probes = {dtype: self._positions(dtype, places) for dtype in self.buffers}
        self.before = {dtype: buffer[self.probes[dtype]].double() for dtype, buffer in self.buffers.items()}

    def _positions(self, dtype: torch.dtype, places: list) -> torch.Tensor:
        """First and last elements of some gradients, and random ones."""
        ends = [
            position
            for shape, (kind, offset) in zip(self.case.shapes, places, strict=True)
            if kind == dtype
            for position in (offset, offset + math.prod(shape) - 1)
        ]
        size = len(self.buffers[dtype])
        chosen = [*ends[:: max(1, 2 * len(ends) // PROBES)], ends[-1]]
        drawn = torch.randint(size, (PROBES // 2,), generator=torch.Generator().manual_seed(1))
        return torch.cat([torch.tensor(chosen), drawn]).to(self.buffers[dtype].device)

    def _norm(self) -> float:
        """In float64, over chunks. The values are far from its limits."""
        order, total = self.case.norm_type, 0.0
        for buffer in self.buffers.values():
            wide = torch.empty(CHUNK, dtype=torch.float64, device=buffer.device)
            for chunk in buffer.split(CHUNK):
                part = wide[: len(chunk)].copy_(chunk)
                if order == 2:  # several times faster than vector_norm
                    total += float(torch.dot(part, part))
                else:
                    one = float(torch.linalg.vector_norm(part, order))
                    total = max(total, one) if math.isinf(order) else total + one**order
        return total if math.isinf(order) else total ** (1 / order)

    # ---- one mode --------------------------------------------------------------------------------------------------

    def set_mode(self, mode: str) -> None:
        """Chooses the threshold, plants what is not finite, and keeps a copy for restore() where that is needed."""
        self.mode = mode
        self.max_norm = self.norm / 10 if mode == CLIPPED else NEVER if mode == UNCLIPPED else 1.0
        for dtype, saved in self.saved.items():
            self.buffers[dtype].copy_(saved)
        if mode == NONFINITE:
            self.saved.clear()
            grad = self.grads[len(self.grads) // 2]
            grad.view(-1)[grad.numel() // 2] = math.inf
            self.norm = math.inf
            self.before = {dtype: buffer[self.probes[dtype]].double() for dtype, buffer in self.buffers.items()}
        # Unclipped, the copy only serves check_whole(): a list that fills the memory goes without.
        if not self.saved and (mode != UNCLIPPED or 2 * self.case.bytes < machine.memory()):
            self.saved = {dtype: buffer.clone() for dtype, buffer in self.buffers.items()}

    def restore(self) -> None:
        if self.mode != UNCLIPPED:
            for dtype, buffer in self.buffers.items():
                buffer.copy_(self.saved[dtype])

    def flat(self) -> torch.Tensor:
        """The largest buffer: all gradients, unless dtypes are mixed."""
        return max(self.buffers.values(), key=lambda buffer: buffer.nbytes)

    # ---- what is right ---------------------------------------------------------------------------------------------

    def norm_error(self, norm: torch.Tensor) -> float:
        """Relative to float64; 0 for an infinite norm that should be."""
        got = float(norm)
        return 0.0 if got == self.norm else abs(got / self.norm - 1)

    def check(self, name: str, norm: torch.Tensor, exact: bool) -> None:
        """Compares a call's norm, and PROBES of the gradients as it left them. Raises WrongResult."""
        pairs = ((buffer[self.probes[d]].double(), self.before[d], d) for d, buffer in self.buffers.items())
        self._check(name, norm, exact, pairs)

    def check_whole(self, name: str, norm: torch.Tensor, exact: bool, most: int = WHOLE) -> float:
        """The same for up to ``most`` elements. Returns the largest error, relative to the largest clipped gradient."""
        return self._check(name, norm, exact, self._chunks(most))

    def _chunks(self, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.dtype]]:
        step = -(-self.case.elements // most)
        for dtype, buffer in self.buffers.items():
            saved = self.saved.get(dtype)
            for i in range(0, -(-len(buffer) // CHUNK), step):
                part = slice(i * CHUNK, (i + 1) * CHUNK)
                if saved is not None:
                    yield buffer[part].double(), saved[part].double(), dtype

    def _check(self, name: str, norm: torch.Tensor, exact: bool, pairs) -> float:
        """``exact``: to 1e-6 and a rounding, as fastclip promises; otherwise to what torch's own norms are good for."""
        tolerance = 1e-6 if exact else RIVAL_TOLERANCE
        error = self.norm_error(norm)
        if not error <= tolerance:
            self._wrong(name, f"norm {float(norm)!r} instead of {self.norm!r}")
        coef = min(1.0, self.max_norm / (self.norm + 1e-6))
        largest, worst = 0.0, 0.0
        for got, before, dtype in pairs:
            want = before * coef
            if self.mode == NONFINITE:
                if not torch.equal(got.isfinite(), want.isfinite()):
                    self._wrong(name, "infinite or NaN gradients where others were expected")
                got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
            off, size = (got - want).abs(), want.abs()
            info = torch.finfo(dtype)
            bound = 0.0 if coef == 1 and exact else size * (tolerance + info.eps / 2) + info.smallest_normal
            if not bool((off <= bound).all()):  # nor with NaN
                self._wrong(name, f"a gradient is off by {float(off.max()):.3g}")
            largest = max(largest, float(size.max()))
            worst = max(worst, float(off.max()))
        return worst / largest if largest else 0.0

    def _wrong(self, name: str, what: str) -> None:
        raise WrongResult(f"{self.case.name}, {self.mode}: {name}: {what}")
