"""The figures, as Altair charts turned into SVG without a browser.

Each `FIGURES[name](run, narrow)` gives a chart or None (nothing was measured). Colours are written
literally, so that the page can turn them with CSS in dark mode; the bytes depend on the numbers only.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import altair as alt
import vl_convert

from tunetrail.reporting.collect import Artifact, Run
from tunetrail.reporting.numbers import NOT_MEASURED, interval, percent_interval

Chart = Any  # Altair's kinds of charts share no base class with what is used here

# Okabe and Ito's palette, told apart with any colour vision; page.css has the same with lighter twins for dark mode.
COLOURS = {
    "base": "#7a828a", "sft": "#22272b",
    "p0": "#0072b2", "p1": "#d55e00", "p2": "#009e73", "p3": "#cc79a7", "p4": "#e69f00", "p5": "#56b4e9",
}  # fmt: skip
INK, MUTED, LINE, PAPER = "#22272b", "#66707a", "#dfe3e7", "#ffffff"
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
PLOT = {False: 480, True: 130}
"""Width of a plot in pixels, by `narrow` (a phone)."""


def svg(chart: Chart | None) -> str:
    """SVG of a chart, on white; for None one that says 'not measured'."""
    if chart is None:
        words = alt.Chart(_data([{"text": NOT_MEASURED}])).mark_text(color=MUTED, fontSize=13, fontStyle="italic")
        chart = words.encode(text="text:N").properties(width=240, height=40)
    chart = chart.configure(background=PAPER, font=FONT, padding=4)
    chart = chart.configure_view(stroke=None)
    chart = chart.configure_axis(
        domain=False, ticks=False, gridColor=LINE, labelColor=MUTED, titleColor=MUTED, labelFontSize=11, titleFontSize=11,
        titleFontWeight="normal", labelPadding=6, titlePadding=8,
    )  # fmt: skip
    chart = chart.configure_title(color=INK, fontSize=12, fontWeight="bold", anchor="start", offset=8)
    return vl_convert.vegalite_to_svg(chart.to_dict())


def _data(rows: list[dict]) -> alt.Data:
    return alt.Data(values=rows)


def _colour() -> alt.Color:
    return alt.Color("colour:N", scale=None)


def _row(label: str, value: dict | None, text: str, series: str, hollow: bool = False) -> dict:
    place = {key: value[key] for key in ("mean", "low", "high")} if value else {}
    return {
        "label": label,
        "text": text,
        "colour": COLOURS[series],
        "fill": PAPER if hollow else COLOURS[series],
    } | place


def dots(rows: list[dict], width: int, title: str, reference: float | None = None, **axis: Any) -> Chart | None:
    """One row a model: a dot, its 95% interval as a line, the numbers to the right; a line at `reference`."""
    measured = [row for row in rows if "mean" in row]
    if not measured:
        return None
    ends = [row[key] for row in measured for key in ("low", "high")] + ([] if reference is None else [reference])
    margin = 0.06 * (max(ends) - min(ends)) or 0.5
    domain = axis.pop("domain", None) or [min(ends) - margin, max(ends) + margin]
    y = alt.Y(
        "label:N", sort=None, title=None, axis=alt.Axis(labelFontSize=12, labelColor=INK, labelLimit=150, grid=False)
    )
    x = alt.X(
        "mean:Q",
        scale=alt.Scale(domain=domain, nice=False),
        axis=alt.Axis(title=title, tickCount=5 if width > 200 else 3, **axis),
    )
    base = alt.Chart(_data(rows))
    layers = [
        base.mark_rule(strokeWidth=2.5, strokeCap="round").encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=_colour()),
        base.mark_point(size=85, filled=True, opacity=1, strokeWidth=2).encode(
            y=y, x=x, fill=alt.Fill("fill:N", scale=None), stroke=alt.Stroke("colour:N", scale=None)
        ),
        base.mark_text(align="left", fontSize=11.5, color=INK).encode(y=y, x=alt.value(width + 14), text="text:N"),
    ]
    if reference is not None:
        rule = alt.Chart(_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.insert(0, rule.encode(x=alt.X("at:Q")))
    return alt.layer(*layers).properties(width=width, height=alt.Step(34))


# ----------------------------------------------------------------------------- results


def win_rates(run: Run, narrow: bool) -> Chart | None:
    rows = [
        _row(m.name, m.interval("win_rate_vs_sft"), percent_interval(m.interval("win_rate_vs_sft")), m.series)
        for m in run.models
        if m.name != "sft"
    ]
    axis = {"format": "%", "domain": [0, 1]}
    return dots(rows, PLOT[narrow], "win rate against sft, ties count half", reference=0.5, **axis)


def gold(run: Run, narrow: bool) -> Chart | None:
    rows = [_row(m.name, m.interval("gold"), interval(m.interval("gold"), 1), m.series) for m in run.models]
    return dots(rows, PLOT[narrow], "gold score")


def forgetting(run: Run, narrow: bool) -> Chart | None:
    rows = []
    for model in run.models:
        if model.name == "base":
            continue
        change = (model.metrics.get("retention") or {}).get("change_vs_base")
        adapter = model.metrics.get("adapter")
        label = f"{model.name} ({'LoRA' if adapter == 'lora' else adapter})" if adapter else model.name
        rows.append(_row(label, change, interval(change, 3, sign=True), model.series, hollow=adapter == "lora"))
    return dots(rows, PLOT[narrow], "change of NLL, nats a token (right: forgotten)", reference=0)


def reward_kl(run: Run, narrow: bool) -> Chart | None:
    """Two panels, reward-model score and gold score, over the KL to SFT on a square-root scale."""
    panels = []
    for key, title in (("reward", "Reward-model score"), ("gold", "Gold score")):
        rows = []
        for model in run.models:
            kl, score = model.interval("kl_to_sft"), model.interval(key)
            if model.name == "sft":  # its KL to itself is 0 by definition
                kl = {"mean": 0, "low": 0, "high": 0}
            if kl is None or score is None:
                continue
            shape = "diamond" if model.metrics.get("method") == "best_of_n" else "circle"
            rows.append(
                {"label": model.name, "colour": COLOURS[model.series], "shape": shape}
                | {f"kl_{end}": max(0, kl[end]) for end in ("mean", "low", "high")}
                | {end: score[end] for end in ("mean", "low", "high")}
            )
        if all(row["label"] == "sft" for row in rows):
            continue
        base = alt.Chart(_data(rows))
        top = max(row["kl_high"] for row in rows)
        x = alt.X(
            "kl_mean:Q",
            scale=alt.Scale(type="sqrt", domain=[0, 1.25 * top or 1], nice=False),
            axis=alt.Axis(title="KL to sft, nats a response (√ scale)", tickCount=5),
        )
        y = alt.Y("mean:Q", scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(title=None, tickCount=5))
        layers = [
            base.mark_rule(strokeWidth=1.5, opacity=0.75).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=_colour()),
            base.mark_rule(strokeWidth=1.5, opacity=0.75).encode(x=alt.X("kl_low:Q"), x2="kl_high:Q", y=y, color=_colour()),
            base.mark_point(size=95, filled=True, opacity=1).encode(x=x, y=y, color=_colour(), shape=alt.Shape("shape:N", scale=None)),
            base.mark_text(align="left", dx=8, dy=-9, fontSize=12, fontWeight="bold").encode(x=x, y=y, text="label:N", color=_colour()),
        ]  # fmt: skip
        panels.append(alt.layer(*layers).properties(width=270 if narrow else 315, height=230, title=title))
    return alt.concat(*panels, columns=1 if narrow else 2, spacing=34) if panels else None


# ----------------------------------------------------------------------------- learning curves

# Stage -> what is drawn: (title, keys of history.jsonl, reference line).
CURVES: dict[str, list[tuple[str, tuple[str, ...], float | None]]] = {
    "sft": [("loss", ("loss",), None), ("token accuracy", ("mean_token_accuracy",), None)],
    "reward": [("loss", ("loss",), None), ("accuracy", ("accuracy",), 0.5)],
    "dpo": [
        ("loss", ("loss",), math.log(2)),
        ("accuracy", ("rewards/accuracies",), 0.5),
        ("margin", ("rewards/margins",), 0),
        ("log-prob chosen, rejected", ("logps/chosen", "logps/rejected"), None),
    ],
    "ppo": [
        ("reward-model score", ("score",), None),
        ("KL to sft", ("kl",), None),
        ("entropy", ("entropy",), None),
        ("response length", ("length",), None),
    ],
}


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    return [sum(part := values[max(0, i - window + 1) : i + 1]) / len(part) for i in range(len(values))]


def _curve_rows(artifact: Artifact, colour: str, keys: tuple[str, ...]) -> list[dict]:
    rows = []
    for key in keys:
        points = [(row["step"], row[key]) for row in artifact.history if row.get(key) is not None]
        window = max(1, len(points) // 10)
        for (step, value), mean in zip(points, smooth([v for _, v in points], window), strict=True):
            dashed = key == "logps/rejected"
            rows.append(
                {
                    "step": step,
                    "value": value,
                    "mean": mean,
                    "colour": colour,
                    "line": f"{artifact.role} {key}",
                    "dashed": dashed,
                }
            )
    return rows


def learning(run: Run, narrow: bool) -> Chart | None:
    """Small multiples; policies of one method share their panels."""
    by_stage: dict[str, list[tuple[Artifact, str]]] = {}
    series = {f"policy.{m.name}": m.series for m in run.policies} | {"sft": "sft", "reward": "base"}
    for role, artifact in run.artifacts.items():
        if role in series and artifact.history:
            stage = artifact.stage if role.startswith("policy.") else role
            by_stage.setdefault(stage, []).append((artifact, COLOURS[series[role]]))
    rows_of_panels = []
    for stages in (("sft", "reward"), ("dpo",), ("ppo",)):
        panels = []
        for stage in stages:
            for title, keys, reference in CURVES[stage]:
                rows = [
                    row for artifact, colour in by_stage.get(stage, []) for row in _curve_rows(artifact, colour, keys)
                ]
                if rows:
                    panels.append(_curve(f"{stage}: {title}", rows, reference, 125 if narrow else 152))
        rows_of_panels += [panels[i : i + 2] for i in range(0, len(panels), 2)] if narrow else [panels]
    rows_of_panels = [panels for panels in rows_of_panels if panels]
    if not rows_of_panels:
        return None
    return alt.vconcat(*(alt.hconcat(*panels, spacing=14) for panels in rows_of_panels), spacing=18)


def _curve(title: str, rows: list[dict], reference: float | None, width: int) -> Chart:
    base = alt.Chart(_data(rows))
    x = alt.X("step:Q", scale=alt.Scale(nice=False), axis=alt.Axis(title=None, tickCount=3, tickMinStep=1, grid=False))
    scale, axis = alt.Scale(zero=False, padding=4), alt.Axis(title=None, tickCount=4, minExtent=26)
    dash = alt.StrokeDash("dashed:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [4, 2]]), legend=None)
    layers = [
        base.mark_line(strokeWidth=1, opacity=0.35).encode(
            x=x, y=alt.Y("value:Q", scale=scale, axis=axis), color=_colour(), detail="line:N"
        ),
        base.mark_line(strokeWidth=2).encode(x=x, y=alt.Y("mean:Q"), color=_colour(), detail="line:N", strokeDash=dash),
    ]
    if len({row["step"] for row in rows}) <= 12:  # few steps: show each
        layers.append(base.mark_point(size=22, filled=True, opacity=1).encode(x=x, y=alt.Y("value:Q"), color=_colour()))
    if reference is not None:
        layers.insert(
            0, alt.Chart(_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y=alt.Y("at:Q"))
        )
    return alt.layer(*layers).properties(width=width, height=95, title=alt.Title(title, fontSize=11))


# ----------------------------------------------------------------------------- probes


def visible(token: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")


def probes(run: Run, narrow: bool) -> Chart | None:
    """A row of bars a model: the probability of each token of the sentence, in reading order."""
    rows = [
        {
            "model": m.name,
            "place": i,
            "token": visible(position["token"]),
            "prob": position["prob"],
            "colour": COLOURS[m.series],
        }
        for m in run.models
        for i, position in enumerate(m.sentence)
        if position.get("prob") is not None
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(row["model"] for row in rows))
    labels = {row["place"]: row["token"] for row in rows}
    step = 11 if narrow else 24
    label = f"{json.dumps([labels.get(i, '') for i in range(max(labels) + 1)])}[datum.value]"
    panels = []
    for name in names:
        last = name == names[-1]
        axis = alt.Axis(
            title=None,
            labels=last,
            labelExpr=label,
            labelAngle=-60,
            labelFontSize=10,
            labelColor=INK,
            grid=False,
            labelLimit=110,
        )
        panels.append(
            alt.Chart(_data([row for row in rows if row["model"] == name]), title=alt.Title(name, fontSize=11))
            .mark_bar(size=step - 6)
            .encode(
                x=alt.X("place:O", axis=axis),
                y=alt.Y("prob:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, values=[0, 0.5, 1])),
                color=_colour(),
            )
            .properties(width=alt.Step(step), height=50)
        )
    return alt.vconcat(*panels, spacing=6)


def preferences(run: Run, narrow: bool) -> Chart | None:
    """A panel a probe and one for the held-out pairs: log-probability of the preferred (full dot) and the other response."""
    panels = []
    prompts = list(dict.fromkeys(p["prompt"] for m in run.models for p in m.preferences))
    for prompt in prompts:
        rows = [
            {
                "label": m.name,
                "colour": COLOURS[m.series],
                "preferred": p["preferred_logp"],
                "dispreferred": p["dispreferred_logp"],
            }
            for m in run.models
            for p in m.preferences
            if p["prompt"] == prompt and p["preferred_logp"] is not None and p["dispreferred_logp"] is not None
        ]
        panels.append((prompt, rows))
    pairs = [(m, m.metrics.get("comparisons")) for m in run.models]
    rows = [
        {
            "label": m.name,
            "colour": COLOURS[m.series],
            "preferred": c["chosen_logps"]["mean"],
            "dispreferred": c["rejected_logps"]["mean"],
        }
        for m, c in pairs
        if c and c.get("chosen_logps") and c.get("rejected_logps")
    ]
    panels.append(("Held-out pairs, mean", rows))
    drawn = []
    for title, rows in panels:
        if not rows:
            continue
        base = alt.Chart(_data(rows))
        y = alt.Y(
            "label:N",
            sort=None,
            title=None,
            axis=alt.Axis(labelFontSize=12, labelColor=INK, grid=False, labelLimit=150),
        )
        x = alt.X("preferred:Q", scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(title=None, tickCount=5))
        layers = [
            base.mark_rule(strokeWidth=2, opacity=0.5).encode(y=y, x=x, x2="dispreferred:Q", color=_colour()),
            base.mark_point(size=70, filled=True, opacity=1).encode(y=y, x=x, color=_colour()),
            base.mark_point(size=70, filled=True, opacity=1, fill=PAPER, strokeWidth=2).encode(
                y=y, x=alt.X("dispreferred:Q"), stroke=alt.Stroke("colour:N", scale=None)
            ),
        ]
        limit = 44 if narrow else 90
        short = title if len(title) <= limit else title[: limit - 1] + "…"
        drawn.append(alt.layer(*layers).properties(width=230 if narrow else 560, height=alt.Step(24), title=short))
    return alt.vconcat(*drawn, spacing=16) if drawn else None


# ----------------------------------------------------------------------------- reward model


def reward_model(run: Run, narrow: bool) -> Chart | None:
    """Accuracies with intervals beside their baselines, and the reliability diagram."""
    metrics = run.metrics("reward")
    if not metrics:
        return None
    measured = [
        ("reward model", metrics.get("accuracy"), "p0"),
        ("the longer wins", metrics.get("accuracy_longer_wins"), "base"),
    ]
    by_labeler = metrics.get("accuracy_by_labeler") or {}
    measured += [(f"by {name}", value, "p0") for name, value in sorted(by_labeler.items())]
    rows = [
        _row(label, value, percent_interval(value), series, hollow=i > 1)
        for i, (label, value, series) in enumerate(measured)
    ]
    panels = []
    if accuracies := dots(rows, 130 if narrow else 250, "accuracy on unseen prompts", reference=0.5, format="%"):
        panels.append(accuracies.properties(title="Accuracy"))
    if bins := metrics.get("accuracy_by_confidence"):
        panels.append(_reliability(bins))
    return alt.concat(*panels, columns=1 if narrow else 2, spacing=44) if panels else None


def _reliability(bins: list[dict]) -> Chart:
    low = min(0.5, min(row["accuracy"] for row in bins), min(row["confidence"] for row in bins))
    scale = alt.Scale(domain=[math.floor(10 * low) / 10, 1], nice=False)
    base = alt.Chart(
        _data([{key: row[key] for key in ("confidence", "accuracy", "n")} | {"label": f"n={row['n']}"} for row in bins])
    )
    x = alt.X(
        "confidence:Q", scale=scale, axis=alt.Axis(title="confidence of the reward model", format="%", tickCount=5)
    )
    y = alt.Y("accuracy:Q", scale=scale, axis=alt.Axis(title=None, format="%", tickCount=5))
    diagonal = alt.Chart(_data([{"at": scale.domain[0]}, {"at": 1}])).mark_line(
        color=MUTED, strokeDash=[4, 3], strokeWidth=1
    )
    return alt.layer(
        diagonal.encode(x=alt.X("at:Q"), y=alt.Y("at:Q")),
        base.mark_line(color=COLOURS["p0"], strokeWidth=1.5, opacity=0.6).encode(x=x, y=y),
        base.mark_point(color=COLOURS["p0"], filled=True, opacity=1).encode(x=x, y=y, size=alt.Size("n:Q", scale=alt.Scale(range=[30, 240]), legend=None)),
        base.mark_text(dy=18, fontSize=10, color=MUTED).encode(x=x, y=y, text="label:N"),
    ).properties(width=210, height=180, title="How often it is right, by confidence")  # fmt: skip


FIGURES: dict[str, Callable[[Run, bool], Chart | None]] = {
    "win_rates": win_rates,
    "gold": gold,
    "reward_kl": reward_kl,
    "learning": learning,
    "probes": probes,
    "preferences": preferences,
    "reward_model": reward_model,
    "forgetting": forgetting,
}
