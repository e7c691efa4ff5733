"""Data preparation: reads, checks, renders and splits all sources, refuses leaks, and writes a data card.

    python -m tunetrail.stages.data --config C.json --input base=… --output results/RUN/data/manifest.json --state …

Writes `sft.jsonl`, `reward.jsonl`, `rl.jsonl`, `evaluation.jsonl` and `heldout.jsonl` (see `data.rows`), each in a
seeded order that takes turns among the groups, so that a limit keeps as many groups as possible; `contamination.jsonl`;
and `comparisons.jsonl` and `feedback.jsonl` if preferences or feedback came with the data. `metrics.json` is the data
card: how the rows of each source are used (`uses`) or why they were left out (`left_out`), lengths, and how much of the
evaluation prompts the training texts contain.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from tunetrail.config.data import KINDS, SPLITS, DataConfig
from tunetrail.contract.runner import log
from tunetrail.contract.stage import Stage
from tunetrail.data.ancestry import check_unseen
from tunetrail.data.contamination import (
    MEASURED,
    contamination,
    overlap_row,
    without_contamination,
    without_leaks,
    without_test_groups,
)
from tunetrail.data.rendering import Renderer, rendered, short_enough
from tunetrail.data.selection import Shares, assigned, read_all, select
from tunetrail.data.splits import histogram
from tunetrail.data.tables import answer_of, comparison_row, feedback_row, merged, prompt_row
from tunetrail.data.uses import Account, lines, uses
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl
from tunetrail.models.lengths import positions
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import dependency, labels_dependency
from tunetrail.provenance.schema import Dependency
from tunetrail.stages.registry import start


def is_due(split: str, kind: str, config: DataConfig, shares: Shares) -> bool:
    """Whether rows of this kind should be in this split, because of their share or a pin."""
    pins = config.pins(kind)
    return split in pins or (None in pins and shares.get(kind, {}).get(split, 0) > 0)


def check_not_empty(split: str, table: list[dict], kept: list[dict], config: DataConfig, shares: Shares) -> None:
    """Raises DataError if a split lacks rows, comparisons or feedback that it should have.

    Args:
        table: the rows of this split.
        kept: the rows of all splits.
    """
    advice = "add data, use finer groups, pin a source to this split, or set the share to 0 if no stage needs it"
    if not table and any(is_due(split, kind, config, shares) for kind in KINDS):
        raise DataError(
            f"data.shares.{split}: no row is left for this split; {len(kept)} rows in "
            f"{len({row['group'] for row in kept})} groups are too few for these shares: {advice}"
        )
    for kind, one, row_of in (("preferences", "comparison", "preference"), ("feedback", "feedback", "feedback")):
        is_wanted = split in ("reward", "heldout") and is_due(split, kind, config, shares)
        if is_wanted and not any(row["kind"] == kind for row in table):
            total = sum(row["kind"] == kind for row in kept)
            raise DataError(
                f"data.shares.{split}: no {one} is left for this split; {total} {row_of} rows are too few for these "
                f"shares and limits: {advice}"
            )


def split_card(path: Path, rows: list[dict], renderer: Renderer) -> dict[str, Any]:
    """The data card's entry for a split."""
    prompts = [row for row in rows if "prompt" in row]
    return {
        "rows": len(rows),
        "groups": len({row["group"] for row in rows}),
        "digest": sha256_file(path),
        "prompt_tokens": histogram(renderer.tokens([row["prompt"] for row in prompts])),
        "completion_tokens": histogram(renderer.tokens([answer for row in prompts if (answer := answer_of(row))])),
        "text_tokens": histogram(renderer.tokens([row["text"] for row in rows if "text" in row])),
    }


def comparisons_card(rows: list[dict]) -> dict[str, Any]:
    """The data card's entry for the comparisons."""
    return {
        "prompts": len({row["prompt"] for row in rows}),
        "completions": sum(len(row["completions"]) for row in rows),
        "rankings": sum(len(row["rankings"]) for row in rows),
        "labelers": sorted({ranking["labeler"] for row in rows for ranking in row["rankings"]}),
    }


def feedback_card(rows: list[dict]) -> dict[str, Any]:
    """The data card's entry for the feedback."""
    ratings = [rating for row in rows for rating in row["ratings"]]
    liked = sum(rating["label"] for rating in ratings)
    return {
        "prompts": len({row["prompt"] for row in rows}),
        "completions": len(rows),
        "liked": liked,
        "disliked": len(ratings) - liked,
        "labelers": sorted({rating["labeler"] for rating in ratings}),
    }


