"""The command line, ``python -m fastclip``: ``run`` a program on fastclip, ``build`` the extension, ask ``doctor``."""

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fastclip
from fastclip.patching import seconds_spent

if TYPE_CHECKING:
    from fastclip.health.unattended import Monitoring

INTERRUPTED = 130  # as shells have it
BUILD = f"""
from fastclip import _build
try:
    print(f"fastclip: built {{_build.build()}}")
except KeyboardInterrupt:
    raise SystemExit({INTERRUPTED})
except Exception as error:
    raise SystemExit(f"fastclip: {{type(error).__name__}}: {{error}}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description="Gradient clipping for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_run, _add_build, _add_doctor):
        add(commands)
    options = parser.parse_args()
    options.call(options)


def _add_run(commands) -> None:
    parser = commands.add_parser("run", help="run a program with fastclip under torch.nn.utils")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module's name")
    parser.add_argument("--monitor", metavar="PAGE.html", type=_page, help="watch the gradients: findings, a page")
    parser.add_argument("--every", metavar="K", type=int, default=1, help="watch every K-th step only")
    parser.add_argument(
        "--activations", action=argparse.BooleanOptionalAction, default=True, help="watch saturation, with --monitor"
    )
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def call(options: argparse.Namespace) -> None:
        if options.every < 1:
            parser.error(f"argument --every: expected at least 1, got {options.every}")
        monitoring = None
        if options.monitor:
            from fastclip.health.unattended import Monitoring

            monitoring = Monitoring(options.monitor, every=options.every, activations=options.activations)
        run(options.program, options.arguments, options.is_module, monitoring)

    parser.set_defaults(call=call)


def _add_build(commands) -> None:
    parser = commands.add_parser("build", help="compile the extension for the torch that is installed")
    parser.set_defaults(call=lambda options: sys.exit(build()))


def _add_doctor(commands) -> None:
    parser = commands.add_parser("doctor", help="show versions, test every device, say what to do; exit 1 on a problem")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")

    def call(options: argparse.Namespace) -> None:
        from fastclip import doctor

        sys.exit(doctor.main(options.json))

    parser.set_defaults(call=call)


def run(program: str, arguments: list[str], is_module: bool, monitoring: "Monitoring | None" = None) -> None:
    """Runs a script or module as ``__main__``, patched; its exit code and its exceptions are the program's own."""
    with fastclip.patched(monitor=monitoring.watcher if monitoring else None):
        sys.argv = [program, *arguments]
        try:
            if is_module:
                sys.path[0] = ""
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str(Path(program).resolve().parent)
                runpy.run_path(program, run_name="__main__")
        finally:
            if monitoring is not None:
                monitoring.finish()
            print(_summary(), file=sys.stderr)


def build() -> int:
    """Compiles the extension in a process of its own, since one that is loaded already cannot be loaded again."""
    # The same package is to be built, whatever this interpreter was started with (-I, -P).
    program = f"import sys; sys.path[:] = {sys.path!r}\n{BUILD}"
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "FASTCLIP_FORCE": "torch"})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal interrupts the other one too: it stops the compilers
        status = process.wait() and INTERRUPTED
    if status == INTERRUPTED:
        print("fastclip: interrupted; the same command goes on with what is not compiled yet", file=sys.stderr)
    elif status:
        print(
            "fastclip: the extension could not be built, see above. It needs a C++ compiler (Debian: g++), ninja "
            "(pip install ninja), Python's headers (Debian: python3-dev) and, for the CUDA part, nvcc; "
            "FASTCLIP_CUDA=0 leaves that out.",
            file=sys.stderr,
        )
    return status


def _page(path: str) -> Path:
    """A page that can be written, found out before hours of training and not after them."""
    if importlib.util.find_spec("jinja2") is None:
        raise argparse.ArgumentTypeError('a page needs jinja2: pip install "fastclip[health]"')
    page = Path(path).resolve()  # the program may change the working directory
    if page.is_dir() or not page.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {path}")
    return page


def _summary() -> str:
    counts = fastclip.counters()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts["fallback_reasons"].items()))
    return (
        f"fastclip: {counts['calls']} calls, {counts['native']} native, {counts['fallback']} fallback"
        f"{f' ({reasons})' if reasons else ''}, {seconds_spent():.3f} s"
    )


if __name__ == "__main__":
    main()
