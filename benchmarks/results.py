"""The file that a run leaves: plain JSON, every sample in it, one list of numbers a line."""

import hashlib
import json
import re
from pathlib import Path

FORMAT = 2


class NotAResult(Exception):
    """A file is not one of this harness's results; the message names it."""


def save(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **report}, indent=1, allow_nan=False)
    # Lists of numbers on one line: a run has tens of thousands of samples.
    text = re.sub(r"\[\s+(-?[\d.e+-]+(?:,\s+-?[\d.e+-]+)*)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    path.write_text(text + "\n")


def load(path: Path) -> dict:
    try:
        report = json.loads(Path(path).read_text())
    except OSError as error:
        raise NotAResult(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise NotAResult(f"{path}: expected JSON: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        found = report.get("format") if isinstance(report, dict) else type(report).__name__
        raise NotAResult(f"{path}: expected a result of `python -m benchmarks run` of format {FORMAT}, got {found}")
    return report


def of_part(report: dict, *parts: str) -> list[dict]:
    return [row for row in report["results"] if row["part"] in parts]


def key(row: dict) -> tuple:
    """What makes two rows of different runs comparable."""
    return row["part"], row["case"], row["mode"], row.get("device", "cpu"), row.get("threads")


def merge(old: dict, new: dict) -> dict:
    """The new run, and of the old one the parts that the new one did not measure."""
    parts = {row["part"] for row in new["results"]}
    kept = [row for row in old["results"] if row["part"] not in parts]
    return {
        **new,
        "results": [*new["results"], *kept],
        "seconds": {**old["seconds"], **new["seconds"]},
        "absent": {**old["absent"], **new["absent"]},
        "left_out": list(dict.fromkeys([*new["left_out"], *old["left_out"]])),
    }


def digest(data: object) -> str:
    """A short name of plain data: what was made of it carries it, so that it can be told when it is out of date."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
