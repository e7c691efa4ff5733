"""Building blocks of the figures: Altair charts, converted to SVG without a browser.

A figure is a function of a page's runs (usually one) that returns a Vega-Lite spec, or None if nothing was measured;
`narrow` is for a phone. Colours are literal, so that the page can change them with CSS in dark mode. The bytes depend
only on the numbers.
"""

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from tunetrail.reporting.collect import Model, Run
from tunetrail.reporting.numbers import NOT_MEASURED, interval

Spec = dict[str, Any]
Runs = Sequence[Run]
Chart = Any  # Altair's chart types have no common base class with the methods used here

# Okabe and Ito's palette, distinguishable with any colour vision; page.css has lighter versions for dark mode.
COLOURS = {
    "base": "#7a828a",
    "sft": "#22272b",
    "p0": "#0072b2",
    "p1": "#d55e00",
    "p2": "#009e73",
    "p3": "#cc79a7",
    "p4": "#e69f00",
    "p5": "#56b4e9",
}
INK, MUTED, LINE, PAPER, SHADE = "#22272b", "#66707a", "#dfe3e7", "#ffffff", "#e69f00"
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
BEFORE, AFTER = COLOURS["base"], COLOURS["p0"]
PLOT = {False: 500, True: 140}
"""Width of a plot in pixels, by `narrow` (a phone)."""


CONFIG = {
    "background": PAPER,
    "font": FONT,
    "padding": {"left": 10, "top": 4, "right": 36, "bottom": 4},  # room for wider fonts, if a browser lacks these
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": LINE,
        "labelColor": MUTED,
        "titleColor": MUTED,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelPadding": 6,
        "labelFlush": False,
        "titlePadding": 8,
    },
    "title": {"color": INK, "fontSize": 11, "fontWeight": "bold", "anchor": "start", "offset": 8},
}


def svg(spec: Spec | None) -> str:
    """The SVG of a Vega-Lite spec on white; for None, one that says 'not measured'."""
    if spec is None:
        words = alt.Chart(inline_data([{}])).mark_text(text=NOT_MEASURED, color=MUTED, fontSize=13, fontStyle="italic")
        spec = grid([[words.properties(width=240, height=40)]])
    return _MARK.sub(_titled, vl_convert.vegalite_to_svg(spec | {"config": CONFIG}))


