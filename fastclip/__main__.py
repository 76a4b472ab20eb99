"""The command line: ``python -m fastclip run [-m] program [arguments]`` runs any program on fastclip."""

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fastclip
from fastclip.patching import seconds_spent

if TYPE_CHECKING:
    from fastclip.health.unattended import Monitoring


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run a program with fastclip under torch.nn.utils")
    run_parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module's name")
    run_parser.add_argument("--monitor", metavar="PAGE.html", type=_page, help="watch the gradients: findings, a page")
    run_parser.add_argument("--every", metavar="K", type=int, default=1, help="watch every K-th step only")
    run_parser.add_argument(
        "--activations", action=argparse.BooleanOptionalAction, default=True, help="watch saturation, with --monitor"
    )
    run_parser.add_argument("program")
    run_parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.every < 1:
        run_parser.error(f"argument --every: expected at least 1, got {options.every}")
    monitoring = None
    if options.monitor:
        from fastclip.health.unattended import Monitoring

        monitoring = Monitoring(options.monitor, every=options.every, activations=options.activations)
    run(options.program, options.arguments, options.is_module, monitoring)


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
