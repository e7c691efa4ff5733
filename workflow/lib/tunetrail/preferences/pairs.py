"""Turns rankings into what models learn from: soft targets for the K-wise reward model, and pairs for DPO."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tunetrail.preferences.rows import Ranking


def preference_targets(rankings: Sequence[Ranking]) -> np.ndarray:
    """[K, K] float64: the share of labelers who ranked i above j. Ties count one half, so the diagonal is 0.5."""
    ranks = np.array([ranking["ranks"] for ranking in rankings])  # [labelers, K]
    ours, theirs = ranks[:, :, None], ranks[:, None, :]
    return ((ours < theirs) + 0.5 * (ours == theirs)).mean(0)


def decided_pairs(targets: np.ndarray) -> list[tuple[int, int]]:
    """(winner, loser) of every pair that a majority of labelers decided, the largest majority first.

    Args:
        targets: [K, K] from `preference_targets`.
    """
    pairs = [
        (i, j) if targets[i, j] > 0.5 else (j, i)
        for i, j in combinations(range(len(targets)), 2)
        if targets[i, j] != 0.5
    ]
    return sorted(pairs, key=lambda p: (-targets[p], p))


def widest_pairs(rankings: Sequence[Ranking], limit: int | None) -> list[tuple[int, int]]:
    """At most `limit` (chosen, rejected) pairs of one prompt; those furthest apart in mean rank come first."""
    targets = preference_targets(rankings)
    mean_ranks = np.array([ranking["ranks"] for ranking in rankings]).mean(0)
    pairs = sorted(decided_pairs(targets), key=lambda p: (-(mean_ranks[p[1]] - mean_ranks[p[0]]), p))
    return pairs[:limit]
