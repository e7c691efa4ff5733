"""The figures, as Altair charts turned into SVG without a browser.

A function of the runs of a page (mostly one) gives a Vega-Lite spec, or None where nothing was measured; `narrow` is
for a phone. Colours are written literally, so that the page can turn them with CSS in dark mode; the bytes depend on
the numbers only.
"""

import html
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from tunetrail.reporting.collect import Artifact, Model, Run, reference_of
from tunetrail.reporting.numbers import NOT_MEASURED, interval

Spec = dict[str, Any]
Runs = Sequence[Run]
Chart = Any  # Altair's kinds of charts share no base class with what is used here

# Okabe and Ito's palette, told apart with any colour vision; page.css has the same with lighter twins for dark mode.
COLOURS = {
    "base": "#7a828a", "sft": "#22272b",
    "p0": "#0072b2", "p1": "#d55e00", "p2": "#009e73", "p3": "#cc79a7", "p4": "#e69f00", "p5": "#56b4e9",
}  # fmt: skip
INK, MUTED, LINE, PAPER, SHADE = "#22272b", "#66707a", "#dfe3e7", "#ffffff", "#e69f00"
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
PLOT = {False: 500, True: 140}
"""Width of a plot in pixels, by `narrow` (a phone)."""


CONFIG = {
    "background": PAPER,
    "font": FONT,
    "padding": {"left": 10, "top": 4, "right": 36, "bottom": 4},  # a browser without these fonts sets wider letters
    "view": {"stroke": None},
    "axis": {
        "domain": False, "ticks": False, "gridColor": LINE, "labelColor": MUTED, "titleColor": MUTED,
            "labelFontSize": 11,
        "titleFontSize": 11, "titleFontWeight": "normal", "labelPadding": 6, "labelFlush": False, "titlePadding": 8,
    },
    "title": {"color": INK, "fontSize": 11, "fontWeight": "bold", "anchor": "start", "offset": 8},
}  # fmt: skip


def svg(spec: Spec | None) -> str:
    """SVG of a Vega-Lite spec, on white; for None one that says 'not measured'."""
    if spec is None:
        words = alt.Chart(_data([{}])).mark_text(text=NOT_MEASURED, color=MUTED, fontSize=13, fontStyle="italic")
        spec = grid([[words.properties(width=240, height=40)]])
    return _MARK.sub(_titled, vl_convert.vegalite_to_svg(spec | {"config": CONFIG}))


_MARK = re.compile(
    r'<(path|line|text) aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="([^"]*)"([^>]*?)(/?)>'
)
_WORDS = {"kl": "KL", "prob": "probability", "n": "pairs"}
_UNSAID = (
    "colour",
    "fill",
    "shape",
    "ink",
    "line",
    "dashed",
    "chosen",
    "place",
    "at",
    "label",
    "token",
    "text",
    "first",
)


def _titled(mark: re.Match) -> str:
    """A mark with what it shows as its title, which is the tooltip; Vega tells it as `field: value; field: value`."""
    element, label, kind, rest, closed = mark.groups()
    said = _said(html.unescape(label))
    if kind == "line mark" or not said:  # of a line Vega tells the first point alone
        return f"<{element}{rest}{closed}>"
    title = html.escape(said)
    end = f"<title>{title}</title>" + (f"</{element}>" if closed else "")
    return f'<{element} role="graphics-symbol" aria-label="{title}"{rest}>{end}'


def _said(label: str) -> str:
    """
    >>> _said("mean: 58.333333%; label: dpo; fill: #0072b2"), _said("dpo, step 3: loss 0.61")
    ('dpo: mean 58.3%', 'dpo, step 3: loss 0.61')
    """
    found = dict(item.partition(": ")[::2] for item in label.split("; ") if ": " in item)
    if not found or " " in next(iter(found)):  # a description of our own
        return label
    names = " ".join(found[key] for key in ("label", "token", "first") if found.get(key))
    if found.get("text"):
        return f"{names}: {found['text']}".removeprefix(": ")
    values = [f"{_WORDS.get(k, k.replace('_', ' '))} {_short(v)}" for k, v in found.items() if k not in _UNSAID]
    return ": ".join(filter(None, [names, ", ".join(values)]))


