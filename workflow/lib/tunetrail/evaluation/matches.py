"""Everyone against everyone: pairs, strengths and win rates at equal lengths, from outcomes prompt by prompt.

An outcome is 1 where the first of a pair wins, 0 where the second does, one half for a tie, NaN where it is not known;
of several samples of a prompt it is the mean over their pairs.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.special import expit

from tunetrail.evaluation.stats import bootstrap_of, holm, mean_of, minimum_detectable, sign_flip_p, tally

Outcomes = dict[tuple[str, str], np.ndarray]
"""(first, second) -> [n]."""

NEWTON_STEPS, LONGEST_STEP = 30, 1.0
LENGTH_PENALTY = 0.01
"""On both coefficients: finite where one side wins everything. Where all gaps are much alike nothing else would tell
one coefficient from the other; `has_equal_lengths` is what keeps such data away.
"""
LEAST_SHARE = 0.05
"""Of prompts on which the first is no longer, and on which it is no shorter: else equal lengths are not in the data."""


def pairs_of(subjects: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair; first is the one that comes later in the pipeline."""
    return [(second, first) for first, second in combinations(subjects, 2)]


def bradley_terry(wins: np.ndarray, reference: int, prior: float = 0.5) -> np.ndarray:
    """Strengths s in log-odds, sigmoid(s_i - s_j) being the chance that i beats j (Bradley and Terry 1952).

    The maximum of the likelihood by Newton's method.

    Args:
        wins: [B, K, K], of i over j, a tie one half to each.
        reference: index of the one whose strength is 0.
        prior: added to the wins of both sides of every pair, as one tie more is: without it the strength of who never
            lost would be infinite.

    Returns:
        [B, K].
    """
    k = wins.shape[-1]
    wins = wins + prior * (1 - np.eye(k))
    games = wins + wins.swapaxes(-1, -2)
    free = np.arange(k) != reference
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(NEWTON_STEPS):
        chance = expit(strengths[..., :, None] - strengths[..., None, :])
        gradient = (wins - games * chance).sum(-1)
        curvature = games * chance * (1 - chance)
        laplacian = curvature.sum(-1)[..., None] * np.eye(k) - curvature
        step = np.linalg.solve(laplacian[..., free, :][..., free], gradient[..., free, None])[..., 0]
        strengths[..., free] += step.clip(-LONGEST_STEP, LONGEST_STEP)
        if np.abs(step).max() < 1e-10:
            break
    return strengths


def has_equal_lengths(gap: np.ndarray) -> bool:
    """Whether a gap of 0 lies among [n] gaps; outside them the win rate at equal lengths would be a guess."""
    return min((gap <= 0).mean(), (gap >= 0).mean()) >= LEAST_SHARE


