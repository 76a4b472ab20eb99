"""Monitoring of a program that knows nothing of it: ``python -m fastclip run --monitor page.html``."""

import functools
import sys
from pathlib import Path
from typing import Any

from fastclip.health.discovery import Discovery
from fastclip.health.monitor import GradientMonitor, is_first_rank


class Monitoring:
    """Watches all models of a program; at its end prints the findings, and writes a page for each model.

    Args:
        page: where the page goes; a second model's page has ``-2`` at the end of its name, and so on.
        options: of each ``GradientMonitor``.
    """

    def __init__(self, page: Path, **options: Any):
        self.page = page
        self.watcher = Discovery(functools.partial(GradientMonitor, **options))

    def finish(self) -> None:
        """The program's own exception may be on its way: an error here is told, and does not replace it."""
        if not is_first_rank():  # values are the same on all of them
            return
        if not self.watcher.monitors:
            _say("no gradients of a torch.nn.Module were clipped: nothing to show")
        for place, monitor in enumerate(self.watcher.monitors):
            page = self.page if place == 0 else self.page.with_stem(f"{self.page.stem}-{place + 1}")
            try:
                monitor.close()
                findings = monitor.diagnose()
                _say(f"{self.watcher.names[place]}, {monitor.step} steps: {_count(len(findings))}")
                for finding in findings:
                    print(f"  {finding}\n    {finding.remedy}", file=sys.stderr)
                monitor.report(page)
                _say(f"page written: {page}")
            except Exception as error:
                _say(f"no page for {self.watcher.names[place]}: {error!r}")
                self._save(monitor, page.with_suffix(".jsonl"))

    @staticmethod
    def _save(monitor: GradientMonitor, records: Path) -> None:
        try:
            monitor.save(records)
            _say(f"its records are in {records}; fastclip.GradientMonitor.load reads them")
        except Exception as error:
            _say(f"its records could not be saved either: {error!r}")


def _count(findings: int) -> str:
    return "nothing found" if not findings else "1 finding" if findings == 1 else f"{findings} findings"


def _say(text: str) -> None:
    print(f"fastclip: {text}", file=sys.stderr)