_MARK = re.compile(
    r'<(path|line|text) aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="([^"]*)"([^>]*?)(/?)>'
)
_WORDS = {"kl": "KL", "prob": "probability", "n": "pairs"}
_HIDDEN = (
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
    """A mark with its values as its title, which is the tooltip; Vega describes them as `field: value; field:
    value`."""
    element, label, kind, rest, closed = mark.groups()
    tooltip = _tooltip(html.unescape(label))
    if kind == "line mark" or not tooltip:  # of a line Vega describes only the first point
        return f"<{element}{rest}{closed}>"
    title = html.escape(tooltip)
    end = f"<title>{title}</title>" + (f"</{element}>" if closed else "")
    return f'<{element} role="graphics-symbol" aria-label="{title}"{rest}>{end}'


def _tooltip(label: str) -> str:
    """
    >>> _tooltip("mean: 58.333333%; label: dpo; fill: #0072b2"), _tooltip("dpo, step 3: loss 0.61")
    ('dpo: mean 58.3%', 'dpo, step 3: loss 0.61')
    """
    fields = dict(item.partition(": ")[::2] for item in label.split("; ") if ": " in item)
    if not fields or " " in next(iter(fields)):  # a description of our own
        return label
    names = " ".join(fields[key] for key in ("label", "token", "first") if fields.get(key))
    if fields.get("text"):
        return f"{names}: {fields['text']}".removeprefix(": ")
    values = [f"{_WORDS.get(k, k.replace('_', ' '))} {_short(v)}" for k, v in fields.items() if k not in _HIDDEN]
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
    """Charts in rows, `across` and `down` pixels apart. Altair's concat does the same but copies charts many times."""
    options = {"validate": False, "context": {"top_level": False}}
    return {
        "vconcat": [{"hconcat": [chart.to_dict(**options) for chart in row], "spacing": across} for row in rows],
        "spacing": down,
    }


def side_by_side(panels: list[Chart], narrow: bool) -> Spec:
    """Panels in a row, or below each other on a narrow screen."""
    return grid([[panel] for panel in panels] if narrow else [panels], across=30, down=30)


def inline_data(rows: list[dict]) -> alt.Data:
    """Rows as one string of JSON: Altair copies charts repeatedly, and copying a string costs nothing."""
    return alt.Data(values=json.dumps(rows), format={"type": "json"})


def wrap(name: str) -> str:
    """A long name on two lines, broken after the space (or, without spaces, the hyphen) nearest to its middle.

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


def panel_title(text: str, size: float = 12) -> Chart:
    """A panel's title as a mark: real titles shift with the labels of the axis and would not be aligned."""
    mark = alt.Chart(inline_data([{}])).mark_text(
        text=text, align="left", baseline="bottom", fontWeight="bold", fontSize=size, color=INK
    )
    return mark.encode(x=alt.value(0), y=alt.value(-10))


def own_colour() -> alt.Color:
    """Colours each row as its "colour" says."""
    return alt.Color("colour:N", scale=None)


def _names() -> alt.Y:
    """One row per model, in the order given."""
    axis = alt.Axis(labelFontSize=12, labelColor=INK, labelLimit=170, grid=False, labelExpr="split(datum.label, '\\n')")
    return alt.Y("label:N", sort=None, title=None, axis=axis)


def dot_row(label: str, value: dict | None, text: str, series: str, hollow: bool = False) -> dict:
    """A row for `dots`; a value that was not measured has only a text."""
    ends = {key: value[key] for key in ("mean", "low", "high")} if value else {}
    return {
        "label": wrap(label),
        "text": text,
        "colour": COLOURS[series],
        "fill": PAPER if hollow else COLOURS[series],
    } | ends


def dots(rows: list[dict], width: int, title: str, reference: float | None = None, **axis: Any) -> Chart | None:
    """One row per model: a dot, its 95% interval as a line, and the numbers to its right; a rule at `reference`."""
    measured = [row for row in rows if "mean" in row]
    if not measured:
        return None
    ends = [row[key] for row in measured for key in ("low", "high")] + ([] if reference is None else [reference])
    margin = 0.06 * (max(ends) - min(ends)) or 0.5
    domain = axis.pop("domain", None) or [min(ends) - margin, max(ends) + margin]
    y, scale = _names(), alt.Scale(domain=domain, nice=False, zero=False)
    x = alt.X("mean:Q", scale=scale, axis=alt.Axis(title=title, tickCount=6 if width > 200 else 3, **axis))
    base = alt.Chart(inline_data(rows))
    layers = [
        base.mark_rule(strokeWidth=2.5, strokeCap="round").encode(
            y=y, x=alt.X("low:Q", scale=scale), x2="high:Q", color=own_colour()
        ),
        base.mark_point(size=85, filled=True, opacity=1, strokeWidth=2).encode(
            y=y, x=x, fill=alt.Fill("fill:N", scale=None), stroke=alt.Stroke("colour:N", scale=None)
        ),
        base.mark_text(align="left", fontSize=11.5, color=INK).encode(y=y, x=alt.value(width + 14), text="text:N"),
    ]
    if reference is not None:
        rule = alt.Chart(inline_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.insert(0, rule.encode(x=alt.X("at:Q", scale=scale)))
    return alt.layer(*layers).properties(width=width, height=alt.Step(34))


# ----------------------------------------------------------------------------- results


def gold(runs: Runs, narrow: bool) -> Spec | None:
    """Two panels below each other: sampled and greedy responses."""
    keys = {"gold": "Sampled", "greedy_gold": "Decoded greedily"}
    models = [m for run in runs for m in run.models]
    intervals = [value for key in keys for m in models if (value := m.interval(key))]
    if not intervals:
        return None
    low, high = min(value["low"] for value in intervals), max(value["high"] for value in intervals)
    margin = 0.06 * (high - low) or 0.5
    panels = []
    for key, title in keys.items():
        measured = [m for m in models if m.interval(key) or key == "gold"]
        rows = [dot_row(m.name, m.interval(key), interval(m.interval(key), 1), m.series) for m in measured]
        if chart := dots(rows, PLOT[narrow], "gold score", domain=[low - margin, high + margin]):
            panels.append([alt.layer(chart, panel_title(title))])
    return grid(panels, down=26)


# ----------------------------------------------------------------------------- probes


def visible(token: str) -> str:
    """A token with visible spaces and line ends; characters that cannot be printed, or be in SVG, as their code.

    >>> visible(" a\\n\\x06")
    '␣a⏎\\\\x06'
    """
    token = token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in token)


def token_bars(
    tokens: list[dict], own: str, title: str, *, width: int, bar: int, size: float, names: dict, axis: dict
) -> Chart:
    """A panel with two bars per token: its probability before training (grey) and after (blue).

    Args:
        tokens: from one position of `evaluation.probes.shift`, the topmost first; an unknown probability has no bar.
        own: the sentence's own token, marked by an arrow.
        width, bar: of the panel, and the height of a bar, in pixels.
        size: of the title.
        names, axis: options of the axes of tokens and of probabilities.
    """
    labels = [f"{'→ ' if token['token'] == own else ''}{visible(token['token'])}" for token in tokens]
    rows = [
        {"place": i, "token": labels[i], "when": when, "prob": token[when], "colour": colour}
        for i, token in enumerate(tokens)
        for when, colour in (("before", BEFORE), ("after", AFTER))
        if token[when] is not None
    ]
    name_axis = alt.Axis(
        title=None, grid=False, labelColor=INK, labelExpr=f"{json.dumps(labels)}[datum.value]", **names
    )
    chart = (
        alt.Chart(inline_data(rows))
        .mark_bar(height=bar)
        .encode(
            y=alt.Y("place:O", axis=name_axis),
            yOffset=alt.YOffset("when:N", sort=["before", "after"]),
            x=alt.X("prob:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, format="%", **axis)),
            color=own_colour(),
        )
    )
    return alt.layer(chart, panel_title(title, size)).properties(width=width, height=alt.Step(bar + 3))


def preferences(runs: Runs, narrow: bool) -> Spec | None:
    """One panel per probe and one for the held-out pairs: log-probs of the preferred (full dot) and the other
    response."""
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
        base, y = alt.Chart(inline_data(rows)), _names()
        x = alt.X("preferred:Q", scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(title=None, tickCount=5))
        layers = [
            base.mark_rule(strokeWidth=2, opacity=0.5).encode(y=y, x=x, x2="dispreferred:Q", color=own_colour()),
            base.mark_point(size=70, filled=True, opacity=1).encode(y=y, x=x, color=own_colour()),
            base.mark_point(size=70, filled=True, opacity=1, fill=PAPER, strokeWidth=2).encode(
                y=y, x=alt.X("dispreferred:Q"), stroke=alt.Stroke("colour:N", scale=None)
            ),
            panel_title(title if len(title) <= limit else title[: limit - 1] + "…"),
        ]
        drawn.append(alt.layer(*layers).properties(width=230 if narrow else 560, height=alt.Step(28)))
    return grid([[chart] for chart in drawn], down=14) if drawn else None
