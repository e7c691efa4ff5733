"""Data preparation: read, check, render, split by source group, refuse leaks, describe.

    python -m tunetrail.stages.data --config C.json --input base=… --output results/RUN/data/manifest.json --state …

Writes `sft.jsonl`, `reward.jsonl`, `rl.jsonl`, `evaluation.jsonl` and `heldout.jsonl` (see `data.rows`), each in a
seeded order that takes turns among the groups, so that a limit keeps as many groups as it can; `contamination.jsonl`;
and, where preferences came with the data, `comparisons.jsonl`. `metrics.json` is the data card: rows of each source and
split, lengths, what was dropped and why, and how much of the evaluation prompts stands in training texts.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from tunetrail.config.data import SPLITS, DataConfig, DocstringSource
from tunetrail.contract.stage import Stage
from tunetrail.data.contamination import contamination, overlap_row, without_contamination, without_leaks
from tunetrail.data.invalid import Invalid
from tunetrail.data.readers import demonstrations, origin, preferences, row_id
from tunetrail.data.rendering import Renderer, rendered, short_enough
from tunetrail.data.splits import assign_splits, histogram, in_turns, shuffled
from tunetrail.data.tables import answer_of, comparison_row, merged, one_each, prompt_row
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl
from tunetrail.models.lengths import positions
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import dependency, labels_dependency
from tunetrail.provenance.schema import Dependency
from tunetrail.stages.registry import start


def read_all(config: DataConfig) -> tuple[list[dict], list[dict]]:
    """(rows, cards): the rows of every source with `source`, `where` and `kind`, and what each source is."""
    rows, cards = [], []
    readers: list[tuple[str, Sequence[Any], Callable[..., Iterator[tuple[str, Any]]]]] = [
        ("demonstrations", config.demonstrations, demonstrations),
        ("preferences", config.preferences, preferences),
    ]
    for kind, sources, read in readers:
        for source in sources:
            invalid: list[Invalid] = []
            own = [row | {"where": where} for where, row in read(source, invalid if config.invalid == "drop" else None)]
            card = origin(source) | {"invalid_rows": len(invalid)}
            shape = (
                "rankings"
                if kind == "preferences"
                else "/".join(sorted({"text" if "text" in row else "prompt" for row in own}))
            )
            cards.append(card | {"kind": kind, "shape": shape, "split": source.split, "rows": len(own)})
            limits = (source.max_code_tokens, source.max_answer_tokens) if isinstance(source, DocstringSource) else None
            about = {"source": card["source"], "kind": kind, "max_tokens": limits, "pinned": source.split}
            rows += [row | about for row in own]
    return rows, cards


def assigned(rows: list[dict], config: DataConfig, seed: int) -> int:
    """Gives every row its split and its id; returns how many groups there are."""
    split_of = assign_splits(rows, config.shares, seed)
    for row in rows:
        row["split"] = split_of[row["group"]]
        row["id"] = row_id({key: row[key] for key in ("text", "prompt", "completion", "completions") if key in row})
    return len(split_of)


def select(rows: list[dict], split: str, config: DataConfig, seed: int, dropped: Counter[str]) -> list[dict]:
    """The rows of one split, shuffled and limited, evenly over their groups."""
    own = shuffled([row for row in rows if row["split"] == split], seed, split)
    if split not in ("sft", "heldout"):
        own = [row for row in own if "text" not in row]  # raw text is for training and its held-out loss
    if split in ("rl", "evaluation"):
        unique = one_each(own)
        dropped["duplicates"] += len(own) - len(unique)
        own = unique
    kept = in_turns(own, config.max_per_group)[: getattr(config.limits, split) or len(own)]
    dropped["over_limit"] += len(own) - len(kept)
    return kept


def compared(rows: list[dict], split: str, config: DataConfig, needed: bool, total: int) -> list[dict]:
    """The comparisons of a split. Raises DataError where preferences were given, none is left and a stage needs some.

    Args:
        total: preference rows of all splits.
    """
    found = [comparison_row(row) for row in rows if row["kind"] == "preferences"]
    if config.preferences and not found and needed:
        raise DataError(
            f"data.shares.{split}: no comparison is left for this split; {total} preference rows are too few for these "
            "shares and limits: add data, name a finer data group, or pin a source to this split"
        )
    return found


def split_card(path: Path, rows: list[dict], renderer: Renderer) -> dict[str, Any]:
    """What the data card says of a split."""
    prompts = [row for row in rows if "prompt" in row]
    return {
        "rows": len(rows),
        "groups": len({row["group"] for row in rows}),
        "digest": sha256_file(path),
        "prompt_tokens": histogram(renderer.tokens([row["prompt"] for row in prompts])),
        "completion_tokens": histogram(renderer.tokens([answer_of(row) for row in prompts])),
        "text_tokens": histogram(renderer.tokens([row["text"] for row in rows if "text" in row])),
    }


def comparisons_card(rows: list[dict]) -> dict[str, Any]:
    """What the data card says of the comparisons."""
    return {
        "prompts": len({row["prompt"] for row in rows}),
        "completions": sum(len(row["completions"]) for row in rows),
        "rankings": sum(len(row["rankings"]) for row in rows),
        "labelers": sorted({ranking["labeler"] for row in rows for ranking in row["rankings"]}),
    }


def source_dependency(source: dict) -> Dependency:
    """A source of the data card, for the record; a recursive audit checks a file again."""
    about = {key: value for key, value in source.items() if key not in ("source", "digest")}
    name, digest = source["source"], source["digest"]
    if digest:
        return dependency("source", name, digest, files={name: digest}, **about)
    return dependency("source", name, reason="the manifest has the digests of the rows that were read", **about)


def authors_dependency(path: Path, authors: list[str]) -> Dependency:
    """Who wrote the demonstrations of a split, for the record of everything learnt from them."""
    return dependency(
        "labels", path.name, sha256_file(path), demonstrations=len(authors), labelers=sorted(set(authors))
    )


def run(stage: Stage) -> dict[str, Any]:
    config = DataConfig(**stage.config)
    model = stage.inputs["base"].folder / "model"
    renderer = Renderer(AutoTokenizer.from_pretrained(model), config)
    read, sources = read_all(config)
    shown = rendered(read, config, renderer)
    rows = short_enough(shown, config, renderer, positions(AutoConfig.from_pretrained(model)))
    groups = assigned(rows, config, stage.seed)
    unique = without_leaks(rows, config)
    clean, contaminated = without_contamination(unique, config)
    dropped = Counter(
        not_rendered=len(read) - len(shown),
        too_long=len(shown) - len(rows),
        duplicates=len(rows) - len(unique),
        contaminated=len(unique) - len(clean),
        over_limit=0,
    )
    kept = merged(clean)
    preference_rows = sum(row["kind"] == "preferences" for row in kept)

    splits, comparisons, overlap = {}, [], {}
    for split in SPLITS:
        own, path = select(kept, split, config, stage.seed, dropped), stage.work / f"{split}.jsonl"
        if not own and split in stage.shared["splits_read"]:
            raise DataError(
                f"data.shares.{split}: no row is left for this split; {len(kept)} rows in {groups} groups are too few "
                "for these shares: add data, name a finer data group, or pin a source to this split"
            )
        if split in contaminated:
            overlap[split] = contamination(own, contaminated[split], config)
        if split in ("reward", "heldout"):
            comparisons += compared(own, split, config, split in stage.shared["splits_read"], preference_rows)
        write_jsonl(path, [prompt_row(row) for row in own])  # type: ignore[misc]
        if authors := [row["labeler"] for row in own if "labeler" in row]:
            stage.draft.dependencies.append(authors_dependency(path, authors))
        if split == "evaluation":
            write_jsonl(stage.work / "contamination.jsonl", [overlap_row(row) for row in own])  # type: ignore[misc]
        splits[split] = split_card(path, own, renderer)
    stage.draft.dependencies += [source_dependency(source) for source in sources]
    if config.preferences:
        path = stage.work / "comparisons.jsonl"
        write_jsonl(path, comparisons)
        stage.draft.dependencies.append(labels_dependency(path, comparisons, {}))
    return {
        "splits": splits,
        "sources": sources,
        "comparisons": comparisons_card(comparisons) if config.preferences else None,
        "contamination": overlap["evaluation"] | {"heldout": overlap["heldout"]},
        "dropped": dict(dropped),
        "rows_read": len(read),
    }


if __name__ == "__main__":
    sys.exit(start("data", run))
