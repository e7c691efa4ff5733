"""The figures of the head-to-head comparison, the frontier, the reward model and contamination, as Vega-Lite specs.

Each takes the content of a metrics file and returns a spec, or None if nothing was measured. `series` maps a model's
name to the name of its colour (`reporting.collect.Model.series`); `narrow` is for a phone.
"""

import math
from collections.abc import Mapping
from typing import Any

import altair as alt

from tunetrail.evaluation.probes import likeliest
from tunetrail.reporting.charts import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    PLOT,
    Chart,
    Spec,
    dot_row,
    dots,
    grid,
    inline_data,
    own_colour,
    panel_title,
    side_by_side,
    token_bars,
    visible,
    wrap,
)
from tunetrail.reporting.numbers import interval, number, percent, percent_interval

Series = Mapping[str, str]
ACROSS = {False: 4, True: 1}
"""How many positions of a sentence are side by side, by `narrow`."""


def win_matrix(match: dict | None, narrow: bool) -> Spec | None:
    """How often the row's model beats the column's; significant results have a star."""
    if not match or not match["pairs"]:
        return None
    rows = []
    for pair in match["pairs"]:
        star = "*" if pair["significant"] else ""
        for first, second, mean in (
            (pair["first"], pair["second"], pair["win_rate"]["mean"]),
            (pair["second"], pair["first"], 1 - pair["win_rate"]["mean"]),
        ):
            text = f"{percent(mean)}{star}"
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "rate": mean,
                    "text": text,
                    "ink": INK if abs(mean - 0.5) < 0.3 else PAPER,
                }
            )
    names = list(dict.fromkeys(name for pair in reversed(match["pairs"]) for name in (pair["first"], pair["second"])))
    order = [score["name"] for score in match["scores"]] or names
    label: dict[str, Any] = {
        "labelFontSize": 12,
        "labelColor": INK,
        "labelLimit": 110 if narrow else 170,
        "grid": False,
    }
    base = alt.Chart(inline_data(rows)).encode(
        y=alt.Y("first:N", sort=order, axis=alt.Axis(title=None, **label)),
        x=alt.X("second:N", sort=order, axis=alt.Axis(title=None, orient="top", labelAngle=-40, **label)),
    )
    colour = alt.Color(
        "rate:Q",
        legend=None,
        scale=alt.Scale(domain=[0, 0.5, 1], range=["#d55e00", "#f3f4f5", "#0072b2"], interpolate="rgb"),
    )
    cells = base.mark_rect(stroke=PAPER, strokeWidth=2).encode(color=colour)
    words = base.mark_text(fontSize=11 if narrow else 12).encode(text="text:N", color=alt.Color("ink:N", scale=None))
    step = 40 if narrow else 62
    chart = alt.layer(cells, words).resolve_scale(color="independent")
    return grid([[chart.properties(width=alt.Step(step), height=alt.Step(34))]])


def strengths(match: dict | None, series: Series, narrow: bool) -> Spec | None:
    """Bradley-Terry strengths."""
    rows = [
        dot_row(score["name"], score["score"], interval(score["score"], 2, sign=True), series[score["name"]])
        for score in (match or {}).get("scores", [])
    ]
    chart = dots(rows, PLOT[narrow], "strength in log-odds, 0 is the model that policies start from", reference=0)
    return chart and grid([[chart]])


def length_controlled(match: dict | None, opponent: str, series: Series, narrow: bool) -> Spec | None:
    """Win rates against one model: as counted (full dot) and at equal lengths (ring)."""
    rows = []
    for pair in (match or {}).get("pairs", []):
        if pair["second"] == opponent:
            for key, more in (("win_rate", ""), ("length_controlled", ", equal length")):
                name, value = pair["first"], pair[key]
                row = dot_row(name, value, percent_interval(value), series[name], hollow=key != "win_rate")
                rows.append(row | {"label": f"{wrap(name)}{more}"})
    axis = {"format": "%", "domain": [0, 1]}
    chart = dots(rows, PLOT[narrow], f"win rate against {opponent}, ties count half", reference=0.5, **axis)
    return chart and grid([[chart]])