def _short(value: str) -> str:
    """
    >>> _short("0.291013598443"), _short("58.333333%"), _short("sft")
    ('0.291', '58.3%', 'sft')
    """
    try:
        return f"{float(value.rstrip('%').replace('−', '-')):.3g}".replace("-", "−") + "%" * value.endswith("%")
    except ValueError:
        return value


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
    """A long name on two lines, broken after the space or else the hyphen nearest to its middle.

    >>> wrap("dpo-beta-0.05-learning-rate-1e-05")
    'dpo-beta-0.05-\\nlearning-rate-1e-05'
    >>> wrap("best-of-4: rejected")
    'best-of-4: \\nrejected'
    """
    breaks = [i + 1 for i, letter in enumerate(name[:-1]) if letter == (" " if " " in name else "-")]
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


def gold(runs: Runs, narrow: bool) -> Spec | None:
    """Two panels, one below the other: sampled responses and greedy ones."""
    keys = {"gold": "Sampled", "greedy_gold": "Decoded greedily"}
    models = [m for run in runs for m in run.models]
    found = [value for key in keys for m in models if (value := m.interval(key))]
    if not found:
        return None
    low, high = min(value["low"] for value in found), max(value["high"] for value in found)
    margin = 0.06 * (high - low) or 0.5
    panels = []
    for key, title in keys.items():
        measured = [m for m in models if m.interval(key) or key == "gold"]
        rows = [_row(m.name, m.interval(key), interval(m.interval(key), 1), m.series) for m in measured]
        if chart := dots(rows, PLOT[narrow], "gold score", domain=[low - margin, high + margin]):
            panels.append([alt.layer(chart, _title(title))])
    return grid(panels, down=26)


def over_optimisation(runs: Runs, narrow: bool) -> Spec | None:
    """Two panels, reward-model score and gold score of PPO's episodes (where it was watched), along the way that
    training took them.
    """
    learners = [m for run in runs for m in run.policies if m.metrics.get("method") == "ppo"]
    panels = []
    for key, title in (("score", "Reward-model score"), ("gold", "Gold score")):
        rows: list[dict] = []
        for model in learners:
            points = [row for row in (model.trained.history if model.trained else []) if row.get(key) is not None]
            kls, scores = (_means([row[name] for row in points]) for name in ("kl", key))
            rows += [
                {
                    "step": row["step"], "kl": max(0.0, kl), "score": score, "line": model.name,
                        "colour": COLOURS[model.series],
                    "tip": f"{model.name}, step {row['step']}: score {score:.4g}, KL {kl:.3g}",
                }
                for row, kl, score in _thinned(list(zip(points, kls, scores, strict=True)))
            ]  # fmt: skip
        if not rows:
            continue
        few = len(rows) <= 24
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("kl:Q", scale=alt.Scale(type="sqrt", nice=False, padding=8),
                axis=alt.Axis(title=f"KL to {reference_of(runs)}, nats an episode (√ scale)", tickCount=5)),
            y=alt.Y("score:Q", scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(title=None, tickCount=5)),
            color=_colour(), detail="line:N", order="step:Q", description="tip:N",
        )  # fmt: skip
        layers = [
            base.mark_line(strokeWidth=1.5, opacity=0.6),
            base.mark_point(filled=True, opacity=1, size=40 if few else 10),
        ]
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
        ("KL to its start", ("kl",), None),
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


HANDLES = 40
"""Points of a curve that have a tooltip."""


