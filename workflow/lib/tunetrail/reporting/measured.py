"""Decides which sections a page has, depending on what its runs measured, and prepares the probe sentence."""

import math
from collections.abc import Container, Sequence
from typing import Any

from tunetrail.evaluation.probes import likeliest
from tunetrail.reporting.collect import Model, Run

TOP = 6
"""How many next tokens are listed at each position of the probe sentence."""

SECTIONS: dict[str, tuple[str, str]] = {
    "results": ("win rates and gold scores", "evaluation.gold names a scorer, head_to_head.judge a judge"),
    "reward-kl": ("reward against KL", ""),
    "reward-model": ("a reward model", ""),
    "preferences": ("preferred and dispreferred responses", "evaluation.preferences"),
    "probes": ("next tokens", "evaluation.sentence"),
    "forgetting": ("forgetting", "retention"),
    "labels": ("comparisons", ""),
}
"""Section -> (its topic, the config key that makes it measured). Sections without measurements are left out."""


def left_out(runs: Sequence[Run], drawn: Container[str]) -> set[str]:
    """The sections that a page of these runs leaves out. The results stay in any case: they have a table of all models.

    Args:
        drawn: the names of the figures with content.
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
    """The log-probability of the probe sentence in nats, over its measured positions."""
    probs = [p["prob"] for p in model.sentence if p.get("prob")]
    return sum(math.log(p) for p in probs) if probs else None


def comparable(runs: Sequence[Run]) -> tuple[list[Model], list[Model]]:
    """(the models that tokenize the probe sentence like the first one, the others)."""
    probed = [m for run in runs for m in run.models if m.sentence]
    tokens = {m.name: [position["token"] for position in m.sentence] for m in probed}
    alike = [m for m in probed if tokens[m.name] == tokens[probed[0].name]]
    return alike, [m for m in probed if tokens[m.name] != tokens[probed[0].name]]


def positions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The probe sentence: for each position its token, its probability under each model, and the effect of training.

    The effect of each training is a list of the likeliest tokens before and after it, those that gained most first.
    With several runs only `comparable` models are included.
    """
    probed, others = comparable(runs)
    rows: list[dict[str, Any]] = [
        {"token": position["token"], "models": [(m, m.sentence[i].get("prob")) for m in probed], "shifts": []}
        for i, position in enumerate(probed[0].sentence if probed else [])
    ]
    for run in runs:
        for pair in run.shifts:
            before, after = run.model(pair["before"]), run.model(pair["after"])
            if before in others or after in others:
                continue
            for position in pair["positions"]:
                listed = likeliest(position["tokens"], TOP)
                tokens = [token for token in position["tokens"] if token in listed]
                probs = {"was": position["before"], "now": position["after"]}
                shift = {"before": before, "after": after, "tokens": tokens} | probs
                rows[position["position"]]["shifts"].append(shift)
    return rows
