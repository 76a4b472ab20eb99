"""Makes ready what the Makefile's targets need, and prints the path of the Python to run them with.

A Python that has torch is used as it is, without network: what it lacks is named. Otherwise a virtual environment is
made in .venv. The extension is built in place, and again only when something that went into it has changed.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
VENV_READY = ROOT / ".venv" / "ready"
STAMP = ROOT / "build" / "stamp.json"
OPTIONAL = {
    "ninja": "the build runs one file at a time",
    "hypothesis": "the property tests are skipped",
    "numpy": "the tests that use numpy scalars are skipped",
    "pytest_benchmark": "`pytest benchmarks` does not run",
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def make_venv() -> None:
    """Creates .venv with torch (any requirement in $TORCH) and requirements-dev.txt, once."""
    requirements = ROOT / "requirements-dev.txt"
    wanted = os.environ.get("TORCH", "torch") + "\n" + requirements.read_text()
    if VENV_READY.exists() and VENV_READY.read_text() == wanted:
        return
    say("Making .venv with torch (several minutes where torch has to be downloaded) ...")
    venv.create(ROOT / ".venv", with_pip=True)
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, os.environ.get("TORCH", "torch"), "-r", str(requirements)], check=True, stdout=sys.stderr)
    VENV_READY.write_text(wanted)


def inputs_of_the_build() -> dict:
    """Everything that decides what the extension is."""
    sources = [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(str(source.relative_to(ROOT)).encode() + b"\0" + source.read_bytes())
    return {
        "sources": digest.hexdigest(),
        "python": sys.version,
        "torch": importlib.metadata.version("torch"),
        **{name: os.environ.get(name) for name in ("FASTCLIP_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDA_HOME")},
    }


def build() -> None:
    inputs = inputs_of_the_build()
    built = list((ROOT / "fastclip").glob("_C*.so"))
    if built and STAMP.exists() and json.loads(STAMP.read_text()) == inputs:
        return
    say("Building the extension (half a minute, with CUDA two) ...")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "FASTCLIP_REQUIRE_NATIVE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        say(done.stdout)
        sys.exit("The extension could not be built: see above.")
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(json.dumps(inputs))


def main() -> None:
    if not has("torch"):
        make_venv()
        if Path(sys.prefix) != ROOT / ".venv":
            os.execv(VENV_PYTHON, [str(VENV_PYTHON), __file__])
    if not has("pytest") or not has("setuptools"):
        sys.exit(f"{sys.executable} has torch but lacks pytest or setuptools: install them, or deactivate it.")
    for module, consequence in OPTIONAL.items():
        if not has(module):
            say(f"Without {module.replace('_', '-')}, which this Python lacks: {consequence}.")
    build()
    print(sys.executable)


if __name__ == "__main__":
    main()
