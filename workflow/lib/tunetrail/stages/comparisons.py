"""Comparison collection: the completions of all shards, ranked by a labeler.

    python -m tunetrail.stages.comparisons --config C.json --input data=…/manifest.json \\
        --input shard0=…/manifest.json --input shard1=…/manifest.json \\
        --output results/RUN/comparisons/manifest.json --state state/RUN/comparisons

Writes `comparisons.jsonl`, sorted by (split, id): the rows of the shards with "rankings" added. Where people rank there
is the input `tasks`, and `labels.jsonl` and `events.jsonl` are written too: see `tunetrail.labeling.human`.
"""

import json
import sys
from collections import Counter
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from tunetrail import labeling
from tunetrail.config.comparisons import ComparisonsConfig
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl
from tunetrail.preferences.ranks import pair_outcomes, pairwise_agreement
from tunetrail.provenance.manifest import METRICS
from tunetrail.provenance.record import labels_dependency
from tunetrail.stages.registry import start

MIN_PROMPTS = 2
"""Fewer prompts than this with two distinct completions in the reward split are no comparisons to learn from."""


def shard_roles(stage: Stage) -> list[str]:
    return sorted(role for role in stage.inputs if role.startswith("shard"))


def gather(stage: Stage) -> list[dict]:
    """The rows of all shards sorted by (split, id). Raises DataError where two shards hold one row."""
    shard_of: dict[tuple[str, str], str] = {}
    rows = []
    for role in shard_roles(stage):
        for row in stage.rows(role, "completions.jsonl"):
            key = row["split"], row["id"]
            if key in shard_of:
                raise DataError(
                    f"{stage.inputs[role].folder / 'completions.jsonl'}: row {row['id']} is in {shard_of[key]} too; "
                    "delete the shards and sample them again"
                )
            shard_of[key] = role
            rows.append(row)
    return sorted(rows, key=lambda row: (row["split"], row["id"]))


def comparable(rows: list[dict]) -> list[dict]:
    """The rows that have two distinct completions."""
    return [row for row in rows if len(set(row["completions"])) > 1]


def duplicates_removed(stage: Stage) -> int:
    """How many repeated or empty completions the shards dropped."""
    return sum(
        json.loads((stage.inputs[role].folder / METRICS).read_text(encoding="utf-8"))["duplicates_removed"]
        for role in shard_roles(stage)
    )


def longer_wins(rows: list[dict]) -> float | None:
    """Share of the untied pairs whose longer completion (in characters) is preferred; equal lengths count half."""
    wins = []
    for row in rows:
        longer = pair_outcomes([-len(c) for c in row["completions"]])
        for ranking in row["rankings"]:
            outcomes = pair_outcomes(ranking["ranks"])
            wins.append((1 + outcomes * longer)[outcomes != 0] / 2)
    pooled = np.concatenate(wins)
    return float(pooled.mean()) if len(pooled) else None


def summarize(rows: list[dict]) -> dict[str, Any]:
    """The metrics of ranked rows."""
    rankings = [ranking for row in rows for ranking in row["rankings"]]
    outcomes = np.concatenate([pair_outcomes(ranking["ranks"]) for ranking in rankings])
    return {
        "prompts": len(rows),
        "prompts_by_split": dict(Counter(row["split"] for row in rows)),
        "completions_per_prompt": float(np.mean([len(row["completions"]) for row in rows])),
        "rankings": len(rankings),
        "ties": float((outcomes == 0).mean()),
        "labelers": {name: {"rankings": n} for name, n in Counter(r["labeler"] for r in rankings).items()},
        "agreement": pairwise_agreement([[ranking["ranks"] for ranking in row["rankings"]] for row in rows]),
        "longer_wins": longer_wins(rows),
    }


def run(stage: Stage) -> dict:
    """Raises DataError where too little is left to compare, and what the labeler raises."""
    config: Any = TypeAdapter(ComparisonsConfig).validate_python(stage.config)
    gathered = gather(stage)
    rows = comparable(gathered)
    usable = sum(row["split"] == "reward" for row in rows)
    if usable < MIN_PROMPTS:
        raise DataError(
            f"completions: only {usable} of {sum(row['split'] == 'reward' for row in gathered)} prompts of the reward split have "
            f"two distinct completions, at least {MIN_PROMPTS} are needed; raise data.limits.reward or completions.temperature"
        )
    labels = labeling.rank(config.labeler, rows, config, stage)
    # People may skip a row.
    rows = [row | {"rankings": found} for row, found in zip(rows, labels.rankings, strict=True) if found]
    if (ranked := sum(row["split"] == "reward" for row in rows)) < MIN_PROMPTS:
        raise DataError(
            f"comparisons: only {ranked} prompts of the reward split were ranked, at least {MIN_PROMPTS} are needed"
        )
    metrics = summarize(rows)
    if metrics["ties"] == 1:
        raise DataError(
            "comparisons: every pair is a tie, so there is nothing to learn; lower comparisons.tie or choose another labeler"
        )

    path = stage.work / "comparisons.jsonl"
    write_jsonl(path, rows)
    stage.draft.dependencies.append(labels_dependency(path, rows, labels.source))
    return (
        metrics
        | labels.metrics
        | {"left_out": len(gathered) - len(rows), "duplicates_removed": duplicates_removed(stage)}
    )


if __name__ == "__main__":
    sys.exit(start("comparisons", run))
