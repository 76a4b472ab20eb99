"""One finding of a diagnosis."""

from dataclasses import dataclass, field
from typing import Any

KINDS = ("non-finite", "exploding", "vanishing", "dead", "spike", "always-clipped", "never-clipped")


@dataclass
class Finding:
    """What ``GradientMonitor.diagnose`` found; ``str(finding)`` is one plain sentence.

    Attributes:
        kind: one of ``KINDS``.
        layer: as in ``named_parameters()``; empty where it is about all of them.
        evidence: numbers and steps, ready for JSON.
        remedy: what helps, a plain sentence.
        severity: findings are sorted by it, worst first.
        sentence: kind, layer and evidence in one plain sentence.
    """

    kind: str
    layer: str
    evidence: dict[str, Any]
    remedy: str
    severity: float = 0.0
    sentence: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.sentence
