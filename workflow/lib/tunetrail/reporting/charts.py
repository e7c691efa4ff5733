"""The figures, as Altair charts turned into SVG without a browser.

Each `FIGURES[name](run, narrow)` gives a Vega-Lite spec, or None where nothing was measured. Colours are written
literally, so that the page can turn them with CSS in dark mode; the bytes depend on the numbers only.
"""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import altair as alt
import vl_convert

from tunetrail.reporting.collect import Artifact, Model, Run
from tunetrail.reporting.numbers import NOT_MEASURED, interval, percent_interval

Spec = dict[str, Any]
Chart = Any  # Altair's kinds of charts share no base class with what is used here

# Okabe and Ito's palette, told apart with any colour vision; page.css has the same with lighter twins for dark mode.
COLOURS = {
    "base": "#7a828a", "sft": "#22272b",
    "p0": "#0072b2", "p1": "#d55e00", "p2": "#009e73", "p3": "#cc79a7", "p4": "#e69f00", "p5": "#56b4e9",
}  # fmt: skip
INK, MUTED, LINE, PAPER = "#22272b", "#66707a", "#dfe3e7", "#ffffff"
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
PLOT = {False: 500, True: 140}
"""Width of a plot in pixels, by `narrow` (a phone)."""


CONFIG = {
    "background": PAPER,
    "font": FONT,
    "padding": {"left": 4, "top": 4, "right": 20, "bottom": 4},  # a browser without these fonts sets wider letters
    "view": {"stroke": None},
    "axis": {
        "domain": False, "ticks": False, "gridColor": LINE, "labelColor": MUTED, "titleColor": MUTED, "labelFontSize": 11,
        "titleFontSize": 11, "titleFontWeight": "normal", "labelPadding": 6, "labelFlush": False, "titlePadding": 8,
    },
    "title": {"color": INK, "fontSize": 11, "fontWeight": "bold", "anchor": "start", "offset": 8},
}  # fmt: skip


def svg(spec: Spec | None) -> str:
    """SVG of a Vega-Lite spec, on white; for None one that says 'not measured'."""
    if spec is None:
        words = alt.Chart(_data([{}])).mark_text(text=NOT_MEASURED, color=MUTED, fontSize=13, fontStyle="italic")
        spec = grid([[words.properties(width=240, height=40)]])
    return vl_convert.vegalite_to_svg(spec | {"config": CONFIG})


def grid(rows: list[list[Chart]], across: int = 0, down: int = 0) -> Spec:
    """Charts in rows, so many pixels apart. Altair's own concat does the same but copies every chart many times."""
    read = {"validate": False, "context": {"top_level": False}}
    return {
        "vconcat": [{"hconcat": [chart.to_dict(**read) for chart in row], "spacing": across} for row in rows],
        "spacing": down,
    }


def _beside(panels: list[Chart], narrow: bool) -> Spec:
    return grid([[panel] for panel in panels] if narrow else [panels], across=30, down=30)


def _data(rows: list[dict]) -> alt.Data:
    """Rows as one string of JSON: Altair copies its charts again and again, and a string is copied for free."""
    return alt.Data(values=json.dumps(rows), format={"type": "json"})


