"""Builds and tests the CPU part with the corners of what is supported: torch 2.6 to 2.14, Python 3.10 to 3.14.

    python tools/matrix.py [--keep] [--allow-missing] [--pip "ARGUMENTS"] [torch-python ...]

Each pair (2.6.0-3.10) gets a virtual environment and a copy of the source tree in build/matrix, a build in place, the
tests in TESTS, the package as a wheel, and `python -m fastclip doctor`. What cannot be run, for want of an interpreter
or of a torch for it, is named with the reason, and makes the exit status 1 as a failure does, unless
--allow-missing is given.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
CORNERS = ["2.6.0-3.10", "2.6.0-3.13", "2.9.1-3.12", "2.13.0-3.13", "2.14.1-3.10", "2.14.1-3.13", "2.14.1-3.14"]
TOOLS = ["setuptools", "wheel", "ninja", "numpy", "pytest", "hypothesis"]
# What depends on torch's version most: reading gradients, results and errors against torch's own, every reason to
# fall back, the patch, optimizers, DTensors.
TESTS = ["build", "native", "clip", "norm", "value", "torch_clip", "semantics", "fallback", "patching", "errors"]
TESTS += ["threads", "optim", "sharded", "adaptive"]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.so", "*.so.json", "*.egg-info"
)


class Missing(Exception):
    """Something that this machine does not have."""


def interpreter(version: str) -> str:
    """The path of a Python 3.x: one on the PATH, pyenv's, or what uv finds or fetches."""
    places = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for place in filter(None, places):
        # pyenv's shims are on the PATH for versions that are not switched on: only one that runs counts.
        done = subprocess.run([place, "-c", "import sys, venv; print(sys.version_info[:2])"], capture_output=True)
        if done.returncode == 0 and done.stdout.decode().strip() == f"({version.replace('.', ', ')})":
            return str(place)
    uv = shutil.which("uv")
    if uv:
        subprocess.run([uv, "python", "install", version], capture_output=True)
        done = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    raise Missing(f"no Python {version} on the PATH, in pyenv or from uv")


def run(log: Path, *command, **environment) -> None:
    """Runs a command in the copied tree of `log`, with its output there; RuntimeError where it fails."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FASTCLIP_")}
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        done = subprocess.run(
            list(map(str, command)),
            cwd=log.parent / "src",
            env={**inherited, "OMP_WAIT_POLICY": "passive", "FASTCLIP_CUDA": "0", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode} of {' '.join(map(str, command[1:5]))} ..., see {log}")


def prepare(torch: str, version: str, folder: Path, pip_arguments: list[str]) -> Path:
    """The Python of a virtual environment with this torch; made anew unless it is there."""
    python, log = folder / "venv" / "bin" / "python", folder / "log.txt"
    if not (folder / "ready").exists():
        shutil.rmtree(folder / "venv", ignore_errors=True)
        run(log, interpreter(version), "-m", "venv", folder / "venv")
        try:
            run(log, python, "-m", "pip", "install", "-q", *pip_arguments, f"torch=={torch}", *TOOLS)
        except RuntimeError as error:
            raise Missing(f"torch {torch} for Python {version} cannot be installed: {first_error(log)}") from error
        (folder / "ready").touch()
    return python


def first_error(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
    return lines[0] if lines else f"see {log}"


def try_pair(pair: str, pip_arguments: list[str]) -> str:
    """Everything for one pair; returns what pytest counted."""
    torch, _, version = pair.partition("-")
    folder = FOLDER / pair
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    log.write_text("")
    shutil.rmtree(folder / "src", ignore_errors=True)
    shutil.copytree(ROOT, folder / "src", ignore=NOT_COPIED)
    python = prepare(torch, version, folder, pip_arguments)
    run(log, python, "setup.py", "-q", "build_ext", "--inplace", FASTCLIP_REQUIRE_NATIVE="1")
    tests = [f"tests/test_{name}.py" for name in TESTS]
    mark = log.stat().st_size
    run(log, python, "-m", "pytest", "-q", "-m", "not cuda", *tests, PYTHONPATH=".")
    counted = log.read_text()[mark:].rstrip().rsplit("\n", 1)[-1]
    run(log, python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--force-reinstall", ".")
    os.makedirs(folder / "src" / "elsewhere")
    run(log, "sh", "-c", f"cd elsewhere && FASTCLIP_FORCE=native {python} -m fastclip doctor")
    return counted.strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=CORNERS, help="torch-python, for example 2.6.0-3.10")
    parser.add_argument("--pip", default="", help='arguments for pip, for example "--index-url URL" of CPU wheels')
    parser.add_argument("--keep", action="store_true", help="keep the virtual environments (3 GB each with CUDA's)")
    parser.add_argument("--allow-missing", action="store_true", help="exit 0 where some pairs could not be run")
    options = parser.parse_args()
    results = {}
    for pair in options.pairs:
        start = time.perf_counter()
        try:
            results[pair] = ("passed", try_pair(pair, options.pip.split()))
        except Missing as error:
            results[pair] = ("not run", str(error))
        except RuntimeError as error:
            results[pair] = ("FAILED", str(error))
        if not options.keep:
            shutil.rmtree(FOLDER / pair / "venv", ignore_errors=True)
            (FOLDER / pair / "ready").unlink(missing_ok=True)
        print(f"{pair:12} {results[pair][0]:8} {time.perf_counter() - start:4.0f} s  {results[pair][1]}", flush=True)
    states = [state for state, _ in results.values()]
    print(", ".join(f"{states.count(state)} {state}" for state in ("passed", "FAILED", "not run")))
    return int("FAILED" in states or ("not run" in states and not options.allow_missing))


if __name__ == "__main__":
    sys.exit(main())
