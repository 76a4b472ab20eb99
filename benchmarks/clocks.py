"""How long a call takes: on the CPU by the wall clock; on a CUDA device by events, and the host's time beside them."""

import subprocess
import time
from collections.abc import Callable

import torch


class CpuClock:
    def time(self, call: Callable) -> tuple[float, float, object]:
        """Seconds, the host's seconds (the same here), and what the call returned."""
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        return elapsed, elapsed, result


class CudaClock:
    """Before each timed call the device is idle and its L2 cache is overwritten."""

    def __init__(self):
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    def time(self, call: Callable) -> tuple[float, float, object]:
        """Seconds on the device between two events; seconds until the call came back; what it returned."""
        self.flush.zero_()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start = time.perf_counter()
        result = call()
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host, result


def clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def is_a_card() -> bool:
    """Whether times mean anything: on an emulated device they do not."""
    try:
        import cudaemu
    except ImportError:
        return torch.cuda.is_available()
    return torch.cuda.is_available() and not cudaemu.active()


def card() -> dict:
    """Name, memory, clocks and temperature of the card: what nvidia-smi says, or that it says nothing."""
    properties = torch.cuda.get_device_properties(0)
    asked = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        clocks = dict(zip(asked.split(","), map(str.strip, done.stdout.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        clocks = {"not shown": f"{type(error).__name__}: {error}"}
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
        "clocks": clocks,
    }
