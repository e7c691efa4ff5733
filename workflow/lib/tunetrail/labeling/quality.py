"""How good labels are: agreement, bias, speed, and how far labeling is.

All numbers are computed from `Label` rows. Only answers that count are compared: no skips, no training, and a labeler's
first answer if a task came twice. A value that cannot be measured is None, never 0. Intervals are 95% by bootstrap
over tasks, since pairs of one task are not independent.

InstructGPT (Ouyang et al. 2022, section 3.4) reports how often labelers agree with each other, 72.6% among those whose
labels it was trained on and 77.3% among held-out ones, and does not say how a tie counts. Here `agreement` counts one
half if only one of two labelers sees a tie, and `agreement_decided` leaves out pairs that either of them tied.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import combinations
from typing import Any, NamedTuple, TypedDict

import krippendorff
import numpy as np
from scipy.stats import kendalltau, norm

from tunetrail.evaluation.stats import bootstrap
from tunetrail.labeling.labels import Label, RankedLabel, by_task, counted, is_ranking
from tunetrail.labeling.tasks import Task
from tunetrail.preferences.ranks import agreements, pair_outcomes

RESAMPLES = 500
SEED = 0
OUTLIER = 3.5
"""Robust z beyond which an answer was unusually fast or slow (Iglewicz and Hoaglin 1993)."""
Interval = dict[str, Any] | None
"""{"mean", "low", "high", "n"}, from `stats.bootstrap`."""


class Couple(NamedTuple):
    """Two rankings of one task."""

    task: str
    first: list[int]
    """Ranks [K]."""
    second: list[int]
    """Ranks [K]."""


class Outlier(TypedDict):
    """A ranking that took unusually short or long."""

    event: int
    labeler: str
    task: str
    seconds: float
    z: float
    """Robust z of the logarithm of its seconds."""


class Remaining(TypedDict):
    """The work ahead."""

    answers: int
    work_seconds: float | None
    """Seconds of work for one person."""
    seconds: float | None
    """Until all is done, at the pace so far."""


class Shared(TypedDict):
    """The numbers of one labeler or of all."""

    rankings: int
    """Those that count."""
    gold: Interval
    """Agreement with the known rankings."""
    self: Interval
    """Agreement of labelers with their own earlier answers."""
    first_shown_wins: Interval
    longer_wins: Interval


class LabelerQuality(Shared):
    """The numbers of one labeler."""

    skips: int
    median_seconds: float | None
    outliers: int


class Quality(Shared):
    """Every number of the quality page that does not depend on the time of day."""

    agreement: Interval
    """Between labelers."""
    agreement_decided: Interval
    tau_b: Interval
    alpha: Interval
    outliers: list[Outlier]
    labelers: dict[str, LabelerQuality]
    """By pseudonym."""


def _over_tasks(values: Iterable[tuple[str, float]]) -> Interval:
    """The mean of values, each of a task, with its interval over tasks."""
    pairs = list(values)
    return bootstrap([value for _, value in pairs], RESAMPLES, SEED, [task for task, _ in pairs])


# ----------------------------------------------------------------------------- agreement


def same_outcomes(couples: Iterable[Couple], decided: bool = False) -> Interval:
    """How often two rankings agree on a pair of completions; see `ranks.agreements`."""
    return _over_tasks((task, same) for task, a, b in couples for same in agreements(a, b, decided))


def between_labelers(labels: Iterable[Label]) -> list[Couple]:
    """Every two labelers' rankings of the same task."""
    return [
        Couple(task, a["ranks"], b["ranks"])
        for task, rows in by_task(counted(labels)).items()
        for a, b in combinations(rows, 2)
    ]


def tau_b(couples: Iterable[Couple]) -> Interval:
    """The mean of Kendall's tau-b; pairs of rankings are left out if one of them ties everything, where it is
    undefined."""
    values = ((task, float(kendalltau(a, b).statistic)) for task, a, b in couples)
    return _over_tasks((task, value) for task, value in values if not math.isnan(value))


def outcome_counts(labels: Iterable[Label]) -> list[np.ndarray]:
    """For each task [pairs, 3]: how many labelers saw the second better, a tie, the first better."""
    counts = []
    for rows in by_task(counted(labels)).values():
        outcomes = np.array([pair_outcomes(row["ranks"]) for row in rows])  # [labelers, pairs]
        counts.append(np.stack([(outcomes == value).sum(0) for value in (-1, 0, 1)], axis=1))
    return counts


def _alpha(counts: list[np.ndarray]) -> float:
    pooled = np.concatenate([both for c in counts for both in (c, c[:, ::-1])])
    # A pair that only one labeler saw says nothing, and if all outcomes are the same, none is expected to differ.
    if not (pooled.sum(1) > 1).any() or (pooled[pooled.sum(1) > 1].sum(0) > 0).sum() < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=pooled, level_of_measurement="nominal"))


def alpha(labels: Iterable[Label]) -> Interval:
    """Krippendorff's alpha (2004), nominal, over the outcomes of pairs: 1 is perfect, 0 is agreement by chance.

    It copes with labelers who did not see a task and with tasks of different size. Which completion of a pair comes
    first is arbitrary, so each pair counts in both orders; otherwise alpha would depend on the order of the file.
    """
    counts = outcome_counts(labels)
    if not counts or math.isnan(value := _alpha(counts)):
        return None
    random = np.random.default_rng(SEED)
    drawn = [_alpha([counts[i] for i in random.integers(len(counts), size=len(counts))]) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"mean": value, "low": float(low), "high": float(high), "n": sum(map(len, counts))}


