"""Times fastclip and its rivals on a GPU: `python -m benchmarks.gpu`. Prints a table and writes JSON beside it.

Every round runs all contestants in turn. Before each timed call the gradients are restored by an untimed copy, since
a clipped call leaves them under the threshold, and the L2 cache is flushed by a write of twice its size. Device time is
taken by CUDA events, host time by the wall clock around the call, which does not wait. GB/s counts the bytes that have
to move (N read unclipped; 2 N read and N written clipped) and stands beside the bandwidth of a copy on the same card.
"""

import argparse
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastclip

NEVER = 1e30  # a threshold that no norm reaches


def gpt2_small() -> list[tuple[int, ...]]:
    d, layer = 768, []
    for _ in range(12):
        layer += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *layer, (d,), (d,)]


# Name, shapes, dtype. The largest is a model of 1.536e9 parameters in 48 layers.
CASES = [
    ("GPT-2 small bf16", gpt2_small(), torch.bfloat16),
    ("GPT-2 small fp32", gpt2_small(), torch.float32),
    ("1.536e9 bf16", [(4000, 2000)] * 192, torch.bfloat16),
    ("2,000 x 64 fp32", [(64,)] * 2000, torch.float32),
    ("RL policy fp32", [(64, 17), (64,), (64, 64), (64,), (6, 64), (6,)], torch.float32),
]


