"""What a run measured: which sections its page has, and the probe sentence position by position."""

import math
from collections.abc import Container, Sequence
from typing import Any

from tunetrail.evaluation.probes import likeliest
from tunetrail.reporting.collect import Model, Run

TOP = 6
"""Next tokens listed at each position of the probe sentence."""

SECTIONS: dict[str, tuple[str, str]] = {
    "results": ("win rates and gold scores", "evaluation.gold names a scorer, head_to_head.judge a judge"),
    "reward-kl": ("reward against KL", ""),
    "reward-model": ("a reward model", ""),
    "preferences": ("preferred and dispreferred responses", "evaluation.preferences"),
    "probes": ("next tokens", "evaluation.sentence"),
    "forgetting": ("forgetting", "retention"),
    "labels": ("comparisons", ""),
}
"""Section -> what it is about, and the config key that has it measured. One without measurements is left out."""


def left_out(runs: Sequence[Run], drawn: Container[str]) -> set[str]:
    """The sections that a page of these runs does without. The first has a table of all models whatever was measured.

    Args:
        drawn: names of the figures that have something to show.
    """
    has = {
        "course": any(run.metrics("methods") for run in runs),
        "reward-kl": "reward_kl" in drawn or "over_optimisation" in drawn,
        "reward-model": any(run.metrics("reward") for run in runs),
        "preferences": "preferences" in drawn,
        "probes": bool(positions(runs)),
        "forgetting": any(m.metrics.get("retention") for run in runs for m in run.models),
        "labels": any(run.metrics("comparisons") or (run.metrics("data") or {}).get("comparisons") for run in runs),
        "differences": len(runs) > 1,
    }
    return {section for section, measured in has.items() if not measured}


def is_scored(runs: Sequence[Run]) -> bool:
    """Whether responses were compared, by a gold scorer or a judge."""
    matches = (run.head_to_head.get(kind) for run in runs for kind in ("sampled", "judge"))
    return any(matches) or any(m.interval("gold") for run in runs for m in run.models)


def sentence_sum(model: Model) -> float | None:
    """Log-probability of the probe sentence in nats, of its measured positions."""
    probs = [p["prob"] for p in model.sentence if p.get("prob")]
    return sum(math.log(p) for p in probs) if probs else None


def comparable(runs: Sequence[Run]) -> tuple[list[Model], list[Model]]:
    """The models whose tokenizer cuts the probe sentence as the first one's does, and those whose does not."""
    probed = [m for run in runs for m in run.models if m.sentence]
    tokens = {m.name: [position["token"] for position in m.sentence] for m in probed}
    alike = [m for m in probed if tokens[m.name] == tokens[probed[0].name]]
    return alike, [m for m in probed if tokens[m.name] != tokens[probed[0].name]]


def positions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The probe sentence: for each position the token, its probability under each model, and what training moved.

    A shift is of two models, before and after: the likeliest tokens of both, what rose most first. Of several runs only
    `comparable` models are among them.
    """
    probed, others = comparable(runs)
    found: list[dict[str, Any]] = [
        {"token": position["token"], "models": [(m, m.sentence[i].get("prob")) for m in probed], "shifts": []}
        for i, position in enumerate(probed[0].sentence if probed else [])
    ]
    for run in runs:
        for pair in run.shifts:
            before, after = run.model(pair["before"]), run.model(pair["after"])
            if before in others or after in others:
                continue
            for row in pair["positions"]:
                listed = likeliest(row["tokens"], TOP)
                tokens = [token for token in row["tokens"] if token in listed]
                probs = {"was": row["before"], "now": row["after"]}
                found[row["position"]]["shifts"].append({"before": before, "after": after, "tokens": tokens} | probs)
    return found
