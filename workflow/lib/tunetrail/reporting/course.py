"""The three slides of the course: how training on text changes next-token probabilities, how training on pairs changes
log-probs, and what each method of fine-tuning learns and forgets. They are drawn if a run has the stage `methods`."""

from typing import Any

import altair as alt

from tunetrail.config.shares import PAIRED
from tunetrail.evaluation.probes import likeliest
from tunetrail.reporting.charts import (
    COLOURS,
    MUTED,
    Runs,
    Spec,
    grid,
    inline_data,
    own_colour,
    panel_title,
    side_by_side,
    token_bars,
)
from tunetrail.reporting.collect import POLICY_COLOURS, Artifact, Run

PALETTE = [COLOURS[f"p{i}"] for i in range(POLICY_COLOURS)]


def contexts(run: Run, count: int = 2) -> list[dict[str, Any]]:
    """The positions at which the third word of the probe sentence starts, the fourth, …, with the text before each.

    Returns rows of `evaluation.probes.shift` from base to the first model trained from it, with "context".
    """
    pair = next(iter(run.shifts), None)
    model = pair and run.model(pair["after"])
    if not pair or not model:
        return []
    tokens = [position["token"] for position in model.sentence]
    words = [i for i, token in enumerate(tokens) if i and token[:1].isspace()]
    chosen = words[1 : 1 + count]
    return [
        row | {"context": "".join(tokens[: row["position"]])} for row in pair["positions"] if row["position"] in chosen
    ]


def next_tokens(runs: Runs, narrow: bool, top: int = 5) -> Spec | None:
    """The likeliest next tokens at two positions of the sentence, before and after training."""
    panels = []
    for row in contexts(runs[0]):
        # The sentence's own token is shown even if it is not among the likeliest.
        own = {key: row[key] for key in ("token", "before", "after")}
        others = [t for t in likeliest(row["tokens"]) if t["token"] != row["token"]]
        panels.append(
            token_bars(
                likeliest([own, *others[: top - 1]]),
                row["token"],
                f"{row['context']} …",
                width=230 if narrow else 300,
                bar=9,
                size=12,
                names={"labelFontSize": 12},
                axis={"tickCount": 5},
            )
        )
    return side_by_side(panels, narrow) if panels else None


def _pair_learners(runs: Runs) -> list[tuple[str, Artifact]]:
    return [
        (model.name, model.trained)
        for run in runs
        for model in run.policies
        if model.trained and model.trained.stage in (*PAIRED, "kto") and model.trained.history
    ]


def preference_curves(runs: Runs, narrow: bool) -> Spec | None:
    """Log-probs of the preferred and the dispreferred responses that policies train on, over their steps."""
    panels = []
    for name, artifact in _pair_learners(runs):
        rows = [
            {"step": row["step"], "logp": row[f"logps/{key}"], "line": words, "colour": colour}
            for key, words, colour in (("chosen", "preferred", PALETTE[2]), ("rejected", "dispreferred", PALETTE[1]))
            for row in artifact.history
            if f"logps/{key}" in row  # a batch of KTO may have only liked or only disliked responses
        ]
        last = max(row["step"] for row in rows)
        base = alt.Chart(inline_data(rows)).encode(
            x=alt.X("step:Q", axis=alt.Axis(title="optimizer step", format="d", grid=False, tickMinStep=1)),
            y=alt.Y("logp:Q", scale=alt.Scale(zero=False, padding=10), axis=alt.Axis(title="log-prob, nats")),
            color=own_colour(),
            detail="line:N",
        )
        layers = [base.mark_line(strokeWidth=2), base.mark_point(filled=True, size=22, opacity=1)]
        for words, dy in (("preferred", -12), ("dispreferred", 14)):  # above a rising line, below a falling one
            end = base.transform_filter((alt.datum.step == last) & (alt.datum.line == words))
            layers.append(end.mark_text(align="right", dy=dy, fontSize=11).encode(text="line:N"))
        chart = alt.layer(*layers, panel_title(name))
        panels.append(chart.properties(width=230 if narrow else 290, height=190))
    return side_by_side(panels, narrow) if panels else None


def methods(runs: Runs, narrow: bool) -> Spec | None:
    """Each method's path: its training loss, which falls to the right, against what it forgot along the way."""
    rows: list[dict] = []
    for run in runs:
        for i, (name, method) in enumerate(((run.metrics("methods") or {}).get("methods") or {}).items()):
            line = name if len(runs) == 1 else f"{run.name}-{name}"
            last = method["points"][-1]["step"]
            rows += [
                point | {"line": line, "colour": PALETTE[i % len(PALETTE)], "last": point["step"] == last}
                for point in method["points"]
            ]
    if not rows:
        return None
    base = alt.Chart(inline_data(rows)).encode(
        x=alt.X(
            "learnt:Q",
            scale=alt.Scale(reverse=True, zero=False, padding=20),
            axis=alt.Axis(title="loss on the text it is trained on, nats per token (lower is to the right)"),
        ),
        y=alt.Y(
            "forgotten:Q",
            scale=alt.Scale(zero=False, padding=14),
            axis=alt.Axis(title="forgotten: rise of the loss on unrelated text"),
        ),
        color=own_colour(),
        detail="line:N",
        order="step:Q",
    )
    zero = alt.Chart(inline_data([{"at": 0}])).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y="at:Q")
    layers = [
        zero,
        base.mark_line(strokeWidth=2),
        base.mark_point(filled=True, size=45, opacity=1),
        base.mark_text(dy=-9, fontSize=9, color=MUTED).encode(text="step:Q"),
        base.transform_filter(alt.datum.last).mark_text(dx=8, align="left", fontSize=12).encode(text="line:N"),
    ]
    return grid([[alt.layer(*layers).properties(width=230 if narrow else 560, height=260)]])


def method_rows(run: Run) -> list[dict[str, Any]]:
    """The table of methods: their losses and, from the record of the attempt that trained each, its time and memory."""
    artifact = run.artifacts.get("methods")
    if artifact is None:
        return []
    measured: dict[str, dict] = {}
    for attempt in artifact.attempts:
        measured |= attempt.get("measurements") or {}
    unknown = {"seconds_per_step": None, "peak_bytes": None}
    return [
        {"name": name} | method | (measured.get(name) or unknown)
        for name, method in (artifact.metrics.get("methods") or {}).items()
    ]
