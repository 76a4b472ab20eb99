"""What is wrong with a training run, read from its recorded gradients. docs/health-kinds.md explains each kind."""

from fastclip.health.diagnosis.clipping import find_always_clipped, find_never_clipped
from fastclip.health.diagnosis.dead import find_dead
from fastclip.health.diagnosis.exploding import find_exploding
from fastclip.health.diagnosis.nonfinite import find_nonfinite
from fastclip.health.diagnosis.record import Record, check
from fastclip.health.diagnosis.spike import find_spikes
from fastclip.health.diagnosis.vanishing import find_vanishing
from fastclip.health.finding import Finding
from fastclip.health.history import History

__all__ = ["diagnose"]

# Fewer recorded steps than this say nothing about how training goes; a non-finite gradient speaks for itself.
MIN_RECORDS = 10
# Of them this many must be finite: a quarter of a history has to have a median.
MIN_FINITE = 5


def diagnose(history: History) -> list[Finding]:
    """Says which parameters' gradients are unhealthy, and what helps.

    Args:
        history: the recorded steps. It is not changed.

    Returns:
        Findings, worst first; empty for a healthy model. Non-finite gradients are found from one recorded step on, all
        other kinds from ten on. The same history gives the same findings.

    Raises:
        TypeError: ``history`` is no History.
        ValueError: its tensors do not have the shapes that its layers and steps ask for.
    """
    check(history)
    if not history.layers:
        return []
    record = Record(history)
    findings = find_nonfinite(record)
    if len(history.steps) >= MIN_RECORDS and record.finite.sum() >= MIN_FINITE:
        exploding = find_exploding(record)
        vanishing = find_vanishing(record)
        findings += exploding + vanishing + find_dead(record, vanishing)
        # Wild norms and a threshold that always holds follow from exploding gradients: one cause, one finding.
        if not exploding:
            findings += find_spikes(record) + find_always_clipped(record)
        findings += find_never_clipped(record)
    return sorted(findings, key=lambda f: (-f.severity, f.kind, f.layer))
