"""A reward model's accuracy on held-out pairs, its calibration, and the most that labelers' agreement allows."""

from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal, TypedDict

import numpy as np

from tunetrail.evaluation.schema import Interval
from tunetrail.evaluation.stats import bootstrap, bootstrap_of, expected_calibration_error, spearman
from tunetrail.preferences.pairs import decided_pairs, preference_targets
from tunetrail.preferences.ranks import agreements, pair_outcomes


class HeldOutPair(TypedDict):
    """A pair that one labeler decided: a line of `pairs.jsonl`."""

    id: str
    """The id of the comparison row."""
    group: str
    source: str
    labeler: str
    margin: float
    """The score of the preferred response less that of the other."""
    longer: int
    """How many characters longer the preferred response is."""
    probe: float | None
    """The margin by the linear probe; None for an imported model, since no probe is fitted for it."""


class Bin(TypedDict):
    """A bin of the reliability diagram, with a 95% interval of its accuracy."""

    low: float
    high: float
    confidence: float
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    n: int


class Ceiling(TypedDict):
    """The accuracy that labelers' agreement allows."""

    labelers: int
    agreement: Interval | None
    """How often two labelers agree on a pair that both of them decided."""
    majority: Interval | None
    """How often a labeler agrees with the majority of the others."""
    at_most: Interval | None
    """An upper bound on the accuracy of a perfect model if labelers err independently; it is reached if they err
    equally often on every pair. Null if they agree on fewer than half of the pairs."""


def heldout_pairs(
    rows: list[dict], scores: list[np.ndarray], probe: list[np.ndarray] | None, sources: dict[str, str]
) -> list[HeldOutPair]:
    """One row for each pair and each labeler who decided it.

    Args:
        scores, probe: [K] per row, by the reward model and by the linear probe.
        sources: row id -> the source of the data that it came from.
    """
    pairs: list[HeldOutPair] = []
    probes: list[np.ndarray | None] = [*probe] if probe else [None for _ in rows]
    for row, score, baseline in zip(rows, scores, probes, strict=True):
        for ranking in row["rankings"]:
            for winner, loser in decided_pairs(preference_targets([ranking])):
                margin = float(score[winner] - score[loser])
                longer = len(row["completions"][winner]) - len(row["completions"][loser])
                pairs.append(
                    {
                        "id": row["id"],
                        "group": row["group"],
                        "source": sources[row["id"]],
                        "labeler": ranking["labeler"],
                        "margin": margin,
                        "longer": longer,
                        "probe": None if baseline is None else float(baseline[winner] - baseline[loser]),
                    }
                )
    return pairs


BASELINES: dict[str, tuple[Literal["longer", "probe"], int]] = {
    "longer_wins": ("longer", 1),
    "shorter_wins": ("longer", -1),
    "probe": ("probe", 1),
}
"""Baseline that a reward model must beat -> (the value that decides a pair, its sign)."""


def right(pairs: list[HeldOutPair], key: Literal["margin", "longer", "probe"], sign: int = 1) -> np.ndarray:
    """[n]: 1 where `key` favours the preferred response, 0 where it favours the other, one half where it is 0."""
    values = sign * np.array([pair[key] for pair in pairs])
    return np.where(values == 0, 0.5, values > 0)


def units(pairs: list[HeldOutPair]) -> list[str]:
    """The units to resample, whose pairs depend on one another: source groups, or prompts if there is only one
    group."""
    groups = [pair["group"] for pair in pairs]
    return groups if len(set(groups)) > 1 else [pair["id"] for pair in pairs]


def over_groups(values: np.ndarray, pairs: list[HeldOutPair], seed: int) -> Interval | None:
    """The mean of one value per pair, with an interval over source groups; None if there are no pairs."""
    return bootstrap(values, 2000, seed, groups=units(pairs))  # type: ignore[return-value]


def ceiling(rows: list[dict], seed: int) -> Ceiling | None:
    """How often labelers agree with each other and with the majority of the others, and an upper bound on how often a
    perfect model agrees with one of them. None for a single labeler.

    Two labelers who are each right on a pair with probability p agree on it with probability a = p² + (1 - p)², so a
    perfect model agrees with either of them with probability p = (1 + sqrt(2a - 1)) / 2. This is concave in a, so at
    the mean agreement it is an upper bound (Jensen); it is the looser the more pairs differ in difficulty. Agreement
    with the majority of the others is a lower bound.

    Args:
        rows: comparison rows.
    """
    agreeing: list[tuple[str, float]] = []
    majorities: list[tuple[str, float]] = []
    for row in rows:
        rankings = [ranking["ranks"] for ranking in row["rankings"]]
        agreeing += [(row["id"], same) for a, b in combinations(rankings, 2) for same in agreements(a, b, decided=True)]
        outcomes = np.array([pair_outcomes(ranks) for ranks in rankings])  # [labelers, pairs]
        for own in outcomes:
            votes = np.sign(outcomes.sum(0) - own)
            # A split vote (0) counts as a coin toss.
            majorities += [
                (row["id"], (1 + vote * outcome) / 2) for vote, outcome in zip(votes, own, strict=True) if outcome
            ]
    if not agreeing:
        return None

    def over_prompts(values: list[tuple[str, float]]) -> Interval | None:
        return bootstrap([value for _, value in values], 2000, seed, groups=[i for i, _ in values])  # type: ignore[return-value]

    labelers = {ranking["labeler"] for row in rows for ranking in row["rankings"]}
    agreement = over_prompts(agreeing)
    return {
        "labelers": len(labelers),
        "agreement": agreement,
        "majority": over_prompts(majorities),
        "at_most": most_accurate(agreement),
    }