# ----------------------------------------------------------------------------- frontier


def frontier(evaluations: Mapping[str, dict], reference: str, series: Series, narrow: bool) -> Spec | None:
    """Reward-model score and gold score against KL to the reference: the checkpoints of each policy in training order,
    the final model with its intervals, and best-of-n as the yardstick.

    Args:
        evaluations: the metrics of each model's evaluation.
        reference: the model that policies start from, in words.
    """
    yardstick = next((m["best_of_n"] for m in evaluations.values() if m.get("best_of_n")), None)
    panels = []
    for key, title in (("reward", "Reward-model score"), ("gold", "Gold score")):
        rows: list[dict] = []
        for name, metrics in evaluations.items():
            all_points = (metrics.get("frontier") or {}).get("points", [])
            points, start = [p for p in all_points if p["kl"] and p[key]], metrics.get("start")
            rows += [
                {
                    "line": name,
                    "order": p["step"],
                    "colour": COLOURS[series[name]],
                    "shape": "circle",
                    "chosen": p["chosen"],
                    "label": wrap(f"{name} (KL to {start})" if start else name) if p["chosen"] else "",
                    "kl": max(0, p["kl"]["mean"]),
                    "kl_low": max(0, p["kl"]["low"]),
                    "kl_high": p["kl"]["high"],
                    "mean": p[key]["mean"],
                    "low": p[key]["low"],
                    "high": p[key]["high"],
                }
                for p in points
            ]
        if not rows:
            continue
        for p in (yardstick or {}).get("points", []):
            if p[key]:
                rows.append(
                    {
                        "line": "best of n",
                        "order": p["n"],
                        "colour": MUTED,
                        "shape": "diamond",
                        "chosen": False,
                        "label": f"n={p['n']}",
                        "kl": p["kl_bound"],
                        "kl_low": p["kl_bound"],
                        "kl_high": p["kl_bound"],
                        **{end: p[key][end] for end in ("mean", "low", "high")},
                    }
                )
        panels.append(
            alt.layer(*_frontier_layers(rows, reference), panel_title(title)).properties(
                width=270 if narrow else 310, height=240
            )
        )
    return side_by_side(panels, narrow) if panels else None


def _frontier_layers(rows: list[dict], reference: str) -> list[Chart]:
    top = max(row["kl_high"] if row["chosen"] else row["kl"] for row in rows)
    base = alt.Chart(inline_data(rows))
    x = alt.X(
        "kl:Q",
        scale=alt.Scale(type="sqrt", domain=[0, 1.2 * top or 1], nice=False),
        axis=alt.Axis(title=f"KL to {reference}, nats per response (√ scale)", tickCount=5),
    )
    y = alt.Y("mean:Q", scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(title=None, tickCount=5))
    chosen, labelled = alt.datum.chosen, alt.datum.label != ""
    return [
        base.mark_line(strokeWidth=1.5, opacity=0.6).encode(
            x=x, y=y, color=own_colour(), detail="line:N", order="order:Q"
        ),
        base.transform_filter(chosen)
        .mark_rule(strokeWidth=1.5, opacity=0.75)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=own_colour()),
        base.transform_filter(chosen)
        .mark_rule(strokeWidth=1.5, opacity=0.75)
        .encode(x=alt.X("kl_low:Q"), x2="kl_high:Q", y=y, color=own_colour()),
        base.mark_point(filled=True, opacity=1).encode(
            x=x,
            y=y,
            color=own_colour(),
            shape=alt.Shape("shape:N", scale=None),
            size=alt.condition(chosen, alt.value(110), alt.value(35)),
        ),
        base.transform_filter(labelled)
        .mark_text(align="left", dx=8, dy=-9, fontSize=11, lineBreak="\n")
        .encode(x=x, y=y, text="label:N", color=own_colour()),
    ]


