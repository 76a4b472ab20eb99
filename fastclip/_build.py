"""What the extension is compiled from and with, for setup.py and `python -m fastclip build`; needs no torch to import.

Beside each extension lies a record of what it was built for, so that one that is of another torch is never loaded.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# In an installed package the sources are inside it, in a source tree (editable installs too) beside it.
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
ANY_CARD = "7.5;8.0;9.0+PTX"  # for a build without a card: newer ones than 9.0 compile the PTX when it is loaded
OLDEST_CUDA = (12, 1)  # since then a kernel takes 32,764 bytes of parameters
COMMAND = "-m fastclip build"


def cuda_home() -> str | None:
    """The toolkit of the nvcc on the PATH: nvcc itself is asked, since it may be a wrapper in another directory."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return None
    try:
        lines = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr.splitlines()
    except OSError:  # not a program
        return None
    tops = [line.split("=", 1)[1].strip() for line in lines if line.startswith("#$ TOP=")]
    return str((Path(nvcc).resolve().parent / tops[0]).resolve()) if tops else None


def cuda_version(home: str) -> tuple[int, int]:
    """The toolkit's version, (13, 0); (0, 0) where it has no nvcc that runs."""
    try:
        text = subprocess.run([Path(home) / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return 0, 0
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def unusable_because(home: str) -> str | None:
    """Why torch's extension builder cannot use a toolkit, or the kernels cannot; None for one that will do."""
    import torch

    version = cuda_version(home)
    if version == (0, 0):
        return f"expected a toolkit with bin/nvcc, got {home}"
    got = "{}.{} in {}".format(*version, home)
    if version < OLDEST_CUDA:
        return f"expected CUDA 12.1 or later, got {got}"
    if version[0] != int(
        str(torch.version.cuda).split(".")[0]
    ):  # torch would end the build, and that of the CPU part too
        return f"expected the major version of torch's CUDA {torch.version.cuda}, got {got}"
    return None


def cudart_directory(home: str, build: Path) -> str | None:
    """A directory with a libcudart to link with, where the toolkit has none: made in `build` from torch's wheels'."""
    if any((Path(home) / part / "libcudart.so").exists() for part in ("lib64", "lib")):
        return None
    for folder in map(Path, sys.path):
        for library in sorted(folder.glob("nvidia/*/lib/libcudart.so.*")):
            link = build / "cudart" / "libcudart.so"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return str(link.parent)
    return None


def plan(home: str | None, build: Path) -> dict:
    """What to compile and how: ``sources`` (paths), ``cxx`` and ``nvcc`` (flags), ``cuda`` (bool), ``library_dirs``.

    Args:
        home: the CUDA toolkit, None without one.
        build: a directory for what has to be made first.
    """
    import torch

    sources = sorted(path for path in SOURCES.rglob("*.cpp") if path.parent.name != "cuda")
    # -fopenmp without -lgomp: the runtime that torch brings, whatever its name, is the one that is used. Nothing names
    # the processor of this machine (-march): each instruction set has its own kernels, chosen when they are loaded.
    flags = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    if sys.platform == "linux":
        flags.append("-fopenmp")

    cuda_sources = sorted(path for path in (SOURCES / "cuda").iterdir() if path.suffix in (".cpp", ".cu"))
    wanted = os.environ.get("FASTCLIP_CUDA", "auto")
    possible = bool(cuda_sources and torch.version.cuda)
    reason = "expected CUDA sources, nvcc and a torch with CUDA; one is missing"
    if home is None:
        possible = False
    elif possible and wanted != "0" and (unusable := unusable_because(home)):
        possible, reason = False, unusable
        if wanted != "1":
            print(f"fastclip: only the CPU part is built: {reason}", file=sys.stderr)
    if wanted == "1" and not possible:
        raise SystemExit(f"FASTCLIP_CUDA=1: {reason}")
    if home is None or not possible or wanted == "0":
        return {"sources": sources, "cxx": flags, "nvcc": [], "cuda": False, "library_dirs": []}
    cudart = cudart_directory(home, build)
    if not torch.cuda.is_available():  # torch would ask the card at hand
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ANY_CARD)
    macro = "-DFASTCLIP_CUDA"
    return {
        "sources": sources + cuda_sources,
        "cxx": [*flags, macro],
        "nvcc": ["-O3", "-lineinfo", macro],
        "cuda": True,
        "library_dirs": [cudart] if cudart else [],
    }


def digest() -> str:
    """Of all sources and of this file, which has the flags."""
    result = hashlib.sha256()
    for path in [Path(__file__), *sorted(path for path in SOURCES.rglob("*") if path.is_file())]:
        result.update(path.name.encode() + b"\0" + path.read_bytes())
    return result.hexdigest()[:16]


def target() -> dict:
    """What an extension has to be built for to be loaded here: nothing of it may differ."""
    import torch

    # Read, since setup.py cannot import the package: that needs torch.
    version = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "_version.py").read_text(), re.MULTILINE)
    assert version is not None
    return {
        "fastclip": version[1],
        "torch": torch.__version__,  # with its local part, +cpu or +cu130
        "torch_cuda": torch.version.cuda,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sysconfig.get_config_var("SOABI") or sysconfig.get_config_var("EXT_SUFFIX"),
    }


