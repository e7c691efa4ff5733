"""Labels: what a labeler returns, and the single answers of people that the ranking page stores."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeGuard, TypeVar

from tunetrail.config.comparisons import SimulatedLabeler
from tunetrail.preferences.ranks import simulated_rankings
from tunetrail.preferences.rows import Ranking, SampledRow


@dataclass
class Labels:
    """The rankings of some rows and what else the labeler knows about them."""

    rankings: list[list[Ranking]]
    """The rankings of each row; empty if the row was left out."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Added to the stage's metrics."""
    source: dict[str, Any] = field(default_factory=dict)
    """Where the labels come from (file, model, endpoint), for the provenance record."""


def ranked_by_scores(
    rows: Sequence[SampledRow], scores: Sequence[float], config: SimulatedLabeler, seed: int
) -> list[list[Ranking]]:
    """The rankings of each row by simulated labelers.

    Args:
        scores: of all completions, row by row.
    """
    remaining = iter(scores)
    return [
        simulated_rankings(
            [next(remaining) for _ in row["completions"]],
            row["id"],
            config.labeler,
            labelers=config.labelers,
            noise=config.noise,
            tie=config.tie,
            seed=seed,
        )
        for row in rows
    ]


class _Answer(TypedDict):
    task: str
    """The task's id."""
    kind: str
    """ranking or demonstration."""
    labeler: str
    """A pseudonym."""
    ratings: list[int | None] | None
    """[K], from 1 to 7 if the labeler rated."""
    flags: list[list[str]]
    """[K], keys of `answers.FLAGS`."""
    all_bad: bool
    comment: str
    text: str | None
    """The answer that was written; None for rankings and skips."""
    shown: list[int]
    """[K], the order in which the completions were shown."""
    seconds: float
    repeat: bool
    """The labeler had answered this task before."""
    gold: bool
    """The task's ranking was known."""
    training: bool
    """A gold task whose solution was shown afterwards."""
    skipped: str | None
    """Why the task was skipped, a key of `answers.REASONS`."""
    at: str
    """UTC, in ISO 8601."""
    event: int
    """The number of the event that stores it."""


class Label(_Answer):
    """A current answer of one person to one task: a line of `labels.jsonl`, as `Store.labels` gives it."""

    ranks: list[int] | None
    """[K], 1 is best, in the task's order of completions; None for demonstrations and skips."""


class RankedLabel(_Answer):
    """A label that ranks."""

    ranks: list[int]


AnyLabel = TypeVar("AnyLabel", Label, RankedLabel)


def is_ranking(label: Label | RankedLabel) -> TypeGuard[RankedLabel]:
    return label["kind"] == "ranking" and label["skipped"] is None


def counted(labels: Iterable[Label]) -> list[RankedLabel]:
    """The rankings that become training data: no skips, no gold, no training, no second answer to the same task."""
    return [row for row in labels if is_ranking(row) and not (row["gold"] or row["training"] or row["repeat"])]


def by_task(labels: Iterable[AnyLabel]) -> dict[str, list[AnyLabel]]:
    tasks: dict[str, list[AnyLabel]] = defaultdict(list)
    for row in labels:
        tasks[row["task"]].append(row)
    return dict(tasks)
