"""What the figures were measured on, and who else was using it meanwhile."""

import hashlib
import os
import platform
import time
from pathlib import Path

import torch

import fastclip

BUSY_CORES = 0.1  # others' use of the processor, in cores, from which figures are disturbed
BUSY_STEAL = 0.02  # the share of time that the hypervisor gave to somebody else
PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def build() -> dict:
    """``fastclip.build_info()`` but for where the extension lies, which says something of its owner's disk only."""
    return {name: value for name, value in fastclip.build_info().items() if name != "extension"}


def describe(threads: int) -> dict:
    """Processor, cores, memory, pinning, governor, load, versions: plain values for JSON."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "caches": caches(),
        "memory_gb": round(memory("MemTotal") / 1e9, 1),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not shown (virtual machine?)",
        "huge_pages": read("/sys/kernel/mm/transparent_hugepage/enabled") or "not shown",
        "pinning": {name: os.environ[name] for name in PINNING if name in os.environ} or "none",
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def cpuinfo(name: str) -> str | None:
    lines = (read("/proc/cpuinfo") or "").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() == name), None)


def processor() -> str:
    """The processor's name as Linux gives it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """A short name for what the processor understands: the same for processors that run the same code."""
    flags = f"{platform.machine()} {cpuinfo('flags') or cpuinfo('Features') or processor()}"
    return hashlib.sha256(flags.encode()).hexdigest()[:8]


def caches() -> dict[str, str]:
    """Sizes of the first core's caches, as Linux gives them: {"L1 Data": "32K", ...}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read(str(index / name)) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level} {kind}"] = size
    return found


def memory(name: str = "MemAvailable") -> int:
    """Bytes of memory, from /proc/meminfo; without one, 8 GB are assumed."""
    lines = (read("/proc/meminfo") or "").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 8 << 30)


def peak_of(call) -> int | None:
    """Bytes by which the process grew at most during a call; None where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Contention:
    """Measures from its creation on how much of the processor others used. Children of this process are others."""

    def __init__(self):
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """Wall clock; seconds of work of all cores; of this process; stolen by the hypervisor."""
        fields = (read("/proc/stat") or "cpu").splitlines()[0].split()[1:]
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal, *_ = [int(field) / tick for field in fields] or [0.0] * 8
        return time.perf_counter(), user + nice + system + irq + softirq, time.process_time(), steal

    def so_far(self) -> dict:
        """{"others_cores": cores busy for others, "steal": share of this machine's time that was stolen}."""
        wall, work, own, steal = (now - then for now, then in zip(self._now(), self.start, strict=True))
        wall = max(wall, 1e-9)
        return {
            "others_cores": round(max(0.0, work - own) / wall, 2),
            "steal": round(steal / wall / (os.cpu_count() or 1), 3),
        }


def disturbed(contention: dict) -> bool:
    return contention["others_cores"] > BUSY_CORES or contention["steal"] > BUSY_STEAL


def who_is_there(seconds: float = 1.0) -> dict:
    """Contention while this process sleeps."""
    contention = Contention()
    time.sleep(seconds)
    return contention.so_far()
