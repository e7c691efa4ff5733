"""What is measured must not be trained on: duplicates across splits, and prompts that stand in training texts.

The overlap of an evaluation or held-out prompt is the share of its word n-grams that a text of a training split (sft,
reward, rl) contains, before any limit. Of a prompt of 3 to n - 1 words it is whether a text contains all of it in one
piece. Nobody here knows what the base model was trained on.
"""

from typing import Any

import numpy as np

from tunetrail.config.data import DataConfig
from tunetrail.data.rows import OverlapRow
from tunetrail.data.splits import TRAINED, duplicates_across, overlaps
from tunetrail.errors import DataError

MEASURED = ("evaluation", "heldout")
"""Splits that something is measured on."""


def compared_text(row: dict) -> str:
    """What duplicates are recognised by: the text, or everything that was said to the model."""
    if "text" in row:
        return row["text"]
    # Less the system message, which many rows share.
    return "\n".join(message["content"] for message in row["messages"] if message["role"] != "system")


def without_leaks(rows: list[dict], config: DataConfig) -> list[dict]:
    """The rows without duplicates across splits. Raises DataError where duplicates is `error`."""
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
    """(the rows less prompts over the limit, how many distinct prompts of each measured split those were).

    Evaluation and held-out prompts get their "overlap". Raises DataError where duplicates is `error`.
    """
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


def contamination(rows: list[dict], dropped: int, config: DataConfig) -> dict[str, Any]:
    """The overlap of the prompts of one split, for the data card.

    {"words": n, "limit", "dropped": distinct prompts over it, "prompts", "too_short", "mean", "max", "histogram": {"edges",
    "counts"}, "worst": up to ten `OverlapRow`s}
    """
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


def overlap_row(row: dict) -> OverlapRow:
    share, split = row["overlap"]
    return {"id": row["id"], "overlap": share, "split": split}