def with_gold(labels: Iterable[Label], tasks: Mapping[str, Task]) -> list[Couple]:
    """Every answer to a gold task with the gold ranking, without training."""
    return [
        Couple(row["task"], row["ranks"], gold["ranks"])
        for row in labels
        if is_ranking(row) and row["gold"] and not row["training"]
        if row["task"] in tasks and (gold := tasks[row["task"]]["gold"])
    ]


def with_oneself(labels: Iterable[Label]) -> list[Couple]:
    """A labeler's first and second answer to every task that came twice."""
    rows = list(labels)
    first = {(row["labeler"], row["task"]): row["ranks"] for row in counted(rows)}
    return [
        Couple(row["task"], first[row["labeler"], row["task"]], row["ranks"])
        for row in rows
        if is_ranking(row) and row["repeat"] and (row["labeler"], row["task"]) in first
    ]


# ----------------------------------------------------------------------------- bias


def _wins(labels: Iterable[Label], keys: Callable[[RankedLabel], Sequence[float]]) -> Interval:
    """How often the completion with the smaller key wins, among decided pairs whose keys differ.

    Args:
        keys: a label -> a number for each completion [K].
    """

    def values() -> Iterator[tuple[str, float]]:
        for row in counted(labels):
            outcomes, by_key = pair_outcomes(row["ranks"]), pair_outcomes(keys(row))
            kept = (outcomes != 0) & (by_key != 0)
            yield from ((row["task"], float(same)) for same in outcomes[kept] == by_key[kept])

    return _over_tasks(values())


def first_shown_wins(labels: Iterable[Label]) -> Interval:
    """Position bias: how often the completion shown first is preferred; without bias one half."""
    return _wins(labels, lambda row: [row["shown"].index(i) for i in range(len(row["shown"]))])


def longer_wins(labels: Iterable[Label], tasks: Mapping[str, Task]) -> Interval:
    """Length bias: how often the longer completion, in characters, is preferred. Longer may well be better."""
    known = [row for row in labels if row["task"] in tasks]
    return _wins(known, lambda row: [-len(text) for text in tasks[row["task"]]["completions"]])


# ----------------------------------------------------------------------------- speed and progress


def robust_z(values: Sequence[float]) -> list[float] | None:
    """Distances from the median in units of the median absolute deviation, scaled to a normal's standard deviation.

    None if more than half of the values are the same.
    """
    x = np.asarray(values, dtype=float)
    away = x - np.median(x) if len(x) else x
    deviation = np.median(np.abs(away)) if len(x) else 0.0
    return (norm.ppf(0.75) * away / deviation).tolist() if deviation else None


def speed_outliers(labels: Iterable[Label]) -> list[Outlier]:
    """Rankings that took unusually short or long, by the robust z of the logarithm of their seconds, fastest first."""
    rows = [row for row in labels if is_ranking(row)]
    z = robust_z([math.log(max(row["seconds"], 0.1)) for row in rows]) or [0.0] * len(rows)
    outliers: list[Outlier] = [
        {
            "event": row["event"],
            "labeler": row["labeler"],
            "task": row["task"],
            "seconds": row["seconds"],
            "z": value,
        }
        for row, value in zip(rows, z, strict=True)
        if abs(value) > OUTLIER
    ]
    return sorted(outliers, key=lambda row: row["z"])


def remaining(labels: Iterable[Label], wanted: int, have: int, now: datetime) -> Remaining:
    """The work ahead. The pace counts all the time from the first answer to now, nights and breaks included.

    Args:
        now: with a time zone.
    """
    rows = [row for row in labels if row["skipped"] is None]
    answers = max(0, wanted - have)
    if not rows:
        return {"answers": answers, "work_seconds": None, "seconds": None}
    elapsed = (now - min(datetime.fromisoformat(row["at"]) for row in rows)).total_seconds()
    return {
        "answers": answers,
        "work_seconds": answers * float(np.median([row["seconds"] for row in rows])),
        "seconds": answers * elapsed / have if have else None,
    }


# ----------------------------------------------------------------------------- all of it


def measure(labels: Sequence[Label], tasks: Iterable[Task]) -> Quality:
    """The numbers of all labels and of each labeler."""
    known = {task["id"]: task for task in tasks}
    couples, outliers = between_labelers(labels), speed_outliers(labels)
    outliers_of = Counter(row["labeler"] for row in outliers)

    def shared(rows: Sequence[Label]) -> Shared:
        return {
            "rankings": len(counted(rows)),
            "gold": same_outcomes(with_gold(rows, known)),
            "self": same_outcomes(with_oneself(rows)),
            "first_shown_wins": first_shown_wins(rows),
            "longer_wins": longer_wins(rows, known),
        }

    def of_labeler(name: str, rows: list[Label]) -> LabelerQuality:
        seconds = [row["seconds"] for row in rows if is_ranking(row)]
        return {
            **shared(rows),
            "skips": sum(row["skipped"] is not None for row in rows),
            "median_seconds": float(np.median(seconds)) if seconds else None,
            "outliers": outliers_of[name],
        }

    own: dict[str, list[Label]] = defaultdict(list)
    for row in labels:
        own[row["labeler"]].append(row)
    return {
        **shared(labels),
        "agreement": same_outcomes(couples),
        "agreement_decided": same_outcomes(couples, decided=True),
        "tau_b": tau_b(couples),
        "alpha": alpha(labels),
        "outliers": outliers,
        "labelers": {name: of_labeler(name, own[name]) for name in sorted(own, key=lambda name: (len(name), name))},
    }
