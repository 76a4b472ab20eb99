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
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
VENV_READY = VENV / "ready"
STAMP = ROOT / "build" / "stamp.json"
OPTIONAL = {
    "ninja": "the build runs one file at a time",
    "hypothesis": "the property tests are skipped",
    "tensorboard": "the test of TensorBoard events is skipped",
    "numpy": "the tests that use numpy scalars are skipped",
    "pytest_benchmark": "`pytest benchmarks` does not run",
    "rich": "tests of tables are skipped; `make bench` shows a line for each case",
    "matplotlib": "tests of plots are skipped; `benchmarks report` and `make docs-figures` do not run",
    "mkdocs": "`make docs` does not run",
    "mypy": "`make lint` does not run",
    "jinja2": "tests of pages are skipped; `benchmarks report` does not run",
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def requirements() -> list[str]:
    """The extras of pyproject.toml, all of them, without the names by which they refer to each other."""
    try:
        import tomllib
    except ImportError:  # Python 3.10: pip has a copy
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [line for extra in extras for line in extra if not line.startswith(project["name"] + "[")]


def fill_venv() -> None:
    """Installs torch (any requirement in $TORCH) and what the extras name into .venv, which runs this; once."""
    torch, others = os.environ.get("TORCH", "torch"), requirements()
    wanted = "\n".join([torch, *others])
    if VENV_READY.exists() and VENV_READY.read_text() == wanted:
        return
    say("Filling .venv with torch, tools and trainers (several minutes where they have to be downloaded) ...")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", torch], check=True, stdout=sys.stderr)
    # torch first, and named again: what depends on it has to suit it, not the other way round.
    torch = f"torch=={importlib.metadata.version('torch')}"
    subprocess.run([*pip, "install", torch, *others], check=True, stdout=sys.stderr)
    # PyPI's torchvision is built for a torch with CUDA. With one without, importing it fails, and so do timm, which
    # needs it, and torchmetrics, a part of Lightning, which uses it where it is installed.
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        say(f"torchvision does not load with {torch}: it is taken out, the tests that need it are skipped.")
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True, stdout=sys.stderr)
    importlib.invalidate_caches()
    VENV_READY.write_text(wanted)


def inputs_of_the_build() -> dict:
    """Everything that decides what the extension is."""
    sources = [ROOT / "setup.py", ROOT / "fastclip" / "_build.py", *sorted((ROOT / "csrc").rglob("*.*"))]
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
    built = list((ROOT / "fastclip").glob("_C*.so"))  # each with a record of what it was built for
    if (
        built
        and all(Path(f"{path}.json").exists() for path in built)
        and STAMP.exists()
        and json.loads(STAMP.read_text()) == inputs
    ):
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
    if Path(sys.prefix) == VENV:
        fill_venv()
    elif not has("torch"):
        if not VENV_READY.exists():
            venv.create(VENV, with_pip=True)
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
