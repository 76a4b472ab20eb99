"""Whether a case got slower between two runs: ``python -m benchmarks compare old.json new.json``."""

from dataclasses import dataclass

from benchmarks import results

# What has to be the same for times to be comparable.
SAME = ("processor", "cores", "threads", "torch")


@dataclass(frozen=True)
class Change:
    """One case in both runs: the figure is fastclip's time in units of its rival's in the same rounds, or in us."""

    name: str
    old: list[float]  # median, low, high
    new: list[float]
    disturbed: bool = False  # in one of the runs: the interval knows nothing of the other run's neighbours

    @property
    def factor(self) -> float:
        return self.new[0] / self.old[0]

    @property
    def verdict(self) -> str:
        if self.new[1] > self.old[2]:
            return "slower"
        return "faster" if self.new[2] < self.old[1] else "within noise"


def figure(row: dict, absolute: bool) -> list[float]:
    """Median and interval. Relative to the rival, so that a machine that is slower today changes nothing."""
    if absolute:
        return [row["ours_us"]["median"], *row["ours_us"]["interval"]]
    low, high = row["speedup"]["interval"]
    return [1 / row["speedup"]["median"], 1 / high, 1 / low]


def compare(old: dict, new: dict, absolute: bool = False) -> tuple[list[Change], list[str]]:
    """All cases that both have, and what else there is to say: other machines, cases that only one has."""
    before, after = ({results.key(row): row for row in report["results"] if "speedup" in row} for report in (old, new))
    notes = [
        f"{name} differs: {old['machine'].get(name)} and {new['machine'].get(name)}"
        for name in SAME
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    for one, other, which in ((before, after, "old"), (after, before, "new")):
        notes += [f"only in the {which} run: {_name(row)}" for key, row in one.items() if key not in other]
    changes = [
        Change(
            _name(row),
            figure(before[key], absolute),
            figure(row, absolute),
            bool(before[key].get("disturbed") or row.get("disturbed")),
        )
        for key, row in after.items()
        if key in before
    ]
    return changes, notes


def _name(row: dict) -> str:
    return f"{row['case']}, {row['mode']}"