def _curve_rows(artifact: Artifact, name: str, colour: str, keys: tuple[str, ...]) -> list[dict]:
    rows = []
    for key in keys:
        points = [(row["step"], row[key]) for row in artifact.history if row.get(key) is not None]
        means, dashed = _means([value for _, value in points]), key == "logps/rejected"
        thinned = _thinned(list(zip(points, means, strict=True)))
        for i, ((step, value), mean) in enumerate(thinned):
            rows.append(
                {
                    "step": step, "value": value, "mean": mean, "colour": colour, "line": f"{name} {key}",
                        "dashed": dashed,
                    "handle": i % math.ceil(len(thinned) / HANDLES) == 0, "tip": f"{name}, step {step}: "
                        f"{key.rpartition('/')[2]} {value:.4g}",
                }
            )  # fmt: skip
    return rows


def _resumed(artifact: Artifact) -> list[dict]:
    """The segments of a history that attempts after the first trained; the last goes to its end."""
    steps = [*artifact.resumed_at, artifact.history[-1]["step"]]
    spans = itertools.pairwise(steps)
    return [{"from": a, "to": b, "tip": f"resumed from step {a}"} for a, b in spans if a < b]


def learning(runs: Runs, narrow: bool) -> Spec | None:
    """Small multiples; policies of one method share their panels. What was trained after a resumption is shaded."""
    by_stage: dict[str, list[tuple[Artifact, str, str]]] = {}
    for i, run in enumerate(runs):
        for role in ("sft", "reward"):
            if (artifact := run.artifacts.get(role)) and artifact.history:
                colour = COLOURS["sft"] if len(runs) == 1 else list(COLOURS.values())[2 + i % 6]
                by_stage.setdefault(role, []).append((artifact, role if len(runs) == 1 else run.name, colour))
        for model in run.policies:
            if model.trained and model.trained.history:
                by_stage.setdefault(model.trained.stage, []).append((model.trained, model.name, COLOURS[model.series]))
    rows_of_panels = []
    for stages in (("sft", "reward"), ("dpo",), ("ppo",)):
        panels = []
        for stage in stages:
            learners = by_stage.get(stage, [])
            spans = [span for artifact, _, _ in learners for span in _resumed(artifact)]
            for title, keys, reference in CURVES[stage]:
                rows = [row for learner in learners for row in _curve_rows(*learner, keys)]
                if rows:
                    panels.append(_curve(f"{stage}: {title}", rows, reference, spans, 125 if narrow else 142))
        rows_of_panels += [panels[i : i + 2] for i in range(0, len(panels), 2)] if narrow else [panels]
    rows_of_panels = [panels for panels in rows_of_panels if panels]
    return grid(rows_of_panels, across=10, down=14) if rows_of_panels else None


def _curve(title: str, rows: list[dict], reference: float | None, resumed: list[dict], width: int) -> Chart:
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
        base.transform_filter(alt.datum.handle)
        .mark_point(size=22, filled=True, opacity=1 if len(steps) <= 12 else 0)  # of few steps each is shown
        .encode(x=x, y=alt.Y("value:Q"), color=_colour(), description="tip:N"),
    ]
    if reference is not None:
        line = alt.Chart(_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.insert(0, line.encode(y=alt.Y("at:Q")))
    if resumed:
        shade = alt.Chart(_data(resumed)).mark_rect(color=SHADE, opacity=0.18)
        layers.insert(0, shade.encode(x=alt.X("from:Q"), x2="to:Q", description="tip:N"))
    return alt.layer(*layers, _title(title, 11)).properties(width=width, height=95)


# ----------------------------------------------------------------------------- probes


def visible(token: str) -> str:
    """A token with its spaces and line ends to be seen; what cannot be printed, and no SVG may hold, as its code.

    >>> visible(" a\\n\\x06")
    '␣a⏎\\\\x06'
    """
    token = token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in token)


def preferences(runs: Runs, narrow: bool) -> Spec | None:
    """A panel a probe and one for the held-out pairs: log-probability of the preferred (full dot) and the other
    response.
    """
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

    models = [model for run in runs for model in run.models]
    for model in models:
        for probe in model.preferences:
            add(probe["prompt"], model, probe["preferred_logp"], probe["dispreferred_logp"])
    for model in models:
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
