"""The ceilings: reads, and reads followed by read-writes, of one buffer; the fastest of several ways counts.

They are compiled from ceilings.cpp when they are first used. Without a compiler torch's own operations stand in.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import machine

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "ceilings"
SMALL = 4 << 20  # up to here one thread may be faster than several


@functools.cache
def native():
    """The compiled module, or text that says why there is none."""
    from torch.utils import cpp_extension

    # Another torch, or another processor: another build.
    folder = BUILD / f"{torch.__version__}-{machine.instruction_sets()}"
    folder.mkdir(parents=True, exist_ok=True)
    # Where ninja is, if it came with pip and this Python was not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp"]
    try:
        return cpp_extension.load("fastclip_ceilings", [str(HERE / "ceilings.cpp")], flags, build_directory=str(folder))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def missing_because() -> str | None:
    return native() if isinstance(native(), str) else None


def reads(buffer: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read a buffer once; on a GPU torch's own."""
    floats = buffer.view(torch.uint8)[: buffer.nbytes // 4 * 4].view(torch.float32)
    ways = {"torch.sum": lambda: torch.sum(floats), "torch.amax": lambda: torch.amax(floats)}
    if buffer.device.type != "cpu" or isinstance(native(), str):
        return ways
    for way in ("1 stream", "2 streams", "4 streams", "prefetch", "2 streams, prefetch"):
        ways[way] = functools.partial(native().read, buffer, way, False)
        if buffer.nbytes <= SMALL:
            ways[f"{way}, 1 thread"] = functools.partial(native().read, buffer, way, True)
    return ways


def read_writes(buffer: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read and write a buffer once, in place. Its contents change."""
    ways = {"torch.mul_": lambda: buffer.mul_(0.999)}
    if buffer.device.type != "cpu" or isinstance(native(), str):
        return ways
    for way in ("1 stream", "2 streams", "backwards"):
        ways[way] = functools.partial(native().read_write, buffer, way, False)
        if buffer.nbytes <= SMALL:
            ways[f"{way}, 1 thread"] = functools.partial(native().read_write, buffer, way, True)
    return ways


def fastest(ways: dict[str, Callable], clock: Callable[[Callable], float], tries: int = 3) -> str:
    """The name of the way with the shortest of ``tries`` times after one for warm-up."""
    times = {name: min([clock(call) for _ in range(tries + 1)][1:]) for name, call in ways.items()}
    return min(times, key=times.get)


def wall_clock(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
