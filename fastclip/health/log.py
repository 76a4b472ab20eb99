"""Records as a text file, one JSON object a line, that is only ever appended to.

The first line is ``{"fastclip_monitor": 1, "norm_type": 2.0}``. A line with ``"layer"`` gives a number to a parameter
and stands before the first record that has it, one with ``"module"`` tells the class of a module whose activations are
recorded; both may come again with what has changed. ``{"forget_from": 5}`` takes back the records of steps from 5 on.
Lines with ``"step"`` are records:

    {"step": 7, "total_norm": 1.5, "max_norm": 1.0, "layers": [0, 1, 3], "norm": […], "abs_max": […], "zeros": […]}

``layers`` are numbers of layer lines, -1 for a gradient that is not the model's, and is left out where it is that of
the record before. The columns of ``fastclip.statistics.COLUMNS`` have a list each, left out where all are 0.
``grad_scale``, ``weight_norms`` (by layer number) and ``activations`` (by module name: share saturated, share of zeros)
are there when they were looked at. null stands for NaN, ±1e999 for infinities, so that it is JSON to every reader.
Numbers have as many digits as it takes to read the same float64 again.

Each line is handed to the operating system when it is written, so that a process that is killed loses no line but the
one that it was writing. A last line without its end is not read.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastclip.health.history import Layer
from fastclip.health.recording import Record
from fastclip.statistics import COLUMNS

_FORMAT = 1
_BEGIN = b'{"fastclip_monitor": '  # of every file


class Writer:
    """Appends records to a file that is open for it.

    Args:
        file: binary and without a buffer, so that what is written is the operating system's.
        layers, classes: of the model and of its watched modules; looked at whenever a record is written.
        with_header: the file is new.
    """

    def __init__(self, file: BinaryIO, layers: list[Layer], classes: Mapping[str, str], with_header: bool = True):
        self._file = file
        self._layers = layers
        self._classes = classes
        self._needs_header = with_header
        self._written_layers: dict[int, Layer] = {}
        self._written_classes: set[str] = set()
        self._numbers: tuple[int, ...] | None = None

    def write(self, record: Record, norm_type: float) -> None:
        lines: list[dict] = []
        if self._needs_header:
            lines.append({"fastclip_monitor": _FORMAT, "norm_type": norm_type})
            self._needs_header = False
        for number in dict.fromkeys([*record.numbers, *(record.weight_norms or ())]):
            if number >= 0 and self._written_layers.get(number) != self._layers[number]:
                self._written_layers[number] = replace(self._layers[number])
                lines.append({"layer": number, **asdict(self._layers[number])})
        for name in record.activations:
            if name not in self._written_classes:
                self._written_classes.add(name)
                lines.append({"module": name, "class": self._classes.get(name, "")})
        lines.append(self._line(record))
        self._append("".join(_json(line) + "\n" for line in lines))

    def forget_from(self, step: int) -> None:
        self._append(f'{{"forget_from": {step}}}\n')

    def _append(self, text: str) -> None:
        data = text.encode()
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _line(self, record: Record) -> dict:
        line: dict[str, Any] = {"step": record.step, "total_norm": record.total_norm, "max_norm": record.max_norm}
        if record.numbers != self._numbers:
            line["layers"] = self._numbers = record.numbers
        for name, column in zip(COLUMNS, record.values.t().tolist(), strict=True):
            if any(column):
                line[name] = column if name in ("norm", "abs_max") else list(map(int, column))
        if not math.isnan(record.grad_scale):
            line["grad_scale"] = record.grad_scale
        if record.weight_norms is not None:
            line["weight_norms"] = record.weight_norms
        if record.activations:
            line["activations"] = record.activations
        return line


class Reader:
    """Reads a file, as far as it is whole.

    Args:
        path: the file.
        number: gives each layer that is met the number that records shall have for it.
        forget_from: called with a step where the records of it and later ones do not count any more.
    """

    def __init__(self, path: str | os.PathLike, number: Callable[[Layer], int], forget_from: Callable[[int], None]):
        self.path = path
        self.norm_type: float | None = None
        self.classes: dict[str, str] = {}  # of modules whose activations were watched
        self.end = 0  # of the last whole line, in bytes
        self._number = number
        self._forget_from = forget_from
        self._numbers: dict[int, int] = {-1: -1}  # number in the file -> number

    def records(self) -> Iterator[Record]:
        in_file: tuple[int, ...] = ()
        with open(self.path, "rb") as file:
            for count, raw in enumerate(file, 1):
                is_whole = raw.endswith(b"\n")
                if not is_whole and (self.norm_type is not None or _BEGIN.startswith(raw[: len(_BEGIN)])):
                    return  # the process was killed while it wrote this
                record = None
                try:
                    line = json.loads(raw)
                    if "step" in line and self.norm_type is not None:
                        in_file = tuple(line.get("layers", in_file))
                        record = self._record(line, in_file)
                    else:
                        self._read_other(line)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"path: expected a monitor's file, got {str(self.path)!r}, whose line {count} is not of such a "
                        f"file ({type(error).__name__}: {error})"
                    ) from error
                self.end += len(raw)
                if record is not None:
                    yield record

    def _read_other(self, line: dict) -> None:
        if self.norm_type is None:
            if line.get("fastclip_monitor") != _FORMAT:
                raise ValueError(f'expected "fastclip_monitor": {_FORMAT}')
            self.norm_type = float(line["norm_type"])
        elif "layer" in line:
            number = line.pop("layer")
            self._numbers[number] = self._number(Layer(**{**line, "shape": tuple(line["shape"])}))
        elif "module" in line:
            self.classes[line["module"]] = line["class"]
        elif "forget_from" in line:
            self._forget_from(line["forget_from"])

    def _record(self, line: dict, in_file: tuple[int, ...]) -> Record:
        nothing = [0.0] * len(in_file)
        columns = [[_number(x) for x in line.get(name, nothing)] for name in COLUMNS]
        weights = line.get("weight_norms")
        return Record(
            step=int(line["step"]),
            numbers=tuple(self._numbers[number] for number in in_file),
            values=torch.tensor(columns, dtype=torch.float64).t().contiguous(),
            total_norm=_number(line["total_norm"]),
            max_norm=_number(line["max_norm"]),
            grad_scale=_number(line.get("grad_scale")),
            weight_norms=None if weights is None else {self._numbers[int(n)]: _number(x) for n, x in weights.items()},
            activations={name: (_number(a), _number(b)) for name, (a, b) in line.get("activations", {}).items()},
        )


def write_whole(
    path: str | os.PathLike,
    records: Iterable[Record],
    layers: list[Layer],
    classes: Mapping[str, str],
    norm_type: float,
) -> None:
    """Writes a file of these records; one that was there is replaced only by a whole one."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write((_json({"fastclip_monitor": _FORMAT, "norm_type": norm_type}) + "\n").encode())
            writer = Writer(file, layers, classes, with_header=False)
            for record in records:
                writer.write(record, norm_type)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _number(x: float | None) -> float:
    return math.nan if x is None else float(x)


def _json(value: object) -> str:
    """JSON in which null is NaN and 1e999 infinity; Python's own would write words that are no JSON."""
    text = json.dumps(value)
    if "NaN" in text or "Infinity" in text:  # also when it is a name that has the word
        return _json_of_parts(value)
    return text


def _json_of_parts(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_json_of_parts(x)}" for key, x in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_json_of_parts, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null" if math.isnan(value) else f"{'-' if value < 0 else ''}1e999"
    return json.dumps(value)
