"""The figures of the page, by name: each is a function of the page's runs (usually one) and the width.

A figure uses only files of artifacts: metrics.json, history.jsonl and probes.json. For several runs it shows the models
of all of them, under their names.
"""

from collections.abc import Callable
from typing import Any

from tunetrail.reporting import charts, course, curves, numbers
from tunetrail.reporting import evaluation_charts as ec
from tunetrail.reporting.charts import Runs, Spec
from tunetrail.reporting.collect import Run, reference_of


def _series(runs: Runs) -> dict[str, str]:
    return {m.name: m.series for run in runs for m in run.models} | {"base": "base", "sft": "sft"}


def _shown(run: Run) -> dict[str, str]:
    """Subject -> its name on the page."""
    return {m.subject: m.name for m in run.models}


def _against(runs: Runs, name: str, opponent: Callable[[Run], str], narrow: bool) -> Spec | None:
    """Win rates of sampled responses by gold score, against each run's `opponent`."""
    pairs = [
        pair | {"first": _shown(run)[pair["first"]], "second": name}
        for run in runs
        for pair in (run.head_to_head.get("sampled") or {}).get("pairs", [])
        if pair["second"] == opponent(run)
    ]
    return ec.length_controlled({"pairs": pairs}, name, _series(runs), narrow)


def win_rates(runs: Runs, narrow: bool) -> Spec | None:
    return _against(runs, reference_of(runs), lambda run: run.reference, narrow)


def win_rates_base(runs: Runs, narrow: bool) -> Spec | None:
    return _against(runs, "base", lambda run: "base", narrow)


def win_matrix(runs: Runs, narrow: bool) -> Spec | None:
    return ec.win_matrix(runs[0].head_to_head.get("sampled"), narrow) if len(runs) == 1 else None


def strengths(runs: Runs, narrow: bool) -> Spec | None:
    scores = [
        score | {"name": _shown(run)[score["name"]]}
        for run in runs
        for score in (run.head_to_head.get("sampled") or {}).get("scores", [])
    ]
    return ec.strengths({"scores": scores}, _series(runs), narrow)


def reward_kl(runs: Runs, narrow: bool) -> Spec | None:
    """With several runs, the yardstick is that of the first."""
    evaluations = {m.name: m.metrics for run in runs for m in run.models}
    return ec.frontier(evaluations, reference_of(runs), _series(runs), narrow)


def probes(runs: Runs, narrow: bool) -> Spec | None:
    return ec.probe_shift(next(iter(runs[0].shifts), None), narrow)


def preference_shift(runs: Runs, narrow: bool) -> Spec | None:
    changes = [
        change | {"after": _shown(run)[change["after"]]}
        for run in runs
        for change in run.head_to_head.get("preferences") or []
    ]
    return ec.preference_shift(changes, _series(runs), narrow)


def reward_accuracy(runs: Runs, narrow: bool) -> Spec | None:
    """With several runs, only the overall accuracy of each reward model."""
    if len(runs) == 1:
        return ec.reward_accuracy(runs[0].metrics("reward"), narrow)
    rows = []
    for i, run in enumerate(runs):
        value = (run.metrics("reward") or {}).get("accuracy")
        rows.append(charts.dot_row(run.name, value, numbers.percent_interval(value), f"p{i % 6}"))
    chart = charts.dots(rows, charts.PLOT[narrow], "accuracy on unseen prompts", reference=0.5, format="%")
    return chart and charts.grid([[chart]])


def calibration(runs: Runs, narrow: bool) -> Spec | None:
    return ec.calibration(runs[0].metrics("reward"), narrow) if len(runs) == 1 else None


def forgetting(runs: Runs, narrow: bool) -> Spec | None:
    pairs: list[dict[str, Any]] = [
        pair | {"first": _shown(run)[pair["first"]]}
        for run in runs
        for pair in run.head_to_head.get("forgetting") or []
    ]
    return ec.forgetting(pairs, "base", _series(runs), narrow)


def contamination(runs: Runs, narrow: bool) -> Spec | None:
    return ec.contamination(runs[0].metrics("data"), narrow) if len(runs) == 1 else None


Figure = Callable[[Runs, bool], Spec | None]
FIGURES: dict[str, Figure] = {
    "next_tokens": course.next_tokens,
    "preference_curves": course.preference_curves,
    "methods": course.methods,
    "win_rates": win_rates,
    "win_rates_base": win_rates_base,
    "win_matrix": win_matrix,
    "strengths": strengths,
    "gold": charts.gold,
    "reward_kl": reward_kl,
    "over_optimisation": curves.over_optimisation,
    "learning": curves.learning,
    "probes": probes,
    "preferences": charts.preferences,
    "preference_shift": preference_shift,
    "reward_accuracy": reward_accuracy,
    "calibration": calibration,
    "forgetting": forgetting,
    "contamination": contamination,
}
