"""Ranks and agreement as small pure functions: 1 is best, equal ranks are ties, and ranks have no gaps (1, 2, 2, 3)."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tunetrail.preferences.rows import Ranking
from tunetrail.seeds import derive_seed


def ranks_from_scores(scores: Sequence[float], tie: float = 0.0) -> list[int]:
    """Dense ranks of scores, the highest score first.

    From the highest score down, a new rank begins when the gap to the *first* member of the current group exceeds
    `tie`. So all members of a tie are within `tie` of each other, and a chain of small gaps cannot tie the best with
    the worst.

    >>> ranks_from_scores([10, 40, 38, 36], tie=3)
    [3, 1, 1, 2]
    """
    ranks = [0] * len(scores)
    rank, first = 0, float("inf")
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if rank == 0 or first - scores[i] > tie:
            rank, first = rank + 1, scores[i]
        ranks[i] = rank
    return ranks


def dense(ranks: Sequence[float]) -> list[int]:
    """The same order and ties, in ranks without gaps.

    >>> dense([5, 2, 2])
    [2, 1, 1]
    """
    return ranks_from_scores([-r for r in ranks])


def gapless(ranks: Sequence[int]) -> bool:
    """Whether ranks are 1, 2, …, with ties but without gaps."""
    return set(ranks) == set(range(1, len(set(ranks)) + 1))


def pair_outcomes(ranks: Sequence[float]) -> np.ndarray:
    """Outcomes of all pairs i < j, [K(K-1)/2]: 1 if i is better, -1 if j is, 0 for a tie."""
    r = np.asarray(ranks)
    i, j = np.triu_indices(len(r), k=1)
    return np.sign(r[j] - r[i])


def agreements(ours: Sequence[int], theirs: Sequence[int], decided: bool = False) -> np.ndarray:
    """Whether two rankings agree on each pair of completions.

    Args:
        ours, theirs: ranks [K].
        decided: leave out pairs that either ranking ties.

    Returns:
        1 for the same outcome (including two ties), 0 for opposite outcomes, one half if only one of them is a tie.
    """
    a, b = pair_outcomes(ours), pair_outcomes(theirs)
    same = 1 - np.abs(a - b) / 2
    return same[(a != 0) & (b != 0)] if decided else same


def pairwise_agreement(rankings: Sequence[Sequence[Sequence[int]]]) -> float | None:
    """How often two labelers agree on a pair of completions.

    Args:
        rankings: the ranks that each labeler gave to each row, [rows][labelers][K].

    Returns:
        The mean of `agreements` over all pairs of completions and of labelers; None if no row has two labelers.
    """
    agreed = [agreements(a, b) for labelers in rankings for a, b in combinations(labelers, 2)]
    return float(np.concatenate(agreed).mean()) if agreed else None


def generator(*key: object) -> np.random.Generator:
    """Random numbers that depend on the key alone, not on the order of rows or on sharding."""
    return np.random.default_rng(derive_seed(*key))


def simulated_rankings(
    scores: Sequence[float], row_id: str, kind: str, *, labelers: int, noise: float, tie: float, seed: int
) -> list[Ranking]:
    """Rankings of one row by labelers who see the true scores [K], each with their own noise.

    Each labeler adds Gaussian noise with standard deviation `noise` to each score, so wider gaps cause fewer errors.
    Its random numbers depend only on (seed, its name, row_id).
    """
    rankings: list[Ranking] = []
    for n in range(labelers):
        name = f"{kind}-{n}"
        random = generator(seed, name, row_id)
        seen = [float(s) for s in np.asarray(scores) + noise * random.standard_normal(len(scores))]
        rankings.append(
            {
                "labeler": name,
                "ranks": ranks_from_scores(seen, tie),
                "order": random.permutation(len(scores)).tolist(),
                "time": None,
                "scores": seen,
            }
        )
    return rankings
