"""Curves over training: PPO's scores against its KL, and the learning curves of every stage."""

import itertools
import math
from typing import Any

import altair as alt

from tunetrail.reporting.charts import (
    COLOURS,
    MUTED,
    SHADE,
    Chart,
    Runs,
    Spec,
    grid,
    inline_data,
    own_colour,
    panel_title,
    side_by_side,
)
from tunetrail.reporting.collect import Artifact, reference_of


def over_optimisation(runs: Runs, narrow: bool) -> Spec | None:
    """Two panels: the reward-model score of PPO's episodes against their KL over training, and their gold score if it
    was logged."""
    learners = [m for run in runs for m in run.policies if m.metrics.get("method") == "ppo"]
    panels = []
    for key, title in (("score", "Reward-model score"), ("gold", "Gold score")):
        rows: list[dict] = []
        for model in learners:
            history = model.trained.history if model.trained else []
            if key == "score":  # of several terms the reward model's: its errors are what a policy may exploit
                history = [row | {key: row.get("score_reward_model", row.get(key))} for row in history]
            points = [row for row in history if row.get(key) is not None]
            kls, scores = (_means([row[name] for row in points]) for name in ("kl", key))
            rows += [
                {
                    "step": row["step"],
                    "kl": max(0.0, kl),
                    "score": score,
                    "line": model.name,
                    "colour": COLOURS[model.series],
                    "tip": f"{model.name}, step {row['step']}: score {score:.4g}, KL {kl:.3g}",
                }
                for row, kl, score in _thinned(list(zip(points, kls, scores, strict=True)))
            ]
        if not rows:
            continue
        few = len(rows) <= 24
        base = alt.Chart(inline_data(rows)).encode(
            x=alt.X(
                "kl:Q",
                scale=alt.Scale(type="sqrt", nice=False, padding=8),
                axis=alt.Axis(title=f"KL to {reference_of(runs)}, nats per episode (√ scale)", tickCount=5),
            ),
            y=alt.Y("score:Q", scale=alt.Scale(zero=False, padding=14), axis=alt.Axis(title=None, tickCount=5)),
            color=own_colour(),
            detail="line:N",
            order="step:Q",
            description="tip:N",
        )
        layers = [
            base.mark_line(strokeWidth=1.5, opacity=0.6),
            base.mark_point(filled=True, opacity=1, size=40 if few else 10),
        ]
        if few:
            layers.append(base.mark_text(dx=8, dy=-7, fontSize=10).encode(text="step:Q"))
        panels.append(alt.layer(*layers, panel_title(title)).properties(width=270 if narrow else 310, height=230))
    return side_by_side(panels, narrow) if panels else None


# ----------------------------------------------------------------------------- learning curves

LOSS = ("loss", ("loss",), None)
PAIR = ("log-prob chosen, rejected", ("logps/chosen", "logps/rejected"), None)
HELDOUT = ("held-out loss", ("heldout_loss",), None)

Curve = tuple[str, tuple[str, ...], float | None]


def _reference_free(margin: str) -> list[Curve]:
    """The curves of a policy without a reference; without one there is no saying where an untrained model would be."""
    return [LOSS, ("accuracy", ("rewards/accuracies",), None), (margin, ("rewards/margins",), None), PAIR, HELDOUT]


# Stage -> its curves: (title, keys of history.jsonl, reference line).
CURVES: dict[str, list[Curve]] = {
    "sft": [LOSS, ("token accuracy", ("mean_token_accuracy",), None), HELDOUT],
    "reward": [LOSS, ("accuracy", ("accuracy",), 0.5), HELDOUT],
    "dpo": [
        ("loss", ("loss",), math.log(2)),
        ("accuracy", ("rewards/accuracies",), 0.5),
        ("margin", ("rewards/margins",), 0),
        PAIR,
        HELDOUT,
    ],
    "orpo": _reference_free("log odds ratio"),
    "simpo": _reference_free("margin"),
    "kto": [
        LOSS,
        ("margin", ("rewards/margins",), 0),
        ("KL to its start", ("kl",), None),
        ("log-prob liked, disliked", ("logps/chosen", "logps/rejected"), None),
        HELDOUT,
    ],
    "ppo": [
        ("score", ("score",), None),
        ("KL to its start", ("kl",), None),
        ("entropy", ("entropy",), None),
        ("response length", ("length",), None),
    ],
}


