"""How often a reward model is right on held-out pairs, how well it knows that, and what labelers' agreement allows."""

from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal, TypedDict

import numpy as np

from tunetrail.evaluation.schema import Interval
from tunetrail.evaluation.stats import bootstrap, bootstrap_of, expected_calibration_error, spearman
from tunetrail.preferences.pairs import decided_pairs, preference_targets
from tunetrail.preferences.ranks import agreements, pair_outcomes


class HeldOutPair(TypedDict):
    """A pair that one labeler decided, as `pairs.jsonl` has it."""

    id: str
    """Of the comparison row."""
    group: str
    source: str
    labeler: str
    margin: float
    """Score of the preferred response less that of the other."""
    longer: int
    """Characters by which the preferred response is longer."""
    probe: float | None
    """The margin of the linear probe; None for an imported model, which was not trained on pairs like these."""


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
    """What labelers' agreement allows."""

    labelers: int
    agreement: Interval | None
    """How often two labelers who both decide on a pair agree."""
    majority: Interval | None
    """How often a labeler agrees with the majority of the others."""
    at_most: Interval | None
    """A bound on the accuracy of a model without error, if labelers err independently; reached where they err equally
    often on every pair. Null where they agree on fewer than half."""


def heldout_pairs(
    rows: list[dict], scores: list[np.ndarray], probe: list[np.ndarray] | None, sources: dict[str, str]
) -> list[HeldOutPair]:
    """One row per pair and labeler who decided it: who won, by how much the model agrees, who is longer.

    Args:
        scores, probe: [K] of each row, the reward model's and the linear probe's.
        sources: row id -> which of the data's sources it came from.
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
"""What a reward model has to be better than -> (what decides a pair, with which sign)."""


def right(pairs: list[HeldOutPair], key: Literal["margin", "longer", "probe"], sign: int = 1) -> np.ndarray:
    """[n]: 1 where `key` speaks for the preferred response, 0 where it speaks against it, one half where it is 0."""
    values = sign * np.array([pair[key] for pair in pairs])
    return np.where(values == 0, 0.5, values > 0)


def units(pairs: list[HeldOutPair]) -> list[str]:
    """What is resampled, since its pairs depend on one another: the source groups; prompts where there is one group."""
    groups = [pair["group"] for pair in pairs]
    return groups if len(set(groups)) > 1 else [pair["id"] for pair in pairs]


def over_groups(values: np.ndarray, pairs: list[HeldOutPair], seed: int) -> Interval | None:
    """Mean of one value per pair with its interval over source groups; None for no pairs."""
    return bootstrap(values, 2000, seed, groups=units(pairs))  # type: ignore[return-value]


def ceiling(rows: list[dict], seed: int) -> Ceiling | None:
    """How often labelers agree with one another and with the majority of the others, and at most how often a model that
    is always right agrees with one of them. None with a single labeler.

    Two labelers who are right on a pair with probability p agree on it with a = p² + (1 - p)², a model that is always
    right agrees with either with p = (1 + sqrt(2a - 1)) / 2. That is concave in a: taken at the mean agreement it is an
    upper bound (Jensen), and too high by as much as pairs differ in difficulty. The majority of the others bounds it
    from below.

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
            # A split vote says nothing and counts as a coin toss.
            majorities += [(row["id"], (1 + vote * mine) / 2) for vote, mine in zip(votes, own, strict=True) if mine]
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
    """The bound on p from the interval of a, see `ceiling`; ends below one half are one half."""
    if agreement is None or agreement["mean"] < 0.5:
        return None
    return agreement | {  # type: ignore[return-value]
        end: (1 + max(0.0, 2 * agreement[end] - 1) ** 0.5) / 2 for end in ("mean", "low", "high")
    }


def reliability(pairs: list[HeldOutPair], seed: int, bins: int = 20) -> dict[str, Any]:
    """Expected calibration error and the bins of the diagram, with intervals over prompts.

    The error is a mean of absolute values. With few pairs it lies above 0 even for a calibrated model, and its
    resamples lie higher still. By the triangle inequality it differs from the true error by no more than the summed
    deviations of the bins' gaps from theirs; the interval takes the 97.5th percentile of that sum over resamples. It
    reaches 0 where nothing speaks against calibration.
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
        mine = np.flatnonzero(bin_of == i)
        interval = bootstrap(correct[mine], 2000, seed, groups=[unit[j] for j in mine]) or {}
        row |= {f"accuracy_{end}": interval.get(end) for end in ("low", "high")}

    gaps = np.stack([np.where(bin_of == i, confidence - correct, 0) for i in range(len(rows))], 1)  # [pairs, bins]

    def noise(counts: np.ndarray) -> np.ndarray:
        return np.abs(counts @ gaps / counts.sum(1, keepdims=True) - gaps.mean(0)).sum(1, keepdims=True)

    (found,) = bootstrap_of(noise, unit, 2000, seed)
    most = found["high"]
    return {
        "accuracy_by_confidence": rows,
        "ece": ece,
        "ece_interval": {"mean": ece, "low": max(0.0, ece - most), "high": ece + most, "n": len(pairs)},
    }


def evaluate(pairs: list[HeldOutPair], seed: int) -> dict[str, Any]:
    """Accuracy by labeler, source, length and confidence; calibration; the baselines, and how far the model is above
    each on the same pairs (`gain_over`, paired). Intervals are over source groups.

    `accuracy_by_confidence` is a list of `Bin`; the correlations are Spearman's.
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