def source_dependency(source: dict) -> Dependency:
    """A source of the data card, for the record. A recursive audit checks local files again."""
    about = {key: value for key, value in source.items() if key not in ("source", "digest")}
    name, digest = source["source"], source["digest"]
    if digest:
        return dependency("source", name, digest, files={name: digest}, **about)
    return dependency("source", name, reason="the manifest has the digests of the rows that were read", **about)


def people_dependency(path: Path, what: str, people: list[str]) -> Dependency:
    """Who wrote a split's demonstrations, or rated, for the record of every model trained on them."""
    counts: dict[str, Any] = {what: len(people)}
    return dependency("labels", path.name, sha256_file(path), labelers=sorted(set(people)), **counts)


def write_answers(stage: Stage, config: DataConfig, comparisons: list[dict], feedback: list[dict]) -> None:
    """Writes the preferences and the feedback that came with the data, and who gave them into the record."""
    if config.preferences:
        path = stage.work / "comparisons.jsonl"
        write_jsonl(path, comparisons)
        stage.draft.dependencies.append(labels_dependency(path, comparisons, {}))
    if config.feedback:
        path = stage.work / "feedback.jsonl"
        write_jsonl(path, feedback)
        people = [rating["labeler"] for row in feedback for rating in row["ratings"]]
        stage.draft.dependencies.append(people_dependency(path, "ratings", people))


def run(stage: Stage) -> dict[str, Any]:
    config, shares, account = DataConfig(**stage.config), stage.shared["shares"], Account()
    model = stage.inputs["base"].folder / "model"
    renderer = Renderer(AutoTokenizer.from_pretrained(model, trust_remote_code=False), config)
    read, sources = read_all(config, account)
    shown = rendered(read, config, renderer)
    account.leave_out("not_rendered", read, shown)
    rows = short_enough(shown, config, renderer, positions(AutoConfig.from_pretrained(model, trust_remote_code=False)))
    account.leave_out("too_long", shown, rows)
    apart = without_test_groups(rows, config)
    account.leave_out("group_of_a_test_set", rows, apart)
    assigned(apart, shares, config.sft_on_chosen, stage.seed)
    unique = without_leaks(apart, config)
    account.leave_out("duplicates", apart, unique)
    clean, contaminated = without_contamination(unique, config)
    account.leave_out("contaminated", unique, clean)
    kept = merged(clean)
    account.leave_out("repeated", clean, kept)

    tables, splits, comparisons, feedback, overlap = {}, {}, [], [], {}
    for split in SPLITS:
        own, path = select(kept, split, config, stage.seed, account), stage.work / f"{split}.jsonl"
        tables[split] = own
        check_not_empty(split, own, kept, config, shares)
        if split in contaminated:
            overlap[split] = contamination(own, contaminated[split], config)
        if split in ("reward", "heldout"):
            comparisons += [comparison_row(row) for row in own if row["kind"] == "preferences"]
            feedback += [feedback_row(row) for row in own if row["kind"] == "feedback"]
        write_jsonl(path, [prompt_row(row, split) for row in own])  # type: ignore[misc]
        if authors := [row["labeler"] for row in own if "labeler" in row]:
            stage.draft.dependencies.append(people_dependency(path, "demonstrations", authors))
        if split == "evaluation":
            write_jsonl(stage.work / "contamination.jsonl", [overlap_row(row) for row in own])  # type: ignore[misc]
        splits[split] = split_card(path, own, renderer)
    check_unseen("base.path", stage.inputs["base"].folder, [row for split in MEASURED for row in tables[split]])
    stage.draft.dependencies += [source_dependency(source) for source in sources]
    write_answers(stage, config, comparisons, feedback)
    used = uses(tables)
    for line in lines(used, account.left_out):
        log.info("data: %s", line)
    return {
        "shares": shares,
        "splits": splits,
        "sources": sources,
        "uses": used,
        "left_out": account.left_out,
        "comparisons": comparisons_card(comparisons) if config.preferences else None,
        "feedback": feedback_card(feedback) if config.feedback else None,
        "contamination": overlap["evaluation"] | {"heldout": overlap["heldout"]},
        "dropped": account.totals,
        "rows_read": len(read),
    }


if __name__ == "__main__":
    sys.exit(start("data", run))
