"""The quality page of the label server: the numbers of `labeling.quality` with their figures."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import altair as alt

from tunetrail.labeling.app.store import Store
from tunetrail.labeling.labels import Label, is_ranking
from tunetrail.labeling.quality import Interval, Quality, Remaining, measure, remaining
from tunetrail.labeling.tasks import Task
from tunetrail.reporting import charts
from tunetrail.reporting.numbers import duration, percent_interval
from tunetrail.reporting.numbers import interval as interval_text

INSTRUCT_GPT = (0.726, 0.773)
"""How often InstructGPT's training labelers agreed with each other, and its held-out labelers (Ouyang et al. 2022,
section 3.4)."""


class QualityPage(Quality):
    """The content of the quality page."""

    remaining: Remaining | None
    figures: dict[str, str]
    """Name -> SVG."""


def quality_page(
    labels: Sequence[Label],
    tasks: Sequence[Task],
    progress: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> QualityPage:
    """The numbers and figures of the quality page.

    Args:
        progress: from `Store.progress`; with it and `now` the page has a forecast.
    """
    quality = measure(labels, tasks)
    figures = {
        "agreement": agreement_figure(quality),
        "bias": bias_figure(quality),
        "speed": speed_figure(labels, quality),
        "progress": progress_figure(labels),
    }
    return {
        **quality,
        "remaining": remaining(labels, progress["wanted"], progress["have"], now) if progress and now else None,
        "figures": {name: charts.svg(figure) for name, figure in figures.items()},
    }


def page_values(store: Store) -> dict[str, Any]:
    """The current values for the template of the quality page."""
    head, progress = store.head(), store.progress()
    return {
        "quality": quality_page(store.labels(), store.tasks(), progress, datetime.now(UTC)),
        "progress": progress,
        "fault": store.fault(),
        "head": head,
        "share": percent_interval,
        "duration": duration,
    }


def _dot(label: str, value: Interval, text: str, colour: str = "p0") -> dict:
    return charts.dot_row(label, value, text, colour) | {"label": label}  # on one line


def _panel(rows: list[dict], title: str, axis: str, **options: Any) -> charts.Chart | None:
    drawn = charts.dots(rows, 330, axis, **options)
    return drawn.properties(title=alt.TitleParams(title, frame="group")) if drawn else None


def _stacked(*panels: charts.Chart | None) -> charts.Spec | None:
    """Charts below each other, with room at the left for browsers with wider fonts."""
    kept = [[panel] for panel in panels if panel]
    return charts.grid(kept, down=34) | {"padding": {"left": 24, "top": 4, "right": 20, "bottom": 4}} if kept else None


def agreement_figure(quality: Quality) -> charts.Spec | None:
    """Agreement on pairs, compared with InstructGPT's, and the two coefficients."""
    low, high = INSTRUCT_GPT
    reference = {"mean": (low + high) / 2, "low": low, "high": high}
    shares: list[tuple[str, Interval, str]] = [
        ("between labelers", quality["agreement"], "p0"),
        ("where both decide", quality["agreement_decided"], "p0"),
        ("with gold", quality["gold"], "p2"),
        ("with themselves", quality["self"], "p2"),
    ]
    if not any(value for _, value, _ in shares):
        return None
    rows = [_dot(label, value, percent_interval(value), colour) for label, value, colour in shares]
    rows.append(_dot("InstructGPT", reference, f"{low:.1%} and {high:.1%}", "base"))
    pairs = (("Kendall's tau-b", quality["tau_b"]), ("Krippendorff's alpha", quality["alpha"]))
    coefficients = [_dot(label, value, interval_text(value, 2)) for label, value in pairs]
    return _stacked(
        _panel(rows, "Agreement on pairs", "share of pairs", reference=0.5, format="%"),
        _panel(coefficients, "Beyond chance", "0: as by chance, 1: perfect", reference=0),
    )


def bias_figure(quality: Quality) -> charts.Spec | None:
    """How often the completion shown first wins, and the longer one, for all labelers together and for each."""
    panels = []
    by_name: dict[str, Any] = {"all": quality, **quality["labelers"]}
    for key, title in (("first_shown_wins", "Shown first"), ("longer_wins", "Longer")):
        rows = [
            _dot(name, numbers[key], percent_interval(numbers[key]), "sft" if name == "all" else "p0")
            for name, numbers in by_name.items()
        ]
        ends = [0.3, 0.7, *(row[end] for row in rows if "mean" in row for end in ("low", "high"))]
        domain = [min(ends) - 0.02, max(ends) + 0.02]  # at least 0.3 to 0.7, or small differences would look large
        panels.append(_panel(rows, title, "share of decided pairs it wins", reference=0.5, format="%", domain=domain))
    return _stacked(*panels)


def speed_figure(labels: Sequence[Label], quality: Quality) -> charts.Spec | None:
    """The seconds per ranking, by labeler; outliers are orange."""
    unusual = {row["event"] for row in quality["outliers"]}
    rows = [
        {"label": row["labeler"], "seconds": max(row["seconds"], 0.1), "unusual": row["event"] in unusual}
        for row in labels
        if is_ranking(row)
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(strokeWidth=1.5, size=55)
        .encode(
            y=alt.Y("label:N", title=None, sort=list(quality["labelers"])),
            x=alt.X(
                "seconds:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                axis=alt.Axis(title="seconds per ranking", values=[1, 3, 10, 30, 100, 300, 1000, 3000]),
            ),
            color=alt.condition("datum.unusual", alt.value(charts.COLOURS["p1"]), alt.value(charts.COLOURS["p0"])),
            opacity=alt.condition("datum.unusual", alt.value(1), alt.value(0.35)),
        )
        .properties(width=430, height=alt.Step(30))
    )
    return _stacked(chart)


def progress_figure(labels: Sequence[Label]) -> charts.Spec | None:
    """The number of answers over time."""
    answers = sorted((row for row in labels if row["skipped"] is None), key=lambda row: row["event"])
    step = 1 + len(answers) // 400  # no more points than pixels
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