def most_accurate(agreement: Interval | None) -> Interval | None:
    """The bound on p from the interval of a, see `ceiling`; ends below one half become one half."""
    if agreement is None or agreement["mean"] < 0.5:
        return None
    return agreement | {  # type: ignore[return-value]
        end: (1 + max(0.0, 2 * agreement[end] - 1) ** 0.5) / 2 for end in ("mean", "low", "high")
    }


def reliability(pairs: list[HeldOutPair], seed: int, bins: int = 20) -> dict[str, Any]:
    """The expected calibration error and the bins of the reliability diagram, with intervals over `units`.

    The error is a mean of absolute values: with few pairs it is above 0 even for a calibrated model, and its resamples
    are higher still. By the triangle inequality it differs from the true error by at most the sum of the deviations of
    the bins' gaps from their true values. The interval uses the 97.5th percentile of that sum over resamples; it
    reaches 0 if nothing speaks against calibration.
    """
    margins = np.array([pair["margin"] for pair in pairs])
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correct = np.where(margins == 0, 0.5, margins > 0)
    ece, rows = expected_calibration_error(confidence.tolist(), correct.tolist(), bins)
    if ece is None:
        return {"accuracy_by_confidence": [], "ece": None, "ece_interval": None}
    unit = units(pairs)
    bin_of = np.array([next(i for i, row in enumerate(rows) if p <= row["high"]) for p in confidence])
    for i, row in enumerate(rows):
        in_bin = np.flatnonzero(bin_of == i)
        interval = bootstrap(correct[in_bin], 2000, seed, groups=[unit[j] for j in in_bin]) or {}
        row |= {f"accuracy_{end}": interval.get(end) for end in ("low", "high")}

    gaps = np.stack([np.where(bin_of == i, confidence - correct, 0) for i in range(len(rows))], 1)  # [pairs, bins]

    def noise(counts: np.ndarray) -> np.ndarray:
        return np.abs(counts @ gaps / counts.sum(1, keepdims=True) - gaps.mean(0)).sum(1, keepdims=True)

    (interval_of_noise,) = bootstrap_of(noise, unit, 2000, seed)
    largest = interval_of_noise["high"]
    return {
        "accuracy_by_confidence": rows,
        "ece": ece,
        "ece_interval": {"mean": ece, "low": max(0.0, ece - largest), "high": ece + largest, "n": len(pairs)},
    }


def evaluate(pairs: list[HeldOutPair], seed: int) -> dict[str, Any]:
    """Accuracy by labeler, source, length and confidence; calibration; the baselines, and how much better the model is
    than each on the same pairs (`gain_over`, paired). Intervals are over source groups.

    `accuracy_by_confidence` is a list of `Bin`; correlations are Spearman's.
    """
    margins = np.array([pair["margin"] for pair in pairs])
    ours = right(pairs, "margin")
    has_probe = all(pair["probe"] is not None for pair in pairs)
    baselines = {
        name: right(pairs, key, sign) for name, (key, sign) in BASELINES.items() if key != "probe" or has_probe
    }

    def accuracy_of(kept: Callable[[HeldOutPair], bool]) -> Interval | None:
        chosen = [pair for pair in pairs if kept(pair)]
        return over_groups(right(chosen, "margin"), chosen, seed)

    def accuracy_by(key: Literal["labeler", "source"]) -> dict[str, Interval | None]:
        return {value: accuracy_of(lambda p, v=value: p[key] == v) for value in sorted({p[key] for p in pairs})}  # type: ignore[misc]

    return {
        "pairs": len(pairs),
        "accuracy": over_groups(ours, pairs, seed),
        **{f"accuracy_{name}": over_groups(theirs, pairs, seed) for name, theirs in baselines.items()},
        "gain_over": {name: over_groups(ours - theirs, pairs, seed) for name, theirs in baselines.items()},
        "accuracy_longer_preferred": accuracy_of(lambda pair: pair["longer"] > 0),
        "accuracy_shorter_preferred": accuracy_of(lambda pair: pair["longer"] < 0),
        "accuracy_by_labeler": accuracy_by("labeler"),
        "accuracy_by_source": accuracy_by("source"),
        "length_correlation_of_margins": spearman(margins, np.array([pair["longer"] for pair in pairs])),
    } | reliability(pairs, seed)
