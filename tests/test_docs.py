"""Every test that docs/semantics.md and docs/reliability.md name exists."""

import re

import pytest
from support import ROOT


@pytest.mark.parametrize(("page", "least"), [("semantics.md", 50), ("reliability.md", 15)])
def test_named_tests_exist(page, least):
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > least and len(named) == len(set(re.findall(r"`(\w+\.py::\w+)`", text)))
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing
