"""`python -m fastclip doctor`: what is installed, whether the kernels are right on each device here, and what to do."""

import ctypes
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fastclip
from fastclip import _build

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 7, 64, 1000)
# The case, and what max_norm is in it, as a multiple of the norm.
CASES = {"clipped": 0.5, "unclipped": 2.0, "inf": 0.5, "nan": 0.5}


def examine() -> dict:
    """All that the command shows: ``versions``, ``extension``, ``cpu``, ``cuda`` (device -> its name), ``unusable``
    (device -> torch's message, str), ``environment``, ``self_test`` (device -> list of failures, str) and ``problems``
    (list of dicts with ``problem`` and ``remedy``)."""
    info = fastclip.build_info()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    result: dict[str, Any] = {
        "versions": {
            "fastclip": fastclip.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cuda_runtime": torch.version.cuda,
            "cuda_driver": _driver() if len(devices) > 1 else None,
        },
        "extension": {
            "native": info["native"],
            "path": info["extension"],
            "missing_because": info["missing_because"],
            "compiler": info["compiler"],
            "cuda": info["cuda"],
            "built_for": _build.read_record(Path(info["extension"])) if info["extension"] else None,
        },
        "cpu": {
            "kernels": info["cpu_kernels"],
            "available": info["cpu_kernels_available"],
            "threads": info["threads"],
        },
        "cuda": {},
        "unusable": {},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTCLIP_")},
        "self_test": {},
    }
    for device in devices[1:]:
        try:
            result["cuda"][device] = torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError) as error:  # counted, but the driver is too old, or another holds it
            result["unusable"][device] = str(error).partition("\n")[0]
    if info["native"]:
        tested = ["cpu", *(result["cuda"] if info["cuda"] else ())]
        result["self_test"] = {device: self_test(device) for device in tested}
    result["problems"] = _problems(result)
    return result


def self_test(device: str) -> list[str]:
    """Clips small lists of every dtype on a device natively, and compares with float64; returns what is wrong."""
    failures = []
    for dtype in DTYPES:
        for case, factor in CASES.items():
            try:
                wrong = _check(device, dtype, case, factor)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                failures.append(f"{dtype} {case}: {wrong}".removeprefix("torch."))
    return failures


def _check(device: str, dtype: torch.dtype, case: str, factor: float) -> str | None:
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    norm = torch.linalg.vector_norm(torch.cat(before).double()).item()
    max_norm = norm * factor
    if case not in ("clipped", "unclipped"):
        before[1][3] = norm = float(case)
    coef = min(1.0, max_norm / (norm + 1e-6))  # as in torch.nn.utils.clip_grads_with_norm_
    if case == "nan":
        coef = float("nan")
    parameters = [torch.nn.Parameter(torch.zeros_like(grad, device=device)) for grad in before]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad.to(device, copy=True)
    native = fastclip.counters()["native"]
    got = fastclip.clip_grad_norm_(parameters, max_norm).cpu()
    if fastclip.counters()["native"] != native + 1:
        return "expected a native call, torch's function did it"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    if not torch.allclose(
        got.double(), torch.tensor(norm, dtype=torch.float64), rtol=tolerance, atol=0, equal_nan=True
    ):
        return f"expected the norm {norm}, got {got.item()}"
    rounding = torch.finfo(dtype).eps
    for index, (parameter, grad) in enumerate(zip(parameters, before, strict=True)):
        assert parameter.grad is not None
        want, scaled = grad.double() * coef, parameter.grad.cpu().double()
        if not torch.allclose(scaled, want, rtol=tolerance + rounding, atol=torch.finfo(dtype).tiny, equal_nan=True):
            return f"expected gradient {index} times {coef}, got another"
    return None


def _driver() -> str | None:
    """The newest CUDA that the driver runs, "13.0". Asked of the driver's library, since torch has no function for it;
    None where there is none (torch for ROCm)."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        status = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _problems(result: dict) -> list[dict]:
    build = f"{sys.executable} {_build.COMMAND}"
    problems = []

    def add(problem: str, remedy: str) -> None:
        problems.append({"problem": problem, "remedy": remedy})

    extension = result["extension"]
    if not extension["native"]:
        forced = extension["missing_because"] == "FASTCLIP_FORCE=torch"
        remedy = "unset FASTCLIP_FORCE" if forced else f"with a C++ compiler and ninja installed, run: {build}"
        add(f"the native extension is not used: {extension['missing_because']}", remedy)
    elif result["cuda"] and not extension["cuda"] and not result["versions"]["cuda_runtime"]:
        add("torch's devices are not CUDA's", "nothing can be done: on them torch's own functions do the clipping")
    elif result["cuda"] and not extension["cuda"]:
        add(
            "the extension was built without its CUDA part, and there is a CUDA device",
            f"with nvcc 12.1 or newer on the PATH, of torch's major version, run: FASTCLIP_CUDA=1 {build}",
        )
    for device, message in result["unusable"].items():
        add(
            f"torch cannot use {device}: {message}",
            "make a program of torch alone work on it; the driver has to run torch's version of CUDA",
        )
    for device, failures in result["self_test"].items():
        if failures:
            add(
                f"wrong results on {device}: {'; '.join(failures)}",
                f"build anew: {build}; until that helps, FASTCLIP_FORCE=torch uses torch's functions",
            )
    return problems


def as_text(result: dict) -> str:
    """The result for people, one thing a line."""
    versions, extension, cpu = result["versions"], result["extension"], result["cpu"]
    lines = [
        f"fastclip   {versions['fastclip']}",
        f"torch      {versions['torch']}",
        f"Python     {versions['python']} on {versions['platform']}",
    ]
    if extension["native"]:
        lines += [
            f"extension  {extension['path']}",
            f"           compiled by {extension['compiler']}, {'with' if extension['cuda'] else 'without'} CUDA",
            f"CPU        {cpu['kernels']} (of {', '.join(cpu['available'])}), {cpu['threads']} threads",
        ]
    else:
        lines.append("extension  none")
    runtime, driver = versions["cuda_runtime"], versions["cuda_driver"]
    cuda = [f"torch has {runtime or 'none'}"]
    if driver:
        cuda.append(f"the driver runs up to {driver}")
    if not result["cuda"] and not result["unusable"]:
        cuda.append("no device")
    lines.append(f"CUDA       {', '.join(cuda)}")
    lines += [f"{device:10} {name}" for device, name in result["cuda"].items()]
    lines += [f"{name}={value}" for name, value in result["environment"].items()]
    for device, failures in result["self_test"].items():
        done = len(DTYPES) * len(CASES)
        lines.append(f"self-test  {device}: {done - len(failures)} of {done} right")
    for problem in result["problems"]:
        lines += ["", f"PROBLEM: {problem['problem']}", f"  what to do: {problem['remedy']}"]
    return "\n".join([*lines, "", "not all is well" if result["problems"] else "all is well"])


def main(as_json: bool) -> int:
    """Prints what was found; returns the exit status, 1 where there is a problem."""
    result = examine()
    print(json.dumps(result, indent=2) if as_json else as_text(result))
    return 1 if result["problems"] else 0
