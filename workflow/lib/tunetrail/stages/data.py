"""Data preparation: read, check, render, split by source group, refuse leaks, describe.

    python -m tunetrail.stages.data --config C.json --input base=… --output results/RUN/data/manifest.json --state …

Writes `sft.jsonl`, `reward.jsonl`, `rl.jsonl`, `evaluation.jsonl`, `heldout.jsonl` and, where preferences
came with the data, `comparisons.jsonl`. `metrics.json` is the data card. Each file is in a seeded order, so
that a limit takes a random prefix.

The overlap of an evaluation or held-out prompt is the share of its word n-grams that a text of a training split (sft,
reward, rl) has, before any limit; of a prompt of 3 to n - 1 words, whether a text has all of it in one piece.
`contamination.jsonl` has {"id", "overlap": null for a prompt of fewer words, "split": where most of them are} of the
prompts that models are evaluated on, and the card

    contamination  {"words": n, "limit", "dropped": distinct prompts over it, "prompts", "too_short", "mean", "max",
                   "histogram": {"edges", "counts"}, "worst": [{"id", "overlap", "split"}], ten with an overlap at most},
                   and "heldout": the same of the held-out prompts

What the base model was trained on nobody here knows.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer

from tunetrail.config.data import SPLITS, DataConfig, DocstringSource
from tunetrail.contract.runner import log
from tunetrail.contract.stage import Stage
from tunetrail.data.chat import render, with_system
from tunetrail.data.readers import demonstrations, origin, preferences, row_id
from tunetrail.data.splits import TRAINED, assign_splits, duplicates_across, histogram, overlaps, shuffled
from tunetrail.errors import ConfigError, DataError
from tunetrail.files import write_jsonl
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import dependency, labels_dependency
from tunetrail.stages.registry import start

MEASURED = ("evaluation", "heldout")
"""Splits that something is measured on."""


class Renderer:
    """Messages -> the prompt string the model is shown, and token counts."""

    def __init__(self, tokenizer: Any, config: DataConfig):
        self.tokenizer, self.config = tokenizer, config
        if config.chat and not tokenizer.chat_template:
            raise DataError(
                "data.chat: the base model has no chat template; set data.chat to false, or give base.chat_template"
            )
        if not config.chat and config.system is not None:
            raise ConfigError("data.system: plain prompts have no place for it; set it to null, or data.chat to true")

    def prompt(self, row: dict) -> str:
        messages = row["messages"]
        if not self.config.chat:
            if len(messages) != 1:
                raise DataError(
                    f"data.chat: is false, but the data holds conversations; set it to true ({row['where']})"
                )
            return messages[0]["content"]
        try:
            return render(self.tokenizer, messages)
        except TemplateError as e:
            raise DataError(
                f"{row['where']}: the chat template refuses turns of {', '.join(m['role'] for m in messages)} ({e}); "
                "change the row or data.system, or give base.chat_template"
            ) from None

    def tokens(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def best(row: dict) -> str:
    """The completion of the lowest mean rank."""
    k = len(row["completions"])
    means = [sum(ranking["ranks"][i] for ranking in row["rankings"]) for i in range(k)]
    return row["completions"][means.index(min(means))]


def compared_text(row: dict) -> str:
    """What duplicates are told by: the text, or all that was said to the model."""
    if "text" in row:
        return row["text"]
    # Less the system message, which many rows share.
    return "\n".join(message["content"] for message in row["messages"] if message["role"] != "system")


def read_all(config: DataConfig) -> tuple[list[dict], list[dict]]:
    """(rows, cards): the rows of every source with `source`, `where` and `kind`, and what each source is."""
    invalid: list[str] | None = [] if config.invalid == "drop" else None
    rows, cards = [], []
    readers: list[tuple[str, Sequence[Any], Callable[..., Iterator[tuple[str, Any]]]]] = [
        ("demonstrations", config.demonstrations, demonstrations),
        ("preferences", config.preferences, preferences),
    ]
    for kind, sources, read in readers:
        for source in sources:
            before = len(invalid or [])
            found = [row | {"where": where} for where, row in read(source, invalid)]
            card = origin(source) | {"invalid_rows": len(invalid or []) - before}
            shape = (
                "rankings"
                if kind == "preferences"
                else "/".join(sorted({"text" if "text" in row else "prompt" for row in found}))
            )
            cards.append(card | {"kind": kind, "shape": shape, "rows": len(found)})
            limits = (source.max_code_tokens, source.max_answer_tokens) if isinstance(source, DocstringSource) else None
            rows += [row | {"source": card["source"], "kind": kind, "max_tokens": limits} for row in found]
    for line in invalid or []:
        log.info("data: left out: %s", line)
    return rows, cards


def fits(row: dict, config: DataConfig, renderer: Renderer) -> bool:
    """Whether a row is short enough. Raises DataError where too_long is `error`."""
    if "text" in row:
        return True
    completions = row.get("completions") or [row["completion"]]
    longest = max(renderer.tokens(completions))
    if row["max_tokens"]:  # the built-in source takes what is short enough
        code, answer = row["max_tokens"]
        if renderer.tokens([row["messages"][-1]["content"]])[0] > code or longest > answer:
            return False
    prompt = renderer.tokens([row["prompt"]])[0]
    if prompt <= config.max_prompt_tokens and longest <= config.max_completion_tokens:
        return True
    if config.too_long == "drop":
        return False
    key, count = (
        ("max_prompt_tokens", prompt) if prompt > config.max_prompt_tokens else ("max_completion_tokens", longest)
    )
    raise DataError(
        f"{row['where']}: has {count} tokens, more than data.{key} ({getattr(config, key)}): {row['prompt'][:60]!r}…; raise it, or set data.too_long to drop"
    )


def without_leaks(rows: list[dict], config: DataConfig) -> list[dict]:
    """The rows less duplicates across splits. Raises DataError where duplicates is `error`."""
    found = duplicates_across(
        [compared_text(row) for row in rows], [row["split"] for row in rows], config.near_duplicate
    )
    if found and config.duplicates == "error":
        a, b = (f"{rows[i]['where']} ({rows[i]['split']}, {compared_text(rows[i])[:40]!r})" for i in found[0])
        raise DataError(
            f"{len(found)} rows repeat a row of another split, such as {b} which repeats {a}; "
            "give them one group, or set data.duplicates to drop"
        )
    dropped = {i for _, i in found}
    return [row for i, row in enumerate(rows) if i not in dropped]


def without_contamination(rows: list[dict], config: DataConfig) -> tuple[list[dict], dict[str, int]]:
    """The rows, evaluation and held-out prompts with their "overlap", less those over the limit; and how many distinct
    prompts of either split these are. Raises DataError where duplicates is `error`."""
    trained: dict[str, list[str]] = {split: [] for split in TRAINED}
    for row in rows:
        if row["split"] in trained:
            answers = row.get("completions") or [row.get("completion", "")]
            trained[row["split"]] += [compared_text(row), *answers]
    asked = [row for row in rows if row["split"] in MEASURED and "text" not in row]
    found = overlaps([compared_text(row) for row in asked], trained, config.overlap_words)
    for row, overlap in zip(asked, found, strict=True):
        row["overlap"] = overlap
    over = [row for row in asked if (row["overlap"][0] or 0) > config.max_overlap]
    if over and config.duplicates == "error":
        share, split = over[0]["overlap"]
        raise DataError(
            f"{len({row['prompt'] for row in over})} evaluation and held-out prompts are largely in the training texts, "
            f"such as {over[0]['where']} ({over[0]['split']}, {compared_text(over[0])[:40]!r}: {share:.0%} of its "
            f"{config.overlap_words}-word sequences, most in {split}); "
            "set data.duplicates to drop, give them one group, or raise data.max_overlap"
        )
    dropped = {id(row) for row in over}
    prompts = {split: len({row["prompt"] for row in over if row["split"] == split}) for split in MEASURED}
    return [row for row in rows if id(row) not in dropped], prompts


def contamination(rows: list[dict], dropped: int, config: DataConfig) -> dict:
    """For the card, of the prompts of a split in use: see the module's docstring."""
    rows = list({row["prompt"]: row for row in rows if "prompt" in row}.values())
    shares = [row["overlap"][0] for row in rows if row["overlap"][0] is not None]
    counts, edges = np.histogram(shares, bins=10, range=(0, 1))
    worst = sorted((row for row in rows if row["overlap"][0]), key=lambda row: (-row["overlap"][0], row["id"]))[:10]
    return {
        "words": config.overlap_words,
        "limit": config.max_overlap,
        "dropped": dropped,
        "prompts": len(rows),
        "too_short": len(rows) - len(shares),
        "mean": float(np.mean(shares)) if shares else None,
        "max": max(shares, default=None),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "worst": [overlap_row(row) for row in worst],
    }


