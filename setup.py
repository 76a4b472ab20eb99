"""Builds the extension fastclip._C. Without torch or a compiler the package installs without it, and says so."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build():
    """fastclip/_build.py alone: importing the package would import torch, which may be missing."""
    spec = importlib.util.spec_from_file_location("fastclip_build", ROOT / "fastclip" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_build = load_build()


def extension(home: str | None):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    plan = _build.plan(home, ROOT / "build")
    return (CUDAExtension if plan["cuda"] else CppExtension)(
        "fastclip._C",
        [str(path.relative_to(ROOT)) for path in plan["sources"]],
        library_dirs=plan["library_dirs"],
        extra_compile_args={"cxx": plan["cxx"], "nvcc": plan["nvcc"]} if plan["cuda"] else {"cxx": plan["cxx"]},
    )


class BuildOrExplain(build_ext):
    """Builds with torch's own BuildExtension. When that cannot work, leaves the extension out and says why."""

    def run(self):
        try:
            home = _build.cuda_home()
            if home:
                os.environ["CUDA_HOME"] = home  # read by torch.utils.cpp_extension when it is imported
            from torch.utils.cpp_extension import BuildExtension, is_ninja_available

            builder = BuildExtension.with_options(use_ninja=is_ninja_available())(self.distribution)
            built = extension(home)
            self.distribution.ext_modules = [built]
            builder.inplace = self.inplace
            builder.ensure_finalized()
            builder.run()
            cuda = any(source.endswith(".cu") for source in built.sources)
            _build.write_record(Path(builder.get_ext_fullpath("fastclip._C")), cuda)
        except Exception as error:
            if os.environ.get("FASTCLIP_REQUIRE_NATIVE") == "1":
                raise
            self.extensions = []  # what comes after the build would look for the file
            print(
                f"\nWARNING: fastclip is installed without its native code ({type(error).__name__}: {error}).\n"
                "It works through torch's own functions. For the fast path install torch, a C++ compiler and ninja, "
                f"then run: python {_build.COMMAND}\n",
                file=sys.stderr,
            )


class BuildWithSources(build_py):
    """Puts the sources of the extension into the package too, for `python -m fastclip build`."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            target = Path(self.build_lib) / "fastclip" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


if __name__ == "__main__":
    from setuptools import Extension

    # A placeholder makes setuptools build a platform wheel; torch is imported only when the extension is built.
    setup(
        license="BSD-3-Clause",
        ext_modules=[Extension("fastclip._C", [])],
        cmdclass={"build_ext": BuildOrExplain, "build_py": BuildWithSources},
    )