def rivals(parameters: list, threshold: float) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can be timed here, and why the rest cannot."""
    grads = [parameter.grad for parameter in parameters]
    found = {
        "fastclip": lambda: fastclip.clip_grad_norm_(parameters, threshold),
        "torch foreach": lambda: torch.nn.utils.clip_grad_norm_(parameters, threshold, foreach=True),
    }
    absent = {}

    def flat_clip(tensors):
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in tensors])
        )
        coef = (threshold / (norm + 1e-6)).clamp(max=1.0)
        for g in tensors:
            g.mul_(coef)
        return norm

    if not is_a_card():
        absent["torch.compile"] = "its kernels are machine code, which an emulated device does not run"
    elif len(grads) <= 200:  # beyond that compiling takes minutes
        compiled = torch.compile(flat_clip)
        found["torch.compile"] = lambda: compiled(grads)
    else:
        absent["torch.compile"] = "compiling a graph of so many tensors takes minutes"
    try:
        apex = importlib.import_module("apex.contrib.clip_grad")
        found["apex"] = lambda: apex.clip_grad_norm_(parameters, threshold)
    except Exception as error:  # an extension built for another torch fails in its own ways
        absent["apex"] = f"{type(error).__name__}: {error}"
    try:
        te = importlib.import_module("transformer_engine.pytorch.optimizers")
        overflow = torch.zeros(1, dtype=torch.int32, device="cuda")

        def transformer_engine():
            norm, _ = te.multi_tensor_applier(te.multi_tensor_l2norm, overflow, [grads], False)
            coef = (threshold / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, coef)
            return norm

        found["TransformerEngine"] = transformer_engine
    except Exception as error:
        absent["TransformerEngine"] = f"{type(error).__name__}: {error}"
    return found, absent


def timed(call: Callable, prepare: Callable) -> tuple[float, float]:
    """Milliseconds on the device, microseconds on the host."""
    prepare()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), host * 1e6


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GB: the best of 10."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), lambda: None)[0] for _ in range(10))
    return 2 * source.numel() / (best / 1e3)


def run_case(name: str, shapes: list, dtype: torch.dtype, rounds: int, seconds: float) -> list[dict]:
    """Measures a case unclipped and clipped; returns plain rows, ready for JSON."""
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    flat = torch.empty(total, dtype=dtype, device="cuda")
    saved = torch.randn(total, dtype=dtype, device="cuda")
    parameters = []
    for shape, grad in zip(shapes, flat.split(sizes), strict=True):
        parameter = torch.nn.Parameter(torch.empty((), dtype=dtype, device="cuda").expand(shape))
        parameter.grad = grad.view(shape)
        parameters.append(parameter)
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")

    def prepare() -> None:
        flat.copy_(saved)
        flush.zero_()

    rows = []
    for what, threshold, passes in (("unclipped", NEVER, 1), ("clipped", 1.0, 3)):
        contestants, absent = rivals(parameters, threshold)
        samples = {}
        for contestant, call in list(contestants.items()):
            try:
                for _ in range(2):
                    timed(call, prepare)
                samples[contestant] = []
            except Exception as error:
                absent[contestant] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        stop = time.perf_counter() + seconds
        for done in range(rounds):
            if done >= 5 and time.perf_counter() > stop:
                break
            for contestant in samples:
                samples[contestant].append(timed(contestants[contestant], prepare))
        # Whether the results agree: the norm in float64, in pieces that fit.
        prepare()
        exact = math.sqrt(sum(float(piece.double().square().sum()) for piece in flat.split(1 << 26)))
        off = abs(float(fastclip.clip_grad_norm_(parameters, threshold)) / exact - 1)
        size = total * flat.element_size()
        for contestant, times in samples.items():
            device = statistics.median(t[0] for t in times)
            rows.append(
                {
                    "case": name,
                    "kind": what,
                    "contestant": contestant,
                    "device_ms": device,
                    "host_us": statistics.median(t[1] for t in times),
                    "rounds": len(times),
                    "gb_per_s": passes * size / (device / 1e3) / 1e9,
                    "norm_off_by": off if contestant == "fastclip" else None,
                }
            )
        rows += [{"case": name, "kind": what, "contestant": c, "absent": why} for c, why in absent.items()]
    return rows


def table(rows: list[dict], bandwidth: float) -> str:
    lines = [
        "| case | | contestant | device ms | host us | GB/s | of the copy's bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['case']} | {row['kind']} | {row['contestant']} |"
        if "absent" in row:
            lines.append(f"{start} absent: {row['absent'][:70]} | | | |")
        else:
            share = row["gb_per_s"] * 1e9 / bandwidth
            lines.append(
                f"{start} {row['device_ms']:.3f} | {row['host_us']:.0f} | {row['gb_per_s']:.0f} | {share:.0%} |"
            )
    return "\n".join(lines)


def is_a_card() -> bool:
    """Whether times mean anything: on an emulated device they do not."""
    try:
        import cudaemu
    except ImportError:
        return torch.cuda.is_available()
    return torch.cuda.is_available() and not cudaemu.active()


def main() -> None:
    parser = argparse.ArgumentParser(description="fastclip and its rivals on a GPU.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=8, help="for each case, unclipped and clipped")
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--try-out", action="store_true", help="small cases, no times: only whether everything runs")
    args = parser.parse_args()
    if args.try_out:
        rows = [row for name, shapes, dtype in CASES[-2:] for row in run_case(name, shapes[:60], dtype, 1, 0)]
        for row in rows:
            print(row["case"], row["kind"], row["contestant"], row.get("absent", "runs"))
        return
    if not is_a_card():
        raise SystemExit("expected a real CUDA device; found none. Nothing was measured.")
    free = torch.cuda.mem_get_info()[0]
    bandwidth = copy_bandwidth()
    rows = []
    for name, shapes, dtype in CASES:
        needed = 3 * sum(map(math.prod, shapes)) * dtype.itemsize  # the rivals make copies
        if needed < free:
            rows += run_case(name, shapes, dtype, args.rounds, args.seconds)
        else:
            rows.append({"case": name, "kind": "", "contestant": "all", "absent": f"{needed / 1e9:.0f} GB do not fit"})
    card = torch.cuda.get_device_name()
    head = f"{card}, torch {torch.__version__}; a copy reads and writes {bandwidth / 1e9:.0f} GB/s\n\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = head + table(rows, bandwidth) + "\n"
    args.output.with_suffix(".md").write_text(text)
    result = {
        "card": card,
        "torch": torch.__version__,
        "copy_gb_per_s": bandwidth / 1e9,
        "build": fastclip.build_info(),
    }
    args.output.with_suffix(".json").write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