def wrap(name: str) -> str:
    """A long name on two lines, broken after the hyphen nearest to its middle.

    >>> wrap("dpo-beta-0.05-learning-rate-1e-05")
    'dpo-beta-0.05-\\nlearning-rate-1e-05'
    """
    breaks = [i + 1 for i, letter in enumerate(name[:-1]) if letter == "-"]
    if len(name) <= 18 or not breaks:
        return name
    middle = min(breaks, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def _title(text: str, size: float = 12) -> Chart:
    """A panel's title as a mark: real titles shift with the labels of the axis, and would not stand in line."""
    mark = alt.Chart(_data([{}])).mark_text(
        text=text, align="left", baseline="bottom", fontWeight="bold", fontSize=size, color=INK
    )
    return mark.encode(x=alt.value(0), y=alt.value(-10))


def _colour() -> alt.Color:
    return alt.Color("colour:N", scale=None)


def _names() -> alt.Y:
    """One row a model, in the order given."""
    axis = alt.Axis(labelFontSize=12, labelColor=INK, labelLimit=170, grid=False, labelExpr="split(datum.label, '\\n')")
    return alt.Y("label:N", sort=None, title=None, axis=axis)


def _row(label: str, value: dict | None, text: str, series: str, hollow: bool = False) -> dict:
    place = {key: value[key] for key in ("mean", "low", "high")} if value else {}
    return {
        "label": wrap(label),
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
    y, scale = _names(), alt.Scale(domain=domain, nice=False, zero=False)
    x = alt.X("mean:Q", scale=scale, axis=alt.Axis(title=title, tickCount=6 if width > 200 else 3, **axis))
    base = alt.Chart(_data(rows))
    layers = [
        base.mark_rule(strokeWidth=2.5, strokeCap="round").encode(
            y=y, x=alt.X("low:Q", scale=scale), x2="high:Q", color=_colour()
        ),
        base.mark_point(size=85, filled=True, opacity=1, strokeWidth=2).encode(
            y=y, x=x, fill=alt.Fill("fill:N", scale=None), stroke=alt.Stroke("colour:N", scale=None)
        ),
        base.mark_text(align="left", fontSize=11.5, color=INK).encode(y=y, x=alt.value(width + 14), text="text:N"),
    ]
    if reference is not None:
        rule = alt.Chart(_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.insert(0, rule.encode(x=alt.X("at:Q", scale=scale)))
    return alt.layer(*layers).properties(width=width, height=alt.Step(34))


# ----------------------------------------------------------------------------- results


def win_rates(run: Run, narrow: bool) -> Spec | None:
    rows = [
        _row(m.name, m.interval("win_rate_vs_sft"), percent_interval(m.interval("win_rate_vs_sft")), m.series)
        for m in run.models
        if m.name != "sft"
    ]
    axis = {"format": "%", "domain": [0, 1]}
    chart = dots(rows, PLOT[narrow], "win rate against sft, ties count half", reference=0.5, **axis)
    return chart and grid([[chart]])


def gold(run: Run, narrow: bool) -> Spec | None:
    """Two panels, one below the other: sampled responses and greedy ones."""
    keys = {"gold": "Sampled", "greedy_gold": "Decoded greedily"}
    found = [value for key in keys for m in run.models if (value := m.interval(key))]
    if not found:
        return None
    low, high = min(value["low"] for value in found), max(value["high"] for value in found)
    margin = 0.06 * (high - low) or 0.5
    panels = []
    for key, title in keys.items():
        measured = [m for m in run.models if m.interval(key) or key == "gold"]
        rows = [_row(m.name, m.interval(key), interval(m.interval(key), 1), m.series) for m in measured]
        if chart := dots(rows, PLOT[narrow], "gold score", domain=[low - margin, high + margin]):
            panels.append([alt.layer(chart, _title(title))])
    return grid(panels, down=26)


def forgetting(run: Run, narrow: bool) -> Spec | None:
    rows = []
    for model in run.models:
        if model.name == "base":
            continue
        change = (model.metrics.get("retention") or {}).get("change_vs_base")
        adapter = model.metrics.get("adapter")
        label = f"{model.name} ({'LoRA' if adapter == 'lora' else adapter})" if adapter else model.name
        rows.append(_row(label, change, interval(change, 3, sign=True), model.series, hollow=adapter == "lora"))
    chart = dots(rows, PLOT[narrow], "change of NLL, nats a token (right: forgotten)", reference=0)
    return chart and grid([[chart]])


def reward_kl(run: Run, narrow: bool) -> Spec | None:
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
                {"label": wrap(model.name), "colour": COLOURS[model.series], "shape": shape}
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
            base.mark_text(align="left", dx=8, dy=-9, fontSize=12, fontWeight="bold", lineBreak="\n").encode(x=x, y=y, text="label:N", color=_colour()),
        ]  # fmt: skip
        panels.append(alt.layer(*layers, _title(title)).properties(width=270 if narrow else 310, height=230))
    return _beside(panels, narrow) if panels else None


def over_optimisation(run: Run, narrow: bool) -> Spec | None:
    """Two panels, reward-model score and gold score of PPO's episodes (where it was watched), along the way that training took them."""
    learners = [(m, run.artifacts.get(f"policy.{m.name}")) for m in run.policies if m.metrics.get("method") == "ppo"]
    panels = []
    for key, title in (("score", "Reward-model score"), ("gold", "Gold score")):
        rows: list[dict] = []
        for model, artifact in learners:
            points = [row for row in (artifact.history if artifact else []) if row.get(key) is not None]
            kls, scores = (_means([row[name] for row in points]) for name in ("kl", key))
            rows += [
                {"step": row["step"], "kl": max(0.0, kl), "score": score, "line": model.name, "colour": COLOURS[model.series]}
                for row, kl, score in _thinned(list(zip(points, kls, scores, strict=True)))
            ]  # fmt: skip
        if not rows:
            continue
        few = len(rows) <= 24
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("kl:Q", scale=alt.Scale(type="sqrt", nice=False, padding=8), axis=alt.Axis(title="KL to sft, nats an episode (√ scale)", tickCount=5)),
            y=alt.Y("score:Q", scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(title=None, tickCount=5)),
            color=_colour(), detail="line:N", order="step:Q",
        )  # fmt: skip
        layers = [base.mark_line(strokeWidth=1.5, opacity=0.6), base.mark_point(filled=True, opacity=1, size=40 if few else 10)]  # fmt: skip
        if few:
            layers.append(base.mark_text(dx=8, dy=-7, fontSize=10).encode(text="step:Q"))
        panels.append(alt.layer(*layers, _title(title)).properties(width=270 if narrow else 310, height=230))
    return _beside(panels, narrow) if panels else None


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


MOST_POINTS = 300
"""Of a curve; of more steps every second, third, … is drawn, so that a long run's page stays small."""


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def _means(values: list[float]) -> list[float]:
    """The mean of each value and the tenth of the curve before it."""
    return smooth(values, max(1, len(values) // 10))


def _thinned(points: list) -> list:
    return points[:: math.ceil(len(points) / MOST_POINTS) or 1]


def _curve_rows(artifact: Artifact, colour: str, keys: tuple[str, ...]) -> list[dict]:
    rows = []
    for key in keys:
        points = [(row["step"], row[key]) for row in artifact.history if row.get(key) is not None]
        means, dashed = _means([value for _, value in points]), key == "logps/rejected"
        for (step, value), mean in _thinned(list(zip(points, means, strict=True))):
            rows.append({"step": step, "value": value, "mean": mean, "colour": colour, "line": f"{artifact.role} {key}", "dashed": dashed})  # fmt: skip
    return rows


def learning(run: Run, narrow: bool) -> Spec | None:
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
                    panels.append(_curve(f"{stage}: {title}", rows, reference, 125 if narrow else 142))
        rows_of_panels += [panels[i : i + 2] for i in range(0, len(panels), 2)] if narrow else [panels]
    rows_of_panels = [panels for panels in rows_of_panels if panels]
    if not rows_of_panels:
        return None
    return grid(rows_of_panels, across=10, down=14)


def _curve(title: str, rows: list[dict], reference: float | None, width: int) -> Chart:
    base = alt.Chart(_data(rows))
    steps = sorted({row["step"] for row in rows})
    ticks: dict[str, Any] = {"tickCount": 3} if len(steps) > 4 else {"values": steps}
    x = alt.X("step:Q", scale=alt.Scale(nice=False), axis=alt.Axis(title=None, format="d", grid=False, **ticks))
    scale, axis = alt.Scale(zero=False, padding=4), alt.Axis(title=None, tickCount=4, minExtent=26)
    dash = alt.StrokeDash("dashed:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [4, 2]]), legend=None)
    layers = [
        base.mark_line(strokeWidth=1, opacity=0.35).encode(
            x=x, y=alt.Y("value:Q", scale=scale, axis=axis), color=_colour(), detail="line:N"
        ),
        base.mark_line(strokeWidth=2).encode(x=x, y=alt.Y("mean:Q"), color=_colour(), detail="line:N", strokeDash=dash),
    ]
    if len(steps) <= 12:  # few steps: show each
        layers.append(base.mark_point(size=22, filled=True, opacity=1).encode(x=x, y=alt.Y("value:Q"), color=_colour()))
    if reference is not None:
        layers.insert(
            0, alt.Chart(_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y=alt.Y("at:Q"))
        )
    return alt.layer(*layers, _title(title, 11)).properties(width=width, height=95)


# ----------------------------------------------------------------------------- probes


def visible(token: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")


def probes(run: Run, narrow: bool) -> Spec | None:
    """A row of bars a model: the probability of each token of the sentence, in reading order."""
    rows = [
        {"model": m.name, "place": i, "token": visible(position["token"]), "prob": position["prob"], "colour": COLOURS[m.series]}
        for m in run.models
        for i, position in enumerate(m.sentence)
        if position.get("prob") is not None
    ]  # fmt: skip
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
            title=None, labels=last, labelExpr=label, labelAngle=-60, labelFontSize=10, labelColor=INK, grid=False
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
    return grid([[panel] for panel in panels], down=6)


def preferences(run: Run, narrow: bool) -> Spec | None:
    """A panel a probe and one for the held-out pairs: log-probability of the preferred (full dot) and the other response."""
    panels: dict[str, list[dict]] = {}

    def add(panel: str, model: Model, preferred: float | None, dispreferred: float | None) -> None:
        if preferred is not None and dispreferred is not None:
            row = {
                "label": wrap(model.name),
                "colour": COLOURS[model.series],
                "preferred": preferred,
                "dispreferred": dispreferred,
            }
            panels.setdefault(panel, []).append(row)

    for model in run.models:
        for probe in model.preferences:
            add(probe["prompt"], model, probe["preferred_logp"], probe["dispreferred_logp"])
    for model in run.models:
        pairs = model.metrics.get("comparisons") or {}
        chosen, rejected = pairs.get("chosen_logps") or {}, pairs.get("rejected_logps") or {}
        add("Held-out pairs, mean", model, chosen.get("mean"), rejected.get("mean"))

    limit, drawn = (36 if narrow else 80), []
    for title, rows in panels.items():
        base, y = alt.Chart(_data(rows)), _names()
        x = alt.X("preferred:Q", scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(title=None, tickCount=5))
        layers = [
            base.mark_rule(strokeWidth=2, opacity=0.5).encode(y=y, x=x, x2="dispreferred:Q", color=_colour()),
            base.mark_point(size=70, filled=True, opacity=1).encode(y=y, x=x, color=_colour()),
            base.mark_point(size=70, filled=True, opacity=1, fill=PAPER, strokeWidth=2).encode(
                y=y, x=alt.X("dispreferred:Q"), stroke=alt.Stroke("colour:N", scale=None)
            ),
            _title(title if len(title) <= limit else title[: limit - 1] + "…"),
        ]
        drawn.append(alt.layer(*layers).properties(width=230 if narrow else 560, height=alt.Step(28)))
    return grid([[chart] for chart in drawn], down=14) if drawn else None


# ----------------------------------------------------------------------------- reward model


def reward_model(run: Run, narrow: bool) -> Spec | None:
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
    if accuracies := dots(rows, 120 if narrow else 225, "accuracy on unseen prompts", reference=0.5, format="%"):
        panels.append(alt.layer(accuracies, _title("Accuracy")))
    if bins := metrics.get("accuracy_by_confidence"):
        panels.append(_reliability(bins))
    return _beside(panels, narrow) if panels else None


def _reliability(bins: list[dict]) -> Chart:
    low = min(0.5, min(row["accuracy"] for row in bins), min(row["confidence"] for row in bins))
    low = max(0.0, math.floor(10 * low - 0.5) / 10)  # room for the labels below the dots
    scale = alt.Scale(domain=[low, 1], nice=False, zero=False)
    axis: dict[str, Any] = {"format": "%", "values": [i / 20 for i in range(0, 21, 2 if low >= 0.4 else 5)]}
    few = len(bins) <= 6  # labels of more would cover each other
    rows = [row | {"label": f"n={row['n']}" if few else ""} for row in bins]
    base = alt.Chart(_data(rows))
    x = alt.X("confidence:Q", scale=scale, axis=alt.Axis(title="confidence of the reward model", **axis))
    y = alt.Y("accuracy:Q", scale=scale, axis=alt.Axis(title=None, **axis))
    diagonal = alt.Chart(_data([{"at": low}, {"at": 1}])).mark_line(color=MUTED, strokeDash=[4, 3], strokeWidth=1)
    return alt.layer(
        diagonal.encode(x=alt.X("at:Q", scale=scale), y=alt.Y("at:Q", scale=scale)),
        base.mark_point(color=COLOURS["p0"], filled=True, opacity=1).encode(x=x, y=y, size=alt.Size("n:Q", scale=alt.Scale(domainMin=0, range=[15, 260]), legend=None)),
        base.mark_text(dy=18, fontSize=10, color=MUTED).encode(x=x, y=y, text="label:N"),
        _title("How often it is right, by confidence"),
    ).properties(width=205, height=180)  # fmt: skip


FIGURES: dict[str, Callable[[Run, bool], Spec | None]] = {
    "win_rates": win_rates,
    "gold": gold,
    "reward_kl": reward_kl,
    "over_optimisation": over_optimisation,
    "learning": learning,
    "probes": probes,
    "preferences": preferences,
    "reward_model": reward_model,
    "forgetting": forgetting,
}
