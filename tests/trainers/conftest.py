"""Trainers at rest: no hub, no telemetry, nothing written outside the test's own folder, no state left behind."""

import os

import pytest

# Read when the packages are imported, so set before pytest collects the tests that import them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
