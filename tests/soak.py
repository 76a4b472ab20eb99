"""Clips models that change all the time, and says what has grown: python tests/soak.py [--calls 100000].

Memory, threads and file descriptors are compared between half of the calls, when everything has been used, and all of
them. Exit code 1 where something grew.
"""

import argparse
import ctypes
import gc
import os
import random
import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import fastclip  # noqa: E402

MOST_GROWTH = 2048  # KB of memory in use; the allocator's own noise is about 500
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def model(choose: random.Random) -> list[torch.nn.Parameter]:
    """Up to 30 small parameters, or, one in 200, some that threads share; with gaps, without gradients, empty."""
    is_large = choose.random() < 0.005
    parameters = []
    for i in range(choose.randint(1, 30)):
        size = choose.randint(0, 300) if i or not is_large else 400_000
        grad = torch.full((size, 2), choose.uniform(-2, 2), dtype=choose.choice(DTYPES))
        parameter = torch.nn.Parameter(torch.zeros((), dtype=grad.dtype).expand(size, 2))
        parameter.grad = grad if choose.random() < 0.8 else None
        if choose.random() < 0.1:
            parameter = torch.nn.Parameter(torch.zeros((), dtype=grad.dtype).expand(size))
            parameter.grad = grad[:, 0]
        parameters.append(parameter)
    return parameters


def one_call(choose: random.Random) -> None:
    parameters, kind = model(choose), choose.randint(0, 7)
    if kind == 0:
        fastclip.clip_grad_norm_(parameters, 0.5, choose.choice([1, 2]))
    elif kind == 1:
        fastclip.clip_grad_norm_((p for p in parameters), 1e9, statistics=fastclip.GradStatistics())
    elif kind == 2:
        fastclip.clip_grad_value_(parameters, 0.5)
    elif kind == 3:
        norm = fastclip.get_total_norm([p.grad for p in parameters if p.grad is not None])
        fastclip.clip_grads_with_norm_(parameters, 1.0, norm)
    elif kind == 4:
        optimizer = torch.optim.SGD([p for p in parameters if p.is_contiguous()] or [parameters[0]], lr=0.0)
        fastclip.ClippedOptimizer(optimizer, choose.uniform(0, 2), fold=False).optimizer.zero_grad()
    elif kind == 5:  # errors, in the middle of a list
        try:
            fastclip.clip_grad_norm_([*parameters, None], 1.0)
        except TypeError:
            pass
        else:
            raise AssertionError("no error")
    elif kind == 6:
        fastclip.clip_grad_norm_(parameters, 1.0, 3)  # by torch
    else:
        torch.set_num_threads(choose.randint(1, 3))
        fastclip.clip_grad_norm_(parameters, torch.tensor(0.1), 2)


def in_use() -> dict[str, int]:
    torch.set_num_threads(2)
    fastclip.get_total_norm(torch.ones(400_000))  # OpenMP has as many threads as its last call wanted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not in use
    status = Path("/proc/self/status").read_text()
    return {
        "memory in KB": int(status.split("VmRSS:")[1].split()[0]),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "Python objects": len(gc.get_objects()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    calls = parser.parse_args().calls
    choose, began, before = random.Random(0), time.time(), {}
    for i in range(calls):
        if i == calls // 2:
            before = in_use()
        one_call(choose)
    after = in_use()
    allowed = {"memory in KB": MOST_GROWTH, "threads": 0, "file descriptors": 0, "Python objects": 50}
    grown = [name for name in after if after[name] > before[name] + allowed[name]]
    for name in after:
        print(f"{name}: {before[name]:,} after {calls // 2:,} calls, {after[name]:,} after {calls:,}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{time.time() - began:.0f} s, peak memory {peak:,} KB, grown: {', '.join(grown) or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
