"""One finding of a diagnosis."""

from dataclasses import dataclass, field
from typing import Any

KINDS = ("non-finite", "exploding", "vanishing", "dead", "spike", "always-clipped", "never-clipped")


@dataclass
class Finding:
    kind: str  # one of KINDS
    layer: str  # as in named_parameters(); "" where it is about all of them
    evidence: dict[str, Any]  # numbers and steps, ready for JSON
    remedy: str  # a plain sentence
    severity: float = 0.0  # findings are sorted by it, worst first
    sentence: str = field(default="", repr=False)  # kind, layer and evidence in one plain sentence

    def __str__(self) -> str:
        return self.sentence
