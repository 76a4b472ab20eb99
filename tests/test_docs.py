"""Every test that docs/semantics.md names exists."""

import re

from support import ROOT


def test_named_tests_exist():
    text = (ROOT / "docs" / "semantics.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 50 and len(named) == len(set(re.findall(r"`(\w+\.py::\w+)`", text)))
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing
