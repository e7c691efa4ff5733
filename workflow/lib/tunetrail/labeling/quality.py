"""How good labels are: agreement, bias, speed, and how far labeling is.

Everything is computed from label rows as `Store.labels` gives them; see there for their keys. Only answers that count
are compared: no skips, no training, and a labeler's first answer where a task came twice. A value that cannot be
measured is None, never 0. Intervals are 95% by bootstrap over tasks, since pairs of one task are not independent.

InstructGPT (Ouyang et al. 2022, section 3.4) reports how often labelers agree with each other, 72.6% among those whose
labels it was trained on and 77.3% among held-out ones, and does not say how a tie counts. Here `agreement` gives one half where
one of two sees a tie, and `agreement_decided` leaves out pairs that either of them tied.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import combinations
from typing import Any

import altair as alt
import krippendorff
import numpy as np
from scipy.stats import kendalltau, norm

from tunetrail.evaluation.stats import bootstrap
from tunetrail.preferences.ranks import agreements, pair_outcomes
from tunetrail.reporting import charts
from tunetrail.reporting.numbers import interval as as_text
from tunetrail.reporting.numbers import percent_interval

INSTRUCT_GPT = (0.726, 0.773)
"""How often its training labelers agreed with each other, and its held-out ones (Ouyang et al. 2022, section 3.4)."""
RESAMPLES = 500
SEED = 0
OUTLIER = 3.5
"""Robust z beyond which an answer was unusually fast or slow (Iglewicz and Hoaglin 1993)."""
Interval = dict[str, Any] | None
"""{"mean", "low", "high", "n"} as `stats.bootstrap` gives it."""


def counted(labels: Iterable[dict]) -> list[dict]:
    """The rankings that become training data: no skips, no gold, no training, no second answer to the same task."""
    return [row for row in labels if _is_ranking(row) and not (row["gold"] or row["training"] or row["repeat"])]


def _is_ranking(row: dict) -> bool:
    return row["kind"] == "ranking" and row["skipped"] is None


def by_task(labels: Iterable[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = defaultdict(list)
    for row in labels:
        found[row["task"]].append(row)
    return dict(found)


def _over_tasks(values: Iterable[tuple[str, float]]) -> Interval:
    """The mean of values, each of a task, with its interval over tasks."""
    pairs = list(values)
    return bootstrap([value for _, value in pairs], RESAMPLES, SEED, [task for task, _ in pairs])


# ----------------------------------------------------------------------------- agreement


def same_outcomes(couples: Iterable[tuple[str, Sequence[int], Sequence[int]]], decided: bool = False) -> Interval:
    """How often two rankings agree on a pair of completions, see `ranks.agreements`.

    Args:
        couples: (task, ranks [K], ranks [K]).
    """
    return _over_tasks((task, same) for task, ours, theirs in couples for same in agreements(ours, theirs, decided))


def between_labelers(labels: Iterable[dict]) -> list[tuple[str, list[int], list[int]]]:
    """(task, ranks, ranks) of every two labelers who ranked the same task."""
    return [
        (task, a["ranks"], b["ranks"])
        for task, rows in by_task(counted(labels)).items()
        for a, b in combinations(rows, 2)
    ]


def tau_b(couples: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> Interval:
    """Mean of Kendall's tau-b over couples of rankings; it is undefined, and left out, where one ties everything."""
    values = ((task, float(kendalltau(ours, theirs).statistic)) for task, ours, theirs in couples)
    return _over_tasks((task, value) for task, value in values if not math.isnan(value))


def outcome_counts(labels: Iterable[dict]) -> list[np.ndarray]:
    """For each task [pairs, 3]: how many labelers saw the second better, a tie, the first better."""
    found = []
    for rows in by_task(counted(labels)).values():
        outcomes = np.array([pair_outcomes(row["ranks"]) for row in rows])  # [labelers, pairs]
        found.append(np.stack([(outcomes == value).sum(0) for value in (-1, 0, 1)], axis=1))
    return found


def _alpha(counts: list[np.ndarray]) -> float:
    pooled = np.concatenate([turned for c in counts for turned in (c, c[:, ::-1])])
    # Of pairs that one labeler saw nothing can be said, and where all outcomes are one kind, none is expected to differ.
    if not (pooled.sum(1) > 1).any() or (pooled[pooled.sum(1) > 1].sum(0) > 0).sum() < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=pooled, level_of_measurement="nominal"))


def alpha(labels: Iterable[dict]) -> Interval:
    """Krippendorff's alpha (2004), nominal, over the outcomes of pairs: 1 is perfect, 0 what chance would give.

    It copes with labelers who did not see a task and with tasks of different size. Which completion of a pair comes
    first is arbitrary, so each pair counts both ways round; else alpha would depend on the order of the file.
    """
    counts = outcome_counts(labels)
    if not counts or math.isnan(value := _alpha(counts)):
        return None
    random = np.random.default_rng(SEED)
    drawn = [_alpha([counts[i] for i in random.integers(len(counts), size=len(counts))]) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"mean": value, "low": float(low), "high": float(high), "n": sum(map(len, counts))}


def with_gold(labels: Iterable[dict], tasks: Mapping[str, dict]) -> list[tuple[str, list[int], list[int]]]:
    """(task, ranks, gold) of every answer to a gold task, training left out."""
    return [
        (row["task"], row["ranks"], tasks[row["task"]]["gold"]["ranks"])
        for row in labels
        if _is_ranking(row) and row["gold"] and not row["training"] and row["task"] in tasks
    ]


def with_oneself(labels: Iterable[dict]) -> list[tuple[str, list[int], list[int]]]:
    """(task, ranks, ranks) of every task that came back to its labeler."""
    rows = list(labels)
    first = {(row["labeler"], row["task"]): row["ranks"] for row in counted(rows)}
    return [
        (row["task"], first[row["labeler"], row["task"]], row["ranks"])
        for row in rows
        if _is_ranking(row) and row["repeat"] and (row["labeler"], row["task"]) in first
    ]


# ----------------------------------------------------------------------------- bias


def _wins(labels: Iterable[dict], ahead: Callable[[dict], Sequence[float]]) -> Interval:
    """How often the completion that is ahead wins, of the pairs decided; those level are left out.

    Args:
        ahead: a label row -> a value for each completion [K]; the smaller is ahead.
    """

    def values() -> Iterator[tuple[str, float]]:
        for row in counted(labels):
            outcomes, before = pair_outcomes(row["ranks"]), pair_outcomes(ahead(row))  # type: ignore[arg-type]
            kept = (outcomes != 0) & (before != 0)
            yield from ((row["task"], float(same)) for same in outcomes[kept] == before[kept])

    return _over_tasks(values())


def first_shown_wins(labels: Iterable[dict]) -> Interval:
    """Position bias: how often the one of two that was shown first is preferred; without bias one half."""
    return _wins(labels, lambda row: [row["shown"].index(i) for i in range(len(row["shown"]))])


def longer_wins(labels: Iterable[dict], tasks: Mapping[str, dict]) -> Interval:
    """Length bias: how often the longer of two, in characters, is preferred. Longer may well be better."""
    known = [row for row in labels if row["task"] in tasks]
    return _wins(known, lambda row: [-len(text) for text in tasks[row["task"]]["completions"]])


# ----------------------------------------------------------------------------- speed and progress


def robust_z(values: Sequence[float]) -> list[float] | None:
    """Distances from the median in units of the median absolute deviation, scaled to a normal's standard deviation.

    None where more than half of the values are one.
    """
    x = np.asarray(values, dtype=float)
    away = x - np.median(x) if len(x) else x
    deviation = np.median(np.abs(away)) if len(x) else 0.0
    return (norm.ppf(0.75) * away / deviation).tolist() if deviation else None


def speed_outliers(labels: Iterable[dict]) -> list[dict]:
    """Rankings that took unusually short or long, by the robust z of the logarithm of their seconds, fastest first."""
    rows = [row for row in labels if _is_ranking(row)]
    z = robust_z([math.log(max(row["seconds"], 0.1)) for row in rows]) or [0.0] * len(rows)
    found = [
        {key: row[key] for key in ("event", "labeler", "task", "seconds")} | {"z": value}
        for row, value in zip(rows, z, strict=True)
        if abs(value) > OUTLIER
    ]
    return sorted(found, key=lambda row: row["z"])


def remaining(labels: Iterable[dict], wanted: int, have: int, now: datetime) -> dict[str, float | None]:
    """What is left: {"answers", "work_seconds": of one person, "seconds": of the calendar}.

    The calendar's pace is that of all the time from the first answer to now, nights and breaks included.

    Args:
        now: with a time zone.
    """
    rows = [row for row in labels if row["skipped"] is None]
    left = max(0, wanted - have)
    if not rows:
        return {"answers": left, "work_seconds": None, "seconds": None}
    gone = (now - min(datetime.fromisoformat(row["at"]) for row in rows)).total_seconds()
    return {
        "answers": left,
        "work_seconds": left * float(np.median([row["seconds"] for row in rows])),
        "seconds": left * gone / have if have else None,
    }


# ----------------------------------------------------------------------------- all of it


def measure(labels: Sequence[dict], tasks: Iterable[dict]) -> dict[str, Any]:
    """Every number of the quality page that does not depend on the time of day.

    {"rankings", "agreement", "agreement_decided", "tau_b", "alpha", "gold", "self", "first_shown_wins", "longer_wins",
    "outliers": rows, "labelers": {pseudonym: {"rankings", "skips", "gold", "self", "first_shown_wins", "longer_wins",
    "median_seconds", "outliers"}}}; intervals but for the counts.
    """
    known = {task["id"]: task for task in tasks}
    couples, outliers = between_labelers(labels), speed_outliers(labels)
    too_fast_or_slow = Counter(row["labeler"] for row in outliers)

    def shared(rows: Sequence[dict]) -> dict[str, Any]:
        return {
            "rankings": len(counted(rows)),
            "gold": same_outcomes(with_gold(rows, known)),
            "self": same_outcomes(with_oneself(rows)),
            "first_shown_wins": first_shown_wins(rows),
            "longer_wins": longer_wins(rows, known),
        }

    def of_labeler(name: str, rows: list[dict]) -> dict[str, Any]:
        seconds = [row["seconds"] for row in rows if _is_ranking(row)]
        return shared(rows) | {
            "skips": sum(row["skipped"] is not None for row in rows),
            "median_seconds": float(np.median(seconds)) if seconds else None,
            "outliers": too_fast_or_slow[name],
        }

    own: dict[str, list[dict]] = defaultdict(list)
    for row in labels:
        own[row["labeler"]].append(row)
    return shared(labels) | {
        "agreement": same_outcomes(couples),
        "agreement_decided": same_outcomes(couples, decided=True),
        "tau_b": tau_b(couples),
        "alpha": alpha(labels),
        "outliers": outliers,
        "labelers": {name: of_labeler(name, own[name]) for name in sorted(own, key=lambda name: (len(name), name))},
    }


