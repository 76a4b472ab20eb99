"""Finds the compiled extension, loads it if it was built for what is here, and says why it is missing."""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fastclip import _build
from fastclip._version import __version__

FORCED = os.environ.get("FASTCLIP_FORCE", "")
if FORCED not in ("", "native", "torch"):
    raise ValueError(f"FASTCLIP_FORCE: expected native or torch, got {FORCED!r}")
# The reason of fallbacks without the extension.
NOT_BUILT = "FASTCLIP_FORCE=torch" if FORCED == "torch" else "extension not built"


def _choose() -> Path:
    """The package's own extension, or the one that `python -m fastclip build` made; ImportError if neither will do."""
    own = _build.packaged()
    why = _build.mismatch(own)
    if why is None and (not torch.version.cuda or (_build.read_record(own) or {}).get("cuda")):
        return own
    built = _build.cached()
    if built.is_absolute() and os.path.exists(built):  # relative: of a user without a home, in whatever folder this is
        why_not = _build.mismatch(built)
        if why_not is None:
            return built
        why = why and why_not
    if why:
        raise ImportError(why)
    return own


def _load(path: Path) -> ModuleType:
    if path == _build.packaged():
        return importlib.import_module("fastclip._C")
    spec = importlib.util.spec_from_file_location("fastclip._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    return module


def _says_it_itself() -> bool:
    """Whether this process is `-m fastclip build`, which is the remedy, or `doctor`, which shows what is wrong."""
    # While the module of `python -m` is looked for, and its package imported, "-m" stands for it in sys.argv.
    is_fastclip = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].endswith("fastclip")
    return is_fastclip and sys.argv[1:2] in (["build"], ["doctor"])


_module: ModuleType | None = None
path: Path | None = None
missing_because: str | None = None
if FORCED == "torch":
    missing_because = "FASTCLIP_FORCE=torch"
else:
    try:
        path = _choose()
        _module = _load(path)
    except ImportError as error:
        path = None
        missing_because = str(error)
        message = f"fastclip's native extension cannot be used ({error})"
        command = f"{sys.executable} {_build.COMMAND}"
        remedy = f"To build it for this torch, with a C++ compiler and ninja installed, run: {command}"
        if not _says_it_itself():
            if FORCED == "native":
                raise ImportError(f"{message}, and FASTCLIP_FORCE=native is set. {remedy}") from error
            warnings.warn(
                f"{message}; torch's own functions do the clipping. {remedy}",
                RuntimeWarning,
                stacklevel=3,
            )
    else:
        # Chosen here, once: a FASTCLIP_CPU that names no instruction set of this processor ends the import.
        _module.kernels()

if TYPE_CHECKING:
    from fastclip import _C  # as _C.pyi describes it
else:
    _C = _module


def build_info() -> dict:
    """How this fastclip was built and what it uses on this machine.

    Returns a dict with ``version`` (of fastclip), ``torch`` (version in use), ``native`` (bool: the extension is
    loaded), ``missing_because`` (str if it is not), ``extension`` (its path, None without it), ``compiler``, ``cuda``
    (the CUDA version of the GPU part, 13000 for 13.0, None where it was not built), ``cpu_kernels`` (the instruction
    set chosen for this processor, or by ``FASTCLIP_CPU=baseline|avx2|avx512``), ``cpu_kernels_available``, and
    ``threads`` (what torch allows now).
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _C is not None,
        "missing_because": missing_because,
        "extension": str(path) if _C else None,
        "compiler": _C.compiler if _C else None,
        "cuda": _C.cuda if _C else None,
        "cpu_kernels": _C.kernels() if _C else None,
        "cpu_kernels_available": _C.available_kernels() if _C else [],
        "threads": torch.get_num_threads(),
    }
