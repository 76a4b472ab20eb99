"""The command line: ``python -m fastclip run [-m] program [arguments]`` runs any program on fastclip."""

import argparse
import runpy
import sys
from pathlib import Path

import fastclip
from fastclip.patching import seconds_spent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run a program with fastclip under torch.nn.utils")
    run_parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module's name")
    run_parser.add_argument("program")
    run_parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    run(options.program, options.arguments, options.is_module)


def run(program: str, arguments: list[str], is_module: bool) -> None:
    """Runs a script or module as ``__main__``, patched; its exit code and its exceptions are the program's own."""
    with fastclip.patched():
        sys.argv = [program, *arguments]
        try:
            if is_module:
                sys.path[0] = ""
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str(Path(program).resolve().parent)
                runpy.run_path(program, run_name="__main__")
        finally:
            print(_summary(), file=sys.stderr)


def _summary() -> str:
    counts = fastclip.counters()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts["fallback_reasons"].items()))
    return (
        f"fastclip: {counts['calls']} calls, {counts['native']} native, {counts['fallback']} fallback"
        f"{f' ({reasons})' if reasons else ''}, {seconds_spent():.3f} s"
    )


if __name__ == "__main__":
    main()