def quality_page(
    labels: Sequence[dict],
    tasks: Sequence[dict],
    progress: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """What the quality page shows: the numbers of `measure`, "remaining" (see there) and "figures", name -> SVG.

    Args:
        progress: as `Store.progress` gives it; with it and `now` there is an outlook.
    """
    found = measure(labels, tasks)
    outlook = remaining(labels, progress["wanted"], progress["have"], now) if progress and now else None
    figures = {name: charts.svg(draw(labels, found)) for name, draw in FIGURES.items()}
    return found | {"remaining": outlook, "figures": figures}


# ----------------------------------------------------------------------------- figures


def _dot(label: str, value: Interval, text: str, colour: str = "p0") -> dict:
    place = {key: value[key] for key in ("mean", "low", "high")} if value else {}
    return {"label": label, "text": text, "colour": charts.COLOURS[colour], "fill": charts.COLOURS[colour]} | place


def _panel(rows: list[dict], title: str, axis: str, **options: Any) -> charts.Chart | None:
    drawn = charts.dots(rows, 330, axis, **options)
    return drawn.properties(title=alt.TitleParams(title, frame="group")) if drawn else None


def _stacked(*panels: charts.Chart | None) -> charts.Spec | None:
    """Charts one below the other, with room at the left for browsers whose letters are wider."""
    kept = [[panel] for panel in panels if panel]
    return charts.grid(kept, down=34) | {"padding": {"left": 24, "top": 4, "right": 20, "bottom": 4}} if kept else None


def agreement_figure(labels: Sequence[dict], found: dict[str, Any]) -> charts.Spec | None:
    """Agreement on pairs beside InstructGPT's, and the two coefficients."""
    low, high = INSTRUCT_GPT
    middle = {"mean": (low + high) / 2, "low": low, "high": high}
    shares: list[tuple[str, Interval, str]] = [
        ("between labelers", found["agreement"], "p0"),
        ("where both decide", found["agreement_decided"], "p0"),
        ("with gold", found["gold"], "p2"),
        ("with themselves", found["self"], "p2"),
    ]
    rows = [_dot(label, value, percent_interval(value), colour) for label, value, colour in shares]
    rows.append(_dot("InstructGPT", middle, f"{low:.1%} and {high:.1%}", "base"))
    if not any(value for _, value, _ in shares):
        return None
    pairs = (("Kendall's tau-b", found["tau_b"]), ("Krippendorff's alpha", found["alpha"]))
    coefficients = [_dot(label, value, as_text(value, 2)) for label, value in pairs]
    return _stacked(
        _panel(rows, "Agreement on pairs", "share of pairs", reference=0.5, format="%"),
        _panel(coefficients, "Beyond chance", "0: as by chance, 1: perfect", reference=0),
    )


def bias_figure(labels: Sequence[dict], found: dict[str, Any]) -> charts.Spec | None:
    """How often the first shown and the longer wins, of all and of each labeler."""
    panels = []
    for key, title in (("first_shown_wins", "Shown first"), ("longer_wins", "Longer")):
        whose = [("all", found), *found["labelers"].items()]
        rows = [_dot(name, m[key], percent_interval(m[key]), "sft" if name == "all" else "p0") for name, m in whose]
        ends = [0.3, 0.7, *(row[end] for row in rows if "mean" in row for end in ("low", "high"))]
        domain = [min(ends) - 0.02, max(ends) + 0.02]  # no narrower, or small differences would look large
        panels.append(_panel(rows, title, "share of decided pairs it wins", reference=0.5, format="%", domain=domain))
    return _stacked(*panels)


def speed_figure(labels: Sequence[dict], found: dict[str, Any]) -> charts.Spec | None:
    """Seconds of every ranking by labeler; a ring is an outlier."""
    unusual = {row["event"] for row in found["outliers"]}
    rows = [
        {"label": row["labeler"], "seconds": max(row["seconds"], 0.1), "unusual": row["event"] in unusual}
        for row in labels
        if _is_ranking(row)
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(strokeWidth=1.5, size=55)
        .encode(
            y=alt.Y("label:N", title=None, sort=list(found["labelers"])),
            x=alt.X(
                "seconds:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                axis=alt.Axis(title="seconds a ranking", values=[1, 3, 10, 30, 100, 300, 1000, 3000]),
            ),
            color=alt.condition("datum.unusual", alt.value(charts.COLOURS["p1"]), alt.value(charts.COLOURS["p0"])),
            opacity=alt.condition("datum.unusual", alt.value(1), alt.value(0.35)),
        )
        .properties(width=430, height=alt.Step(30))
    )
    return _stacked(chart)


def progress_figure(labels: Sequence[dict], found: dict[str, Any]) -> charts.Spec | None:
    """All answers over time."""
    answers = sorted((row for row in labels if row["skipped"] is None), key=lambda row: row["event"])
    step = 1 + len(answers) // 400  # more points than pixels show nothing
    rows = [{"at": row["at"], "answers": n} for n, row in enumerate(answers, 1) if n % step == 0 or n == len(answers)]
    if len({row["at"] for row in rows}) < 2:
        return None
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=2, color=charts.COLOURS["p0"])
        .encode(
            x=alt.X("at:T", axis=alt.Axis(title="UTC", tickCount=6), scale=alt.Scale(type="utc")),
            y=alt.Y("answers:Q", axis=alt.Axis(title="answers", tickMinStep=1)),
        )
        .properties(width=430, height=180)
    )
    return _stacked(chart)


FIGURES: dict[str, Callable[[Sequence[dict], dict[str, Any]], charts.Spec | None]] = {
    "agreement": agreement_figure,
    "bias": bias_figure,
    "speed": speed_figure,
    "progress": progress_figure,
}
