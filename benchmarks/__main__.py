"""Measures fastclip against torch and others.

python -m benchmarks [run] [--quick] [--part NAME ...] [--case TEXT] [--device cpu|cuda] [--threads N] [--strict]
python -m benchmarks report a.json [b.json ...] -o report.html
python -m benchmarks compare old.json new.json
"""

import argparse
import math
import sys
from pathlib import Path

import torch

import fastclip
from benchmarks import compare, results, table
from benchmarks.clocks import is_a_card
from benchmarks.gradients import WrongResult
from benchmarks.measure import Effort


def parser() -> argparse.ArgumentParser:
    from benchmarks.run import CPU_PARTS

    made = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure (the default)")
    one.add_argument("--quick", action="store_true", help="under 90 seconds: shows that everything runs")
    one.add_argument("--part", action="append", choices=CPU_PARTS, metavar="NAME", help=f"of {', '.join(CPU_PARTS)}")
    one.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name contains TEXT")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    one.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    one.add_argument("--effort", type=factor, default=1.0, metavar="X", help="X times as long for every case")
    one.add_argument("--budget", type=float, default=math.inf, metavar="S", help="start no new case after S seconds")
    one.add_argument("--strict", action="store_true", help="refuse to measure while others use the machine")
    one.add_argument("--list", action="store_true", help="name the cases and stop")
    one.add_argument("--output", type=Path, default=Path("benchmarks/results/latest"), metavar="PREFIX")
    one.add_argument("--merge", action="store_true", help="keep the parts that OUTPUT.json has and this run has not")
    two = commands.add_parser("report", help="an HTML page of one or several runs")
    two.add_argument("files", nargs="+", type=Path, metavar="a.json")
    two.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    three = commands.add_parser("compare", help="exit 1 when a case got slower: the intervals are disjoint")
    three.add_argument("old", type=Path)
    three.add_argument("new", type=Path)
    three.add_argument("--absolute", action="store_true", help="fastclip's time, not its time in units of torch's")
    return made


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def factor(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = parser().parse_args(arguments)
    try:
        return {"run": _run, "report": _report, "compare": _compare}[options.command](options)
    except results.NotAResult as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from benchmarks import run

    if options.device == "cuda" and not is_a_card():
        print("expected a real CUDA device; found none. Nothing was measured.", file=sys.stderr)
        return run.REFUSED
    if not fastclip.build_info()["native"]:
        print(f"fastclip's extension is missing: {fastclip.build_info()['missing_because']}", file=sys.stderr)
        return run.WRONG
    usual = run.CUDA_PARTS if options.device == "cuda" else run.QUICK_PARTS if options.quick else run.CPU_PARTS
    parts = options.part or usual
    wrong = [part for part in parts if options.device == "cuda" and part not in (*run.CUDA_PARTS, "bytes")]
    if wrong:
        known = ", ".join((*run.CUDA_PARTS, "bytes"))
        print(f"--part: expected one of {known} with --device cuda, got {wrong[0]}", file=sys.stderr)
        return run.NO_CASE
    effort = Effort(options.quick, options.effort)
    steps, left_out = run.plan(parts, options.case, options.device, effort, options.threads)
    if options.list:
        run.list_cases(steps, left_out)
        return run.OK
    if not steps:
        print(f"--case: expected a part of a case's name (see --list), got {options.case!r}", file=sys.stderr)
        return run.NO_CASE
    json_file = options.output.with_suffix(".json")
    old = results.load(json_file) if options.merge and json_file.exists() else None
    try:
        report = run.run(steps, left_out, options.device, effort, options.threads, options.strict, options.budget)
    except KeyboardInterrupt:
        print("Interrupted. Nothing was written.", file=sys.stderr)
        return 130
    except run.Disturbed as disturbed:
        print(f"--strict: {disturbed}. Nothing was written.", file=sys.stderr)
        return run.REFUSED
    except WrongResult as wrong:
        print(f"Wrong result: {wrong}. Nothing was written.", file=sys.stderr)
        return run.WRONG
    if old:
        report = results.merge(old, report)
    results.save(report, json_file)
    options.output.with_suffix(".md").write_text(table.document(report))
    seconds = ", ".join(f"{part} {spent:.0f}" for part, spent in report["seconds"].items())
    print(f"Written: {json_file}, {options.output.with_suffix('.md')} (seconds: {seconds})", file=sys.stderr)
    return run.OK


def _report(options: argparse.Namespace) -> int:
    reports = [(path.stem, results.load(path)) for path in options.files]
    try:
        from benchmarks.report import page
    except ImportError as error:
        print(f"{error}: `report` needs matplotlib and jinja2: pip install fastclip[bench]", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(reports))
    print(f"Written: {options.output}", file=sys.stderr)
    return 0


def _compare(options: argparse.Namespace) -> int:
    changes, notes = compare.compare(results.load(options.old), results.load(options.new), options.absolute)
    for note in notes:
        print(note)
    if not changes:
        print("expected cases that both runs have; found none", file=sys.stderr)
        return 2
    unit = "us" if options.absolute else "of torch's time"
    head = ["case", f"old ({unit})", f"new ({unit})", "factor", "verdict"]
    spelled = [
        [c.name, *("{:.3g} ({:.3g}-{:.3g})".format(*f) for f in (c.old, c.new)), f"{c.factor:.2f}", c.verdict]
        for c in changes
    ]
    print(table.markdown(table.Table("", head, spelled)))
    slower = [c for c in changes if c.verdict == "slower"]
    print(f"{len(slower) or 'None'} of {len(changes)} cases got slower.")
    disturbed = [c.name for c in slower if c.disturbed]
    if disturbed:
        print(f"Others used the machine while these were measured, measure them again: {'; '.join(disturbed)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
