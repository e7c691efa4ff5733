"""What a labeler returns."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Labels:
    """The rankings of some rows and what else the labeler has to say."""

    rankings: list[list[dict]]
    """For each row its rankings: {"labeler", "ranks" [K], "order" [K], "time", "scores" [K] or None}."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Goes into the stage's metrics."""
    source: dict[str, Any] = field(default_factory=dict)
    """Where the labels come from (file, model, endpoint), for the provenance record."""
