"""Comparisons: the completions of all shards, ranked by a labeler.

    python -m tunetrail.stages.comparisons --config C.json --input data=…/manifest.json \\
        --input shard0=…/manifest.json --input shard1=…/manifest.json \\
        --output results/RUN/comparisons/manifest.json --state state/RUN/comparisons

Writes `comparisons.jsonl`: the rows of the shards with their rankings (`ComparisonRow`), and the preference rows that
came with the data, sorted by (split, id). If people rank, `tasks` is another input, and `labels.jsonl` and
`events.jsonl` are written too: see `tunetrail.labeling.human`.
"""

import json
import sys
from typing import Any, cast

from pydantic import TypeAdapter

from tunetrail import labeling
from tunetrail.config.comparisons import ComparisonsConfig
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl
from tunetrail.preferences.rows import ComparisonRow, SampledRow
from tunetrail.preferences.summary import summarize
from tunetrail.provenance.manifest import METRICS
from tunetrail.provenance.record import labels_dependency
from tunetrail.stages.registry import start

MIN_PROMPTS = 2
"""The reward split needs at least this many prompts with two distinct completions."""


def shard_roles(stage: Stage) -> list[str]:
    return sorted(role for role in stage.inputs if role.startswith("shard"))


def gather(stage: Stage) -> list[SampledRow]:
    """The rows of all shards, sorted by (split, id). Raises DataError if two shards contain the same row."""
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
            rows.append(cast(SampledRow, row))
    return sorted(rows, key=lambda row: (row["split"], row["id"]))


def comparable(rows: list[SampledRow]) -> list[SampledRow]:
    """The rows with at least two distinct completions."""
    return [row for row in rows if len(set(row["completions"])) > 1]


def duplicates_removed(stage: Stage) -> int:
    """How many repeated or empty completions the shards dropped."""
    return sum(
        json.loads((stage.inputs[role].folder / METRICS).read_text(encoding="utf-8"))["duplicates_removed"]
        for role in shard_roles(stage)
    )


def run(stage: Stage) -> dict:
    """Raises DataError if too few rows can be compared, and whatever the labeler raises."""
    config: Any = TypeAdapter(ComparisonsConfig).validate_python(stage.config)
    gathered = gather(stage)
    rows = comparable(gathered)
    usable = sum(row["split"] == "reward" for row in rows)
    if usable < MIN_PROMPTS:
        raise DataError(
            f"completions: only {usable} of {sum(row['split'] == 'reward' for row in gathered)} prompts of the reward "
            f"split have two distinct completions, at least {MIN_PROMPTS} are needed; raise data.limits.reward or "
            "completions.temperature"
        )
    labels = labeling.rank(config.labeler, rows, config, stage)
    ranked: list[ComparisonRow] = [
        {**row, "rankings": rankings}
        for row, rankings in zip(rows, labels.rankings, strict=True)
        if rankings  # people may skip a row
    ]
    if (usable := sum(row["split"] == "reward" for row in ranked)) < MIN_PROMPTS:
        raise DataError(
            f"comparisons: only {usable} prompts of the reward split were ranked, at least {MIN_PROMPTS} are needed"
        )
    own = cast(list[ComparisonRow], stage.rows("data", "comparisons.jsonl", optional=True))
    ranked = sorted(ranked + own, key=lambda row: (row["split"], row["id"]))
    summary = summarize(ranked)
    if summary["ties"] == 1:
        raise DataError(
            "comparisons: every pair is a tie, so there is nothing to learn; lower comparisons.tie or choose another "
            "labeler"
        )

    path = stage.work / "comparisons.jsonl"
    content = cast(list[dict], ranked)
    write_jsonl(path, content)
    stage.draft.dependencies.append(labels_dependency(path, content, labels.source))
    left_out = len(gathered) + len(own) - len(ranked)
    counts = {"from_data": len(own), "left_out": left_out, "duplicates_removed": duplicates_removed(stage)}
    return {**summary, **labels.metrics, **counts}


if __name__ == "__main__":
    sys.exit(start("comparisons", run))