# ----------------------------------------------------------------------------- what was forgotten, what moved


def forgetting(pairs: list[dict], opponent: str, series: Series, narrow: bool) -> Spec | None:
    """The change, relative to one model, of the loss on unrelated text and of multiple-choice accuracy."""
    panels = []
    for key, title, axis, sign in (
        ("nll", "Loss on unrelated text", "nats per token above {} (right: forgotten)", 3),
        ("choices", "Multiple choice", "accuracy less that of {} (left: forgotten)", 2),
    ):
        rows = []
        for pair in pairs:
            if pair["second"] != opponent:
                continue
            adapter = pair["adapters"][0]
            label = f"{pair['first']} ({'LoRA' if adapter == 'lora' else adapter})" if adapter else pair["first"]
            rows.append(
                dot_row(
                    label,
                    pair[key],
                    interval(pair[key], sign, sign=True),
                    series[pair["first"]],
                    hollow=adapter == "lora",
                )
            )
        if chart := dots(rows, PLOT[narrow], axis.format(opponent), reference=0):
            panels.append([alt.layer(chart, panel_title(title))])
    return grid(panels, down=26) if panels else None


def preference_shift(changes: list[dict], series: Series, narrow: bool) -> Spec | None:
    """The change of the log-probs of chosen (full dot) and rejected (ring) responses to held-out prompts."""
    rows = []
    for change in changes:
        for key in ("chosen", "rejected"):
            value, name = change[key], f"{change['after']}: {key}"
            rows.append(
                dot_row(name, value, interval(value, 1, sign=True), series[change["after"]], hollow=key == "rejected")
            )
    chart = dots(rows, PLOT[narrow], "change of the log-prob of a response, nats", reference=0)
    return chart and grid([[chart]])


def probe_shift(pair: dict | None, narrow: bool, top: int = 5) -> Spec | None:
    """The likeliest next tokens at each position of the sentence, before and after training; those that gained most
    are on top."""
    positions = (pair or {}).get("positions") or []
    panels, across = [], ACROSS[narrow]
    for i, position in enumerate(positions):
        tokens = likeliest(position["tokens"], top)
        tokens.sort(key=lambda t: (t["before"] or 0) - (t["after"] or 0))
        panels.append(
            token_bars(
                tokens,
                position["token"],
                f"{position['position']}. {visible(position['token'])}",
                width=200 if narrow else 92,
                bar=5,
                size=10,
                names={"labelFontSize": 10, "labelLimit": 80},
                axis={"values": [0, 0.5, 1], "labels": i >= len(positions) - across},
            )
        )
    rows_of_panels = [panels[i : i + across] for i in range(0, len(panels), across)]
    return grid(rows_of_panels, across=8, down=12) if panels else None


# ----------------------------------------------------------------------------- reward model and data


REWARD_BASELINES = {"longer_wins": "the longer wins", "shorter_wins": "the shorter wins", "probe": "linear probe"}
"""Keys of the reward model's metrics -> words."""


def reward_accuracy(metrics: dict | None, narrow: bool) -> Spec | None:
    """The reward model's accuracy, also by source, labeler and length, next to the baselines, the agreement of labelers
    and the most that this allows; below, how much better the model is than each baseline on the same pairs."""
    if not metrics:
        return None
    ceiling = metrics.get("ceiling") or {}
    measured: list[tuple[str, Any, str]] = [
        ("reward model", metrics.get("accuracy"), "p0"),
        *((words, metrics.get(f"accuracy_{name}"), "base") for name, words in REWARD_BASELINES.items()),
        ("two labelers agree", ceiling.get("agreement"), "sft"),
        ("labeler and majority", ceiling.get("majority"), "sft"),
        ("at most, by agreement", ceiling.get("at_most"), "sft"),
    ]
    overall = len(measured)
    for length in ("longer", "shorter"):
        measured.append((f"where the {length} is better", metrics.get(f"accuracy_{length}_preferred"), "p0"))
    for by, word in (("source", "on"), ("labeler", "by")):
        values = metrics.get(f"accuracy_by_{by}") or {}
        measured += [(f"{word} {name}", value, "p0") for name, value in sorted(values.items())]
    rows = [
        dot_row(label, value, percent_interval(value), series, hollow=i >= overall)
        for i, (label, value, series) in enumerate(measured)
        if value or i == 0
    ]
    chart = dots(rows, PLOT[narrow], "accuracy on unseen prompts", reference=0.5, format="%")
    gains = [
        dot_row(REWARD_BASELINES[name], value, interval(value, sign=True), "p0")
        for name, value in (metrics.get("gain_over") or {}).items()
    ]
    above = dots(gains, PLOT[narrow], "accuracy less the baseline's on the same pairs", reference=0, format="+.2f")
    return chart and grid([[part] for part in (chart, above) if part], down=26)


