"""The figures of the page, by name: each a function of the runs it is about (mostly one) and the width.

A figure is drawn from metrics files and histories alone; of several runs it shows the models of all, under their names.
"""

from collections.abc import Callable
from typing import Any

from tunetrail.reporting import charts, numbers
from tunetrail.reporting import evaluation_charts as ec
from tunetrail.reporting.charts import Runs, Spec
from tunetrail.reporting.collect import Run


def _series(runs: Runs) -> dict[str, str]:
    return {m.name: m.series for run in runs for m in run.models} | {"base": "base", "sft": "sft"}


def _shown(run: Run) -> dict[str, str]:
    """Subject -> its name on the page."""
    return {m.subject: m.name for m in run.models}


def _match(runs: Runs) -> dict | None:
    """The matches by gold score of sampled responses; the second of a pair keeps its plain name."""
    found = [(_shown(run), match) for run in runs if (match := run.tournament.get("sampled"))]
    pairs = [pair | {"first": name[pair["first"]]} for name, match in found for pair in match["pairs"]]
    scores = [score | {"name": name[score["name"]]} for name, match in found for score in match["scores"]]
    return {"pairs": pairs, "scores": scores} if found else None


def _against(opponent: str) -> "Figure":
    def draw(runs: Runs, narrow: bool) -> Spec | None:
        match = _match(runs)
        second = opponent if any(p["second"] == opponent for p in (match or {}).get("pairs", [])) else "base"
        return ec.length_controlled(match, second, _series(runs), narrow)

    return draw


def win_matrix(runs: Runs, narrow: bool) -> Spec | None:
    return ec.win_matrix(runs[0].tournament.get("sampled"), narrow) if len(runs) == 1 else None


def strengths(runs: Runs, narrow: bool) -> Spec | None:
    return ec.strengths(_match(runs), _series(runs), narrow)


def reward_kl(runs: Runs, narrow: bool) -> Spec | None:
    """Of several runs the yardstick is the first one's."""
    return ec.frontier({m.name: m.metrics for run in runs for m in run.models}, _series(runs), narrow)


def probes(runs: Runs, narrow: bool) -> Spec | None:
    return ec.probe_shift(next(iter(runs[0].shifts), None), narrow)


def preference_shift(runs: Runs, narrow: bool) -> Spec | None:
    changes = [
        change | {"after": _shown(run)[change["after"]]}
        for run in runs
        for change in run.tournament.get("preferences") or []
    ]
    return ec.preference_shift(changes, _series(runs), narrow)


def reward_accuracy(runs: Runs, narrow: bool) -> Spec | None:
    """Of several runs only the reward models as a whole, a row each."""
    if len(runs) == 1:
        return ec.reward_accuracy(runs[0].metrics("reward"), narrow)
    rows = []
    for i, run in enumerate(runs):
        value = (run.metrics("reward") or {}).get("accuracy")
        rows.append(charts._row(run.name, value, numbers.percent_interval(value), f"p{i % 6}"))
    chart = charts.dots(rows, charts.PLOT[narrow], "accuracy on unseen prompts", reference=0.5, format="%")
    return chart and charts.grid([[chart]])


def calibration(runs: Runs, narrow: bool) -> Spec | None:
    return ec.calibration(runs[0].metrics("reward"), narrow) if len(runs) == 1 else None


def forgetting(runs: Runs, narrow: bool) -> Spec | None:
    pairs: list[dict[str, Any]] = [
        pair | {"first": _shown(run)[pair["first"]]} for run in runs for pair in run.tournament.get("forgetting") or []
    ]
    return ec.forgetting(pairs, "base", _series(runs), narrow)


def contamination(runs: Runs, narrow: bool) -> Spec | None:
    return ec.contamination(runs[0].metrics("data"), narrow) if len(runs) == 1 else None


Figure = Callable[[Runs, bool], Spec | None]
FIGURES: dict[str, Figure] = {
    "win_rates": _against("sft"),
    "win_rates_base": _against("base"),
    "win_matrix": win_matrix,
    "strengths": strengths,
    "gold": charts.gold,
    "reward_kl": reward_kl,
    "over_optimisation": charts.over_optimisation,
    "learning": charts.learning,
    "probes": probes,
    "preferences": charts.preferences,
    "preference_shift": preference_shift,
    "reward_accuracy": reward_accuracy,
    "calibration": calibration,
    "forgetting": forgetting,
    "contamination": contamination,
}
