"""Puts the committed results into README.md: ``python -m benchmarks.readme``."""

import json
import re
from pathlib import Path

from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Replaces what stands between ``<!-- table: F.json -->`` and ``<!-- end -->`` by the table of results file F."""
    readme = ROOT / "README.md"

    def table(marker: re.Match) -> str:
        report = json.loads((ROOT / marker[1]).read_text())
        return f"<!-- table: {marker[1]} -->\n{markdown(report)}<!-- end -->"

    readme.write_text(re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", table, readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
