"""Summary statistics of ranked rows."""

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from tunetrail.preferences.ranks import pair_outcomes, pairwise_agreement
from tunetrail.preferences.rows import ComparisonRow


class RankingCount(TypedDict):
    rankings: int


class Summary(TypedDict):
    """The metrics of ranked rows."""

    prompts: int
    prompts_by_split: dict[str, int]
    completions_per_prompt: float
    rankings: int
    ties: float
    """The share of tied pairs, over all rankings."""
    labelers: dict[str, RankingCount]
    """By pseudonym."""
    agreement: float | None
    """See `ranks.pairwise_agreement`."""
    longer_wins: float | None
    """See `longer_wins`."""


def longer_wins(rows: Sequence[ComparisonRow]) -> float | None:
    """Share of decided pairs in which the longer completion (in characters) is preferred; equal lengths count half."""
    wins = []
    for row in rows:
        longer = pair_outcomes([-len(c) for c in row["completions"]])
        for ranking in row["rankings"]:
            outcomes = pair_outcomes(ranking["ranks"])
            wins.append((1 + outcomes * longer)[outcomes != 0] / 2)
    pooled = np.concatenate(wins)
    return float(pooled.mean()) if len(pooled) else None


def summarize(rows: Sequence[ComparisonRow]) -> Summary:
    rankings = [ranking for row in rows for ranking in row["rankings"]]
    outcomes = np.concatenate([pair_outcomes(ranking["ranks"]) for ranking in rankings])
    return {
        "prompts": len(rows),
        "prompts_by_split": dict(Counter(row["split"] for row in rows)),
        "completions_per_prompt": float(np.mean([len(row["completions"]) for row in rows])),
        "rankings": len(rankings),
        "ties": float((outcomes == 0).mean()),
        "labelers": {name: {"rankings": n} for name, n in Counter(r["labeler"] for r in rankings).items()},
        "agreement": pairwise_agreement([[ranking["ranks"] for ranking in row["rankings"]] for row in rows]),
        "longer_wins": longer_wins(rows),
    }
