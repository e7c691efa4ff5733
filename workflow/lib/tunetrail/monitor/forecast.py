"""Forecasts a run before it starts: which stages read which split, how many rows there are, and too few steps.

Rows are counted in the finished data, else in the sources: then there are at most that many, since only the data stage
finds rows that are too long or repeat others.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunetrail.config.data import KINDS, SPLITS, DocstringSource, HubSource
from tunetrail.config.dpo import FromPairs
from tunetrail.config.run import Config
from tunetrail.config.shares import readers, share_of
from tunetrail.config.training import Epochs, few_steps
from tunetrail.data import docstrings
from tunetrail.data.contamination import without_test_groups
from tunetrail.data.selection import assigned, read_all, select
from tunetrail.data.tables import merged
from tunetrail.data.uses import Account
from tunetrail.errors import DataError
from tunetrail.files import read_jsonl
from tunetrail.models.weights import rows_per_epoch
from tunetrail.preferences.pairs import widest_pairs
from tunetrail.scorers.build import build

Tables = Mapping[str, Sequence[dict[str, Any]]]
"""Split -> its rows; preference rows have "rankings", feedback rows "ratings"."""


@dataclass(frozen=True)
class Forecast:
    """What a run will do with its data."""

    table: list[str]
    """Splits with their shares, rows and readers, as lines."""
    notes: list[str]
    """What the user should know before the run."""


def made_tables(folder: Path) -> Tables:
    """The tables of a finished data stage."""
    said: dict[str, dict[str, Any]] = {}
    for name, key in (("comparisons", "rankings"), ("feedback", "ratings")):
        if (own := folder / f"{name}.jsonl").exists():
            said |= {row["id"]: {key: row[key]} for row in read_jsonl(own)}
    return {split: [row | said.get(row["id"], {}) for row in read_jsonl(folder / f"{split}.jsonl")] for split in SPLITS}


def _docstring_rows(source: DocstringSource) -> list[dict[str, Any]]:
    """Placeholders for at most as many rows as the standard library has, without text, since parsing it takes long."""
    about: dict[str, Any] = {"kind": "demonstrations", "source": "docstrings", "completion": ""}
    about |= {"pinned": source.split, "weight": source.weight}
    return [
        about | {"where": f"docstrings:{group}", "group": group, "messages": [[group, i]]}
        for group, count in docstrings.most_pairs().items()
        for i in range(count)
    ]


def expected_tables(config: Config) -> Tables | None:
    """The tables that the data stage would write if no row were too long and none repeated a row of another split.

    None if a source is on the hub, since it is not fetched. Raises DataError for a bad row.
    """
    data = config.data
    if any(isinstance(source, HubSource) for source in data.sources):
        return None
    embedded = [source for source in data.demonstrations if isinstance(source, DocstringSource)]
    other_sources = [source for source in data.demonstrations if source not in embedded]
    rows, _ = read_all(data.model_copy(update={"demonstrations": other_sources}), Account())
    rows += [row for source in embedded for row in _docstring_rows(source)]
    for row in rows:
        if "messages" in row:
            row["prompt"] = json.dumps(row["messages"])
    apart = without_test_groups(rows, data)
    assigned(apart, config.shares, data.sft_on_chosen, config.seed)
    kept = merged(apart)
    return {split: select(kept, split, data, config.seed, Account()) for split in SPLITS}


def steps_of(config: Config, tables: Tables) -> dict[str, int]:
    """Stage or policy that trains -> its maximum number of optimizer steps."""

    def of(block: Epochs, *counted: tuple[dict, int]) -> int:
        """Optimizer steps on these rows, each with the number of examples made from it."""
        per_epoch = rows_per_epoch([row.get("weight", 1.0) for row, n in counted for _ in range(n)])
        return block.epochs * (per_epoch // block.batch_size)

    own = [row for row in tables["reward"] if "rankings" in row]
    rated = [(row, len(row.get("ratings", ()))) for row in tables["reward"]]
    unranked = [row for row in tables["reward"] if not {"rankings", "ratings"} & row.keys()]
    sampled = unranked if config.completions else []
    k = config.completions.per_prompt if config.completions else 0
    steps = {}
    if sft := config.trained_sft:
        # A token has at least one byte.
        blocks = [
            (row, math.ceil(len(row["text"].encode()) / sft.max_length) if "text" in row else 1)
            for row in tables["sft"]
        ]
        steps["sft"] = of(sft, *blocks)
    if config.trained_reward:
        steps["reward"] = of(config.trained_reward, *((row, 1) for row in [*own, *sampled]))
    for name, policy in config.policies.items():
        if isinstance(policy, FromPairs):
            pairs = [(row, len(widest_pairs(row["rankings"], policy.pairs_per_prompt))) for row in own]
            of_prompt = int(min(policy.pairs_per_prompt or math.inf, k * (k - 1) / 2))
            steps[f"policies.{name}"] = of(policy, *pairs, *((row, of_prompt) for row in sampled))
        elif policy.method == "kto":
            steps[f"policies.{name}"] = of(policy, *rated)
        elif policy.method == "ppo":
            steps[f"policies.{name}"] = policy.optimizer_steps
    if config.methods:
        steps["methods"] = config.methods.steps
    return steps


def unread(config: Config) -> list[str]:
    """A line for each split that gets rows, by a given share or a pin, although no stage reads them."""
    lines = []
    for kind, by_split in readers(config).items():
        for split in SPLITS:
            # A file of demonstrations may have no raw text.
            if kind == "text" or by_split.get(split) or not (share := share_of(config, kind, split)):
                continue
            sent = (
                f"{kind} are pinned there" if split in config.data.pins(kind) else f"{share:.0%} of the {kind} go there"
            )
            lines.append(f"{split}: {sent}, but no stage reads them")
    return lines


def without_reference(config: Config) -> list[str]:
    """A line for each scorer that needs reference answers and has prompts without one."""
    users: dict[str, list[tuple[str, str]]] = {"evaluation": [], "reward": [], "rl": []}
    users["evaluation"] = [(f"evaluation.{key}", name) for key, name in config.evaluation.scorer_keys.items()]
    if config.comparisons:
        keys = getattr(config.comparisons, "scorer_keys", {})
        users["reward"] = [(f"comparisons.{key}", name) for key, name in keys.items()]
    for policy, block in config.policies.items():
        if block.method == "ppo":
            users["rl"] += [(f"policies.{policy}.{key}", name) for key, name in block.scorer_keys.items()]
    return [
        f"{key}: {name} compares with the author's text, which data.{kind} has not: "
        + ("it is not measured" if key.rpartition(".")[2].startswith("gold") else "the stage will stop; take another")
        for kind in ("prompts", "feedback")
        for split, named in users.items()
        if share_of(config, kind, split) and (kind, split) != ("feedback", "reward")  # nothing is sampled for these
        for key, name in named
        if build(name, config.scorers).needs_reference
    ]


def moved(config: Config, finished: Path) -> list[str]:
    """A line if the shares are no longer those of the finished data."""
    try:
        before = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))["shares"]
    except (OSError, ValueError, KeyError):
        return []
    changes = [
        f"{kind} {split} {before.get(kind, {}).get(split, 0):.4g} -> {config.shares.get(kind, {}).get(split, 0):.4g}"
        for kind in KINDS
        for split in SPLITS
        if before.get(kind, {}).get(split, 0) != config.shares.get(kind, {}).get(split, 0)
    ]
    if not changes:
        return []
    return [
        f"data.shares: {', '.join(changes)}: rows move between splits, so data and all that follows is made again; to "
        "keep the splits, give data.shares the earlier numbers, and a new stage a source pinned to its split"
    ]


def share_table(config: Config, rows: Mapping[str, str] | None = None) -> list[str]:
    """The lines of a table: for each split the shares of each kind of row, its readers and, if known, its rows."""
    by_kind = readers(config)
    kinds = [kind for kind in KINDS if config.data.pins(kind)]
    counted = ["rows"] if rows else []
    table = [["split", *kinds, *counted, "read by"]]
    for split in SPLITS:
        shares = [share_of(config, kind, split) for kind in kinds]
        cells = [
            "pinned" if split in config.data.pins(kind) else f"{share:.0%}" if share else "-"
            for kind, share in zip(kinds, shares, strict=True)
        ]
        by = dict.fromkeys(
            name for kind, share in zip(kinds, shares, strict=True) if share for name in by_kind[kind].get(split, [])
        )
        table.append([split, *cells, *([rows[split]] if rows else []), ", ".join(by) or "-"])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def forecast(config: Config, data: Path, is_made: bool) -> Forecast:
    """The forecast of a run.

    Args:
        data: the folder of the data stage's artifact.
        is_made: whether it exists and is up to date.
    """
    notes = unread(config) + without_reference(config) + moved(config, data)
    try:
        tables = made_tables(data) if is_made else expected_tables(config)
    except DataError as error:  # which stops the run, but not this forecast
        tables = None
        notes.append(f"data: {error}")
    at_most = "" if is_made else "at most "
    rows = {split: f"{at_most}{len(own)}" if own else "0" for split, own in tables.items()} if tables else None
    for name, steps in steps_of(config, tables).items() if tables else ():
        block: Any = config.policies[name.partition(".")[2]] if "." in name else getattr(config, name)
        if note := few_steps(name, steps, block.more_steps, at_most):
            notes.append(note)
    return Forecast(share_table(config, rows), notes)