def record_of(extension: Path) -> Path:
    return extension.with_name(extension.name + ".json")


def write_record(extension: Path, cuda: bool) -> None:
    """Says beside an extension what it was built for; `cuda`: it has the CUDA part."""
    text = json.dumps({**target(), "cuda": cuda}, indent=1)
    temporary = record_of(extension).with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, record_of(extension))


def read_record(extension: Path) -> dict | None:
    try:
        record = json.loads(record_of(extension).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def mismatch(extension: Path) -> str | None:
    """Why an extension must not be loaded; None where it was built for exactly what is here."""
    if not os.path.exists(extension):  # Path.exists raises where a folder may not be searched
        return f"there is no {extension.name} in {extension.parent}"
    record = read_record(extension)
    if record is None:
        return f"{extension} has no record of what it was built for"
    names = {
        "fastclip": "fastclip",
        "torch": "torch",
        "torch_cuda": "CUDA",
        "cxx11_abi": "C++11 ABI",
        "python": "Python",
    }
    for key, here in target().items():
        if record.get(key) != here:
            return f"{extension} was built for {names[key]} {record.get(key)}, this is {names[key]} {here}"
    return None


def packaged() -> Path:
    """Where the extension that was installed with the package is, if it is."""
    return PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def cached() -> Path:
    """Where `python -m fastclip build` puts the extension: in the cache that torch has for extensions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # as it is for a user without a home
    here = target()
    name = f"fastclip-{here['fastclip']}-{digest()}-torch-{here['torch']}-{here['python']}"
    return Path(root or Path(cache, "torch_extensions")) / name / ("_C.pyd" if sys.platform == "win32" else "_C.so")


@contextlib.contextmanager
def only_builder(folder: Path):
    """Makes the folder, and waits until no other process builds in it. The system frees this lock when its process
    ends, however that ends; torch's is a file, and one that a killed build left would be waited for without end."""
    try:
        if not folder.is_absolute():
            raise OSError("a relative path: TORCH_EXTENSIONS_DIR is one, or this user has no home directory")
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "building", "w")  # noqa: SIM115
    except OSError as error:
        raise SystemExit(
            f"fastclip: expected a folder to build in that can be written, got {folder} ({error}): "
            "set TORCH_EXTENSIONS_DIR to another"
        ) from error
    with file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"fastclip: waiting for another build in {folder}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks: torch's lock remains
        yield


def identity(path: Path) -> tuple[int, int] | None:
    """What tells whether a file was written anew; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def build() -> Path:
    """Compiles the extension for the torch at hand, with torch's own builder and cache, and loads it once.

    Raises SystemExit where there is no folder to build in, and what the builder raises. An extension that was there
    before, and that a build which failed has not touched, stays in use.
    """
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = home  # read by torch.utils.cpp_extension when it is imported
    # ninja as pip installs it is beside Python, which need not be on the PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    from torch.utils import cpp_extension

    extension = cached()
    with only_builder(extension.parent):
        parts = plan(home, extension.parent)
        before, record = identity(extension), record_of(extension)
        text = record.read_bytes() if os.path.exists(record) else None
        record.unlink(missing_ok=True)  # what is left of a build that was broken off is not loaded
        what = f"{len(parts['sources'])} files, {'with' if parts['cuda'] else 'without'} the CUDA part"
        print(f"fastclip: compiling {what}, in {extension.parent}", file=sys.stderr, flush=True)
        try:
            cpp_extension.load(
                name="_C",
                sources=[str(path) for path in parts["sources"]],
                extra_cflags=parts["cxx"],
                extra_cuda_cflags=parts["nvcc"],
                extra_ldflags=[f"-L{directory}" for directory in parts["library_dirs"]],
                build_directory=str(extension.parent),
                with_cuda=parts["cuda"],
                verbose=True,
            )
        except BaseException:
            if text is not None and identity(extension) == before:
                record.write_bytes(text)
            raise
        write_record(extension, parts["cuda"])
    return extension
