"""Builds the extension fastclip._C. Without torch or a compiler the package installs without it, and says so."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ANY_CARD = "7.5;8.0;9.0+PTX"  # for a build without a card: newer ones than 9.0 compile the PTX when it is loaded
OLDEST_CUDA = (12, 1)  # since then a kernel takes 32,764 bytes of parameters


def cuda_home() -> str | None:
    """The toolkit of the nvcc on the PATH: nvcc itself is asked, since it may be a wrapper in another directory."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return None
    lines = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr.splitlines()
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
    if version[0] != int(torch.version.cuda.split(".")[0]):  # torch would end the build, and that of the CPU part too
        return f"expected the major version of torch's CUDA {torch.version.cuda}, got {got}"
    return None


def cudart_directory(home: str) -> str | None:
    """A directory with a libcudart to link with, where the toolkit has none: made from the one in torch's wheels."""
    if any((Path(home) / part / "libcudart.so").exists() for part in ("lib64", "lib")):
        return None
    for folder in map(Path, sys.path):
        for library in sorted(folder.glob("nvidia/*/lib/libcudart.so.*")):
            link = ROOT / "build" / "cudart" / "libcudart.so"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return str(link.parent)
    return None


def extension(home: str | None):
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp") if p.parent.name != "cuda")
    # -fopenmp without -lgomp: the runtime that torch brings, whatever its name, is the one that is used.
    flags = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    if sys.platform == "linux":
        flags.append("-fopenmp")

    cuda_sources = sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cpp", ".cu")
    )
    wanted = os.environ.get("FASTCLIP_CUDA", "auto")
    possible = bool(cuda_sources and home and torch.version.cuda)
    reason = "expected CUDA sources, nvcc and a torch with CUDA; one is missing"
    if possible and (unusable := unusable_because(home)):
        possible, reason = False, unusable
        print(f"fastclip: only the CPU part is built: {reason}", file=sys.stderr)
    if wanted == "1" and not possible:
        raise SystemExit(f"FASTCLIP_CUDA=1: {reason}")
    if possible and wanted != "0":
        cudart = cudart_directory(home)
        if not torch.cuda.is_available():  # torch would ask the card at hand
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ANY_CARD)
        return CUDAExtension(
            "fastclip._C",
            sources + cuda_sources,
            define_macros=[("FASTCLIP_CUDA", None)],
            library_dirs=[cudart] if cudart else [],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-lineinfo"]},
        )
    return CppExtension("fastclip._C", sources, extra_compile_args={"cxx": flags})


class BuildOrExplain(build_ext):
    """Builds with torch's own BuildExtension. When that cannot work, leaves the extension out and says why."""

    def run(self):
        try:
            home = cuda_home()
            if home:
                os.environ["CUDA_HOME"] = home  # read by torch.utils.cpp_extension when it is imported
            from torch.utils.cpp_extension import BuildExtension, is_ninja_available

            builder = BuildExtension.with_options(use_ninja=is_ninja_available())(self.distribution)
            self.distribution.ext_modules = [extension(home)]
            builder.inplace = self.inplace
            builder.ensure_finalized()
            builder.run()
        except Exception as error:
            if os.environ.get("FASTCLIP_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"\nWARNING: fastclip is installed without its native code ({type(error).__name__}: {error}).\n"
                "It works through torch's own functions. For the fast path install torch, a C++ compiler and ninja, "
                "then run: pip install --no-build-isolation --no-deps --force-reinstall .\n",
                file=sys.stderr,
            )


if __name__ == "__main__":
    from setuptools import Extension

    # A placeholder makes setuptools build a platform wheel; torch is imported only when the extension is built.
    setup(ext_modules=[Extension("fastclip._C", [])], cmdclass={"build_ext": BuildOrExplain})