def overlap_row(row: dict) -> dict:
    share, split = row["overlap"]
    return {"id": row["id"], "overlap": share, "split": split}


def merged(rows: list[dict]) -> list[dict]:
    """One row for each id. Rankings of the same completions, a file for each labeler say, are joined."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["id"] not in found:
            found[row["id"]] = row
        elif row["kind"] == "preferences":
            first = found[row["id"]]
            found[row["id"]] = first | {"rankings": first["rankings"] + row["rankings"]}
    return list(found.values())


def one_each(rows: list[dict]) -> list[dict]:
    """One row of each prompt, demonstrations before preferences: a prompt counts once in an interval over prompts."""
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["kind"]):
        first.setdefault(row["prompt"], row["id"])
    return [row for row in rows if first[row["prompt"]] == row["id"]]


def prompt_row(row: dict) -> dict:
    common = {key: row[key] for key in ("id", "group", "source", "labeler") if key in row}
    if "text" in row:
        return common | {"text": row["text"]}
    completion = best(row) if row["kind"] == "preferences" else row["completion"]
    return common | {"prompt": row["prompt"], "messages": row["messages"], "completion": completion}


def comparison_row(row: dict) -> dict:
    return {
        "id": row["id"], "group": row["group"], "split": row["split"], "prompt": row["prompt"],
        "messages": row["messages"], "reference": None,
        "completions": row["completions"], "finished": [True] * len(row["completions"]), "rankings": row["rankings"],
    }  # fmt: skip


def source_dependency(source: dict) -> dict:
    """A source of the data card, for the record; a file is checked again by a recursive audit."""
    about = {key: value for key, value in source.items() if key not in ("source", "digest")}
    if source["digest"]:
        return dependency(
            "source", source["source"], source["digest"], files={source["source"]: source["digest"]}, **about
        )
    return dependency(
        "source", source["source"], reason="the manifest has the digests of the rows that were read", **about
    )


def authors_dependency(path: Path, authors: list[str]) -> dict:
    """Who wrote demonstrations of a split, for the record of all that is learnt from them."""
    return dependency(
        "labels", path.name, sha256_file(path), demonstrations=len(authors), labelers=sorted(set(authors))
    )


def run(stage: Stage) -> dict:
    config = DataConfig(**stage.config)
    renderer = Renderer(AutoTokenizer.from_pretrained(stage.inputs["base"].folder / "model"), config)
    rows, sources = read_all(config)
    for row in rows:
        if "messages" in row:
            row["messages"] = with_system(row["messages"], config.system)
            row["prompt"] = renderer.prompt(row)
    total = len(rows)
    rows = [row for row in rows if fits(row, config, renderer)]
    dropped = {"too_long": total - len(rows)}
    split_of = assign_splits(rows, config.shares, stage.seed)
    for row in rows:
        row["split"] = split_of[row["group"]]
        row["id"] = row_id({key: row[key] for key in ("text", "prompt", "completion", "completions") if key in row})
    kept = without_leaks(rows, config)
    dropped["duplicates"] = len(rows) - len(kept)
    clean, contaminated = without_contamination(kept, config)
    dropped["contaminated"] = len(kept) - len(clean)
    kept = clean
    kept = merged(kept)

    card: dict[str, Any] = {
        "splits": {},
        "sources": sources,
        "comparisons": None,
        "contamination": None,
        "dropped": dropped,
        "rows_read": total,
    }
    comparisons: list[dict] = []
    dropped["over_limit"] = 0
    for split in SPLITS:
        mine = shuffled([row for row in kept if row["split"] == split], stage.seed, split)
        if split not in ("sft", "heldout"):
            mine = [row for row in mine if "text" not in row]  # raw text is for training and its held-out loss
        if split in ("rl", "evaluation"):
            once = one_each(mine)
            dropped["duplicates"] += len(mine) - len(once)
            mine = once
        limit = getattr(config.limits, split) or len(mine)
        dropped["over_limit"] += max(0, len(mine) - limit)
        mine = mine[:limit]
        if not mine and getattr(config.shares, split) > 0:
            raise DataError(
                f"data.shares.{split}: no row is left for this split; {len(kept)} rows in {len(split_of)} groups are too few for these shares: "
                f"add data, name a finer data group, or set the share to 0"
            )
        if split == "heldout":
            card["contamination"]["heldout"] = contamination(mine, contaminated[split], config)
        if split == "evaluation":
            card["contamination"] = contamination(mine, contaminated[split], config)
            write_jsonl(stage.work / "contamination.jsonl", [overlap_row(row) for row in mine])
        if split in ("reward", "heldout"):
            compared = [comparison_row(row) for row in mine if row["kind"] == "preferences"]
            if config.preferences and not compared and getattr(config.shares, split) > 0:
                raise DataError(
                    f"data.shares.{split}: no comparison is left for this split; {sum(row['kind'] == 'preferences' for row in kept)} "
                    "preference rows are too few for these shares and limits: add data, name a finer data group, or set the share to 0"
                )
            comparisons += compared
        write_jsonl(stage.work / f"{split}.jsonl", [prompt_row(row) for row in mine])
        if authors := [row["labeler"] for row in mine if "labeler" in row]:
            stage.draft.dependencies.append(authors_dependency(stage.work / f"{split}.jsonl", authors))
        prompts = [row for row in mine if "prompt" in row]
        card["splits"][split] = {
            "rows": len(mine),
            "groups": len({row["group"] for row in mine}),
            "digest": sha256_file(stage.work / f"{split}.jsonl"),
            "prompt_tokens": histogram(renderer.tokens([row["prompt"] for row in prompts])),
            "completion_tokens": histogram(renderer.tokens([prompt_row(row)["completion"] for row in prompts])),
            "text_tokens": histogram(renderer.tokens([row["text"] for row in mine if "text" in row])),
        }
    if config.preferences:
        write_jsonl(stage.work / "comparisons.jsonl", comparisons)
        card["comparisons"] = {
            "prompts": len({row["prompt"] for row in comparisons}),
            "completions": sum(len(row["completions"]) for row in comparisons),
            "rankings": sum(len(row["rankings"]) for row in comparisons),
            "labelers": sorted({ranking["labeler"] for row in comparisons for ranking in row["rankings"]}),
        }
    stage.draft.dependencies += [source_dependency(source) for source in sources]
    if config.preferences:
        stage.draft.dependencies.append(labels_dependency(stage.work / "comparisons.jsonl", comparisons, {}))
    return card


if __name__ == "__main__":
    sys.exit(start("data", run))