def calibration(metrics: dict | None, narrow: bool) -> Spec | None:
    """The reliability diagram, with an interval per bin, and the expected calibration error."""
    bins = (metrics or {}).get("accuracy_by_confidence")
    if not metrics or not bins:
        return None
    ends = (row.get("accuracy_low") for row in bins)
    lowest = min(0.5, *(row["accuracy"] if end is None else end for row, end in zip(bins, ends, strict=True)))
    low = max(0.0, math.floor(10 * lowest) / 10)
    scale = alt.Scale(domain=[low, 1], nice=False, zero=False)
    axis: dict[str, Any] = {"format": "%", "tickCount": 5}
    base = alt.Chart(inline_data(bins))
    x = alt.X("confidence:Q", scale=scale, axis=alt.Axis(title="confidence of the reward model", **axis))
    y = alt.Y("accuracy:Q", scale=scale, axis=alt.Axis(title=None, **axis))
    diagonal = alt.Chart(inline_data([{"at": low}, {"at": 1}])).mark_line(color=MUTED, strokeDash=[4, 3], strokeWidth=1)
    size = alt.Size("n:Q", scale=alt.Scale(domainMin=0, range=[15, 260]), legend=None)
    return grid(
        [
            [
                alt.layer(
                    diagonal.encode(x=alt.X("at:Q", scale=scale), y=alt.Y("at:Q", scale=scale)),
                    base.mark_rule(color=COLOURS["p0"], strokeWidth=2, opacity=0.6).encode(
                        x=x, y=alt.Y("accuracy_low:Q", scale=scale), y2="accuracy_high:Q"
                    ),
                    base.mark_point(color=COLOURS["p0"], filled=True, opacity=1).encode(x=x, y=y, size=size),
                    panel_title(f"How often it is right; calibration error {number(metrics['ece'], 3)}"),
                ).properties(width=240 if narrow else 300, height=240)
            ]
        ]
    )


def contamination(card: dict | None, narrow: bool) -> Spec | None:
    """A histogram of how much evaluation prompts share with the training texts."""
    overlap = (card or {}).get("contamination")
    if not overlap or not sum(overlap["histogram"]["counts"]):
        return None
    edges, counts = overlap["histogram"]["edges"], overlap["histogram"]["counts"]
    rows = [{"low": a, "high": b, "prompts": n} for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    bars = (
        alt.Chart(inline_data(rows))
        .mark_bar(color=COLOURS["p0"])
        .encode(
            x=alt.X(
                "low:Q",
                bin="binned",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(
                    title=f"share of a prompt's {overlap['words']}-word sequences in training texts",
                    format="%",
                    tickCount=5,
                ),
            ),
            x2="high:Q",
            y=alt.Y("prompts:Q", axis=alt.Axis(title="prompts", tickCount=4, format="d")),
        )
    )
    limit = alt.Chart(inline_data([{"at": overlap["limit"]}])).mark_rule(color=MUTED, strokeDash=[4, 3])
    chart = alt.layer(bars, limit.encode(x="at:Q"))
    return grid([[chart.properties(width=240 if narrow else 420, height=120)]])