def length_controlled(outcome: np.ndarray, gap: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The win rate there would be were both responses equally long (Dubois et al. 2024, eq. 1 without instructions).

    Logistic regression of the outcome on tanh(gap / its standard deviation); the win rate at a gap of 0.

    Args:
        outcome: [n].
        gap: [n], first's length less second's.
        counts: [B, n], how often each prompt was drawn.

    Returns:
        [B, 1].
    """
    scale = gap.std()
    x = np.stack([np.ones(len(gap)), np.tanh(gap / scale) if scale else np.zeros(len(gap))])  # [2, n]
    squares = (x[:, None] * x[None]).reshape(4, -1)
    coefficients = np.zeros((len(counts), 2))
    for _ in range(NEWTON_STEPS):
        chance = expit(coefficients @ x)
        gradient = (counts * (outcome - chance)) @ x.T - LENGTH_PENALTY * coefficients
        hessian = ((counts * chance * (1 - chance)) @ squares.T).reshape(-1, 2, 2) + LENGTH_PENALTY * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        coefficients += step.clip(-LONGEST_STEP, LONGEST_STEP)
        if np.abs(step).max() < 1e-8:
            break
    return expit(coefficients[:, :1])


def family(second: str, reference: str) -> str:
    """What a pair is corrected together with: all against base, all against the reference, or policies among
    themselves.
    """
    return second if second in ("base", reference) else "policies"


def tests_of(told: Outcomes, groups: Mapping[tuple[str, str], np.ndarray], reference: str, seed: int) -> dict:
    """What is tested of every pair, with its p-value corrected within its family.

    Args:
        told: outcomes that are known.
        groups: the group of each of them.
    """
    families: dict[str, list[tuple[str, str]]] = {}
    for pair in told:
        families.setdefault(family(pair[1], reference), []).append(pair)
    p_values = {pair: sign_flip_p(outcome, groups[pair], seed) for pair, outcome in told.items()}
    return {
        pair: {
            "p": p_values[pair],
            "p_holm": corrected,
            "significant": corrected < 0.05,
            "minimum_detectable": minimum_detectable(told[pair], groups[pair], len(members)),
        }
        for members in families.values()
        for pair, corrected in zip(members, holm([p_values[pair] for pair in members]), strict=True)
    }


def match(
    subjects: Sequence[str],
    reference: str,
    outcome_of: Outcomes,
    lengths: Mapping[str, Sequence[float]],
    groups: Sequence[Hashable],
    n_resamples: int,
    seed: int,
    scores: Mapping[str, Sequence[float]] | None = None,
) -> dict:
    """A match as `stages.head_to_head` describes it, less its tie.

    Args:
        outcome_of: of `pairs_of(subjects)`, each with an outcome that is known.
        lengths: [n] of each subject.
        groups: [n], the source group of each prompt.
        scores: [n] of each subject, whose differences are measured too.
    """
    known = {pair: ~np.isnan(outcome) for pair, outcome in outcome_of.items()}
    told = {pair: outcome[known[pair]] for pair, outcome in outcome_of.items()}
    group = np.array([str(g) for g in groups])
    tested = tests_of(told, {pair: group[known[pair]] for pair in told}, reference, seed)
    gaps = {(a, b): np.subtract(lengths[a], lengths[b])[known[a, b]] for a, b in outcome_of}
    by_length = [pair for pair in outcome_of if has_equal_lengths(gaps[pair])]
    plays = reference in subjects and len(subjects) > 1

    def everything(counts: np.ndarray) -> np.ndarray:
        """[B, P + C + D + K]: win rates, those at equal lengths, differences of scores, strengths; the resamples are
        drawn once for all.
        """
        controlled = [length_controlled(told[pair], gaps[pair], counts[:, known[pair]]) for pair in by_length]
        found = [strengths(subjects, reference, outcome_of, counts)] if plays else []
        win_rates = rates(np.stack(list(outcome_of.values()), 1), counts)
        return np.concatenate([win_rates, *controlled, *(d(counts) for d in differences), *found], 1)

    differences = [mean_of(np.subtract(scores[a], scores[b])) for a, b in outcome_of] if scores else []
    intervals = iter(bootstrap_of(everything, groups, n_resamples, seed))
    win_rates, controlled, gained = (
        {pair: next(intervals) for pair in pairs} for pairs in (outcome_of, by_length, outcome_of if scores else ())
    )

    def row(pair: tuple[str, str]) -> dict:
        mine = group[known[pair]]
        counted = {"n": len(mine), "groups": len(set(mine))}
        return {
            "first": pair[0],
            "second": pair[1],
            "family": family(pair[1], reference),
            "win_rate": win_rates[pair] | counted | tally(told[pair]),
            "difference": gained.get(pair),
            "length_controlled": controlled[pair] | counted if pair in controlled else None,
        } | tested[pair]

    return {
        "prompts": len(groups),
        "groups": len(set(groups)),
        "pairs": [row(pair) for pair in outcome_of],
        "scores": [{"name": name, "score": next(intervals)} for name in subjects] if plays else [],
    }


def rates(outcome: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[B, P]: win rates over what is known of outcomes [n, P], from how often each prompt was drawn [B, n]."""
    known = ~np.isnan(outcome)
    with np.errstate(invalid="ignore"):  # 0/0 where nothing known was drawn
        return counts @ np.where(known, outcome, 0) / (counts @ known)


def strengths(subjects: Sequence[str], reference: str, outcome_of: Outcomes, counts: np.ndarray) -> np.ndarray:
    """[B, K]: Bradley-Terry strengths, from outcomes [n] and how often each prompt was drawn [B, n]."""
    k, place = len(subjects), {name: i for i, name in enumerate(subjects)}
    wins = np.zeros((len(counts), k, k))
    for (first, second), outcome in outcome_of.items():
        wins[:, place[first], place[second]] = counts @ np.nan_to_num(outcome)
        wins[:, place[second], place[first]] = counts @ np.nan_to_num(1 - outcome)
    return bradley_terry(wins, place[reference])