MOST_POINTS = 300
"""Most points per curve; of longer histories only every second, third, … step is drawn, to keep the page small."""


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 values before it."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def _means(values: list[float]) -> list[float]:
    """Values smoothed over a tenth of the curve."""
    return smooth(values, max(1, len(values) // 10))


def _thinned(points: list) -> list:
    return points[:: math.ceil(len(points) / MOST_POINTS) or 1]


HANDLES = 40
"""Most points per curve that have a tooltip."""


def _curve_rows(artifact: Artifact, name: str, colour: str, keys: tuple[str, ...]) -> list[dict]:
    rows = []
    for key in keys:
        points = [(row["step"], row[key]) for row in artifact.history if row.get(key) is not None]
        means, dashed = _means([value for _, value in points]), key == "logps/rejected"
        thinned = _thinned(list(zip(points, means, strict=True)))
        for i, ((step, value), mean) in enumerate(thinned):
            rows.append(
                {
                    "step": step,
                    "value": value,
                    "mean": mean,
                    "colour": colour,
                    "line": f"{name} {key}",
                    "dashed": dashed,
                    "handle": i % math.ceil(len(thinned) / HANDLES) == 0,
                    "tip": f"{name}, step {step}: {key.rpartition('/')[2]} {value:.4g}",
                }
            )
    return rows


def _resumed(artifact: Artifact) -> list[dict]:
    """The segments of a history that were trained by attempts after the first; the last one extends to the end."""
    steps = [*artifact.resumed_at, artifact.history[-1]["step"]]
    spans = itertools.pairwise(steps)
    return [{"from": a, "to": b, "tip": f"resumed from step {a}"} for a, b in spans if a < b]


def learning(runs: Runs, narrow: bool) -> Spec | None:
    """Small multiples; policies with the same method share panels. Training after a resumption is shaded."""
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
    for stages in (("sft", "reward"), ("dpo",), ("orpo",), ("simpo",), ("kto",), ("ppo",)):
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
    base = alt.Chart(inline_data(rows))
    steps = sorted({row["step"] for row in rows})
    ticks: dict[str, Any] = {"tickCount": 3} if len(steps) > 4 else {"values": steps}
    x = alt.X("step:Q", scale=alt.Scale(nice=False), axis=alt.Axis(title=None, format="d", grid=False, **ticks))
    scale, axis = alt.Scale(zero=False, padding=4), alt.Axis(title=None, tickCount=4, minExtent=26)
    dash = alt.StrokeDash("dashed:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [4, 2]]), legend=None)
    layers = [
        base.mark_line(strokeWidth=1, opacity=0.35).encode(
            x=x, y=alt.Y("value:Q", scale=scale, axis=axis), color=own_colour(), detail="line:N"
        ),
        base.mark_line(strokeWidth=2).encode(
            x=x, y=alt.Y("mean:Q"), color=own_colour(), detail="line:N", strokeDash=dash
        ),
        base.transform_filter(alt.datum.handle)
        .mark_point(size=22, filled=True, opacity=1 if len(steps) <= 12 else 0)  # visible only if there are few
        .encode(x=x, y=alt.Y("value:Q"), color=own_colour(), description="tip:N"),
    ]
    if reference is not None:
        line = alt.Chart(inline_data([{"at": reference}])).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.insert(0, line.encode(y=alt.Y("at:Q")))
    if resumed:
        shade = alt.Chart(inline_data(resumed)).mark_rect(color=SHADE, opacity=0.18)
        layers.insert(0, shade.encode(x=alt.X("from:Q"), x2="to:Q", description="tip:N"))
    return alt.layer(*layers, panel_title(title, 11)).properties(width=width, height=95)
