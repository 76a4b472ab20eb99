"""What a run shows: a table that grows and a bar, with rich on a terminal; a line a case without."""

import sys
from collections import deque

from benchmarks import table

SHOWN = 12  # rows of the growing table


class Plain:
    """To stderr, line by line; the tables come at the end, as Markdown, to stdout."""

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin(self, name: str) -> None:
        self.done += 1
        self.note(f"[{self.done}/{self.steps}] {name}")

    def row(self, row: dict) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(self, report: dict) -> None:
        print(table.document(report))


class Rich:
    def __init__(self, steps: int):
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=steps)
        self.latest: deque[list[str]] = deque(maxlen=SHOWN)
        self.group = Group
        self.live = Live(console=self.console, transient=True, refresh_per_second=2)
        self.begun = False

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *details):
        self.live.__exit__(*details)

    def begin(self, name: str) -> None:
        if self.begun:
            self.progress.advance(self.task)
        self.begun = True
        self.progress.update(self.task, description=name)
        self._show()

    def row(self, row: dict) -> None:
        ours = row.get("median_us", {}).get(row.get("ours"))
        shown = [row["part"], row["case"], row["mode"], "" if ours is None else table.duration(ours)]
        self.latest.append([*shown, table.times(row["speedup"]) if "speedup" in row else ""])
        self._show()

    def _show(self) -> None:
        head = ["part", "case", "", "fastclip", "speed-up"]
        self.live.update(self.group(_rich_table(table.Table("", head, list(self.latest))), self.progress))

    def note(self, text: str) -> None:
        self.live.console.print(text, style="yellow", markup=False, highlight=False)

    def finish(self, report: dict) -> None:
        from rich.console import Console

        console = Console()
        console.print(table.on_what(report), markup=False)
        for one in table.tables(report):
            console.print(_rich_table(one))
            console.print(one.note, markup=False, style="dim")
        for title, lines in table.asides(report):
            for i, line in enumerate(lines):
                console.print(f"{title}:" if i == 0 else "", f"  {line}", sep="\n" if i == 0 else "", markup=False)


def _rich_table(one: table.Table):
    from rich.table import Table
    from rich.text import Text

    made = Table(title=one.title or None)
    for i, name in enumerate(one.head):
        made.add_column(Text(name), no_wrap=i < 2, justify="left" if i < 2 else "right")
    for row in one.rows:
        made.add_row(*map(Text, row))
    return made


def choose(steps: int) -> Plain | Rich:
    """Rich where there is a terminal and the package; otherwise plain."""
    if not sys.stderr.isatty() or not sys.stdout.isatty():
        return Plain(steps)
    try:
        return Rich(steps)
    except ImportError:
        return Plain(steps)
