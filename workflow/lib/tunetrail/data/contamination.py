"""Keeps test data out of training: duplicates across splits, and prompts that training texts contain.

The overlap of an evaluation or held-out prompt is the share of its word n-grams that texts of the training splits (sft,
reward, rl) contain, before any limit. For a prompt of 3 to n - 1 words it is 1 if a text contains it as a whole, else
0. What the base model was trained on is unknown.
"""

from typing import Any

import numpy as np

from tunetrail.config.data import DataConfig
from tunetrail.data.rows import OverlapRow
from tunetrail.data.splits import TRAINED, duplicates_across, holders, overlaps
from tunetrail.errors import DataError

MEASURED = ("evaluation", "heldout")
"""Splits that models are measured on."""


def compared_text(row: dict) -> str:
    """The text that identifies duplicates: raw text, or all messages of the prompt."""
    if "text" in row:
        return row["text"]
    # Without the system message, which many rows share.
    return "\n".join(message["content"] for message in row["messages"] if message["role"] != "system")


def is_given(row: dict) -> bool:
    """Whether a row belongs to a given test set: its source is pinned to a split that models are measured on."""
    return row["pinned"] in MEASURED


def without_test_groups(rows: list[dict], config: DataConfig) -> list[dict]:
    """The rows without those of other sources whose group is in a given test set.

    Otherwise they would follow their group into the test set, or the test set would lose rows to training. Raises
    DataError instead if data.duplicates is `error`.
    """
    tested: dict[str, dict] = {}
    for row in sorted(filter(is_given, rows), key=lambda row: MEASURED.index(row["pinned"])):
        tested.setdefault(row["group"], row)
    shared = [row for row in rows if row["group"] in tested and row["pinned"] != tested[row["group"]]["pinned"]]
    if shared and config.duplicates == "error":
        row, test = shared[0], tested[shared[0]["group"]]
        raise DataError(
            f"{len(shared)} rows share their group with rows that are pinned to another split, such as {row['where']} "
            f"with {test['where']} ({test['pinned']}, group {row['group'][:40]!r}); remove them, or set "
            "data.duplicates to drop: the test set stays whole"
        )
    left_out = {id(row) for row in shared}
    return [row for row in rows if id(row) not in left_out]


def without_leaks(rows: list[dict], config: DataConfig) -> list[dict]:
    """The rows without duplicates across splits. Raises DataError instead if data.duplicates is `error`."""
    duplicates = duplicates_across(
        [compared_text(row) for row in rows],
        [row["split"] for row in rows],
        config.near_duplicate,
        [is_given(row) for row in rows],
    )
    if duplicates and config.duplicates == "error":
        a, b = (f"{rows[i]['where']} ({rows[i]['split']}, {compared_text(rows[i])[:40]!r})" for i in duplicates[0])
        raise DataError(
            f"{len(duplicates)} rows repeat a row of another split, such as {b} which repeats {a}; "
            "give them the same group, or set data.duplicates to drop"
        )
    dropped = {i for _, i in duplicates}
    return [row for i, row in enumerate(rows) if i not in dropped]


def taught_texts(row: dict) -> list[str]:
    """The texts that a row teaches: its prompt and its answers."""
    return [compared_text(row), *(row.get("completions") or [row.get("completion", "")])]


def _over(rows: list[dict], config: DataConfig) -> list[dict]:
    """The evaluation and held-out prompts over the limit. Gives every row of these splits its "overlap"."""
    trained: dict[str, list[str]] = {split: [] for split in TRAINED}
    for row in rows:
        if row["split"] in trained:
            trained[row["split"]] += taught_texts(row)
    prompts = [row for row in rows if row["split"] in MEASURED and "text" not in row]
    shares = overlaps([compared_text(row) for row in prompts], trained, config.overlap_words)
    for row, overlap in zip(prompts, shares, strict=True):
        row["overlap"] = overlap
    return [row for row in prompts if (row["overlap"][0] or 0) > config.max_overlap]


def without_contamination(rows: list[dict], config: DataConfig) -> tuple[list[dict], dict[str, int]]:
    """(the rows without prompts over the limit, how many distinct prompts of each measured split were dropped).

    Prompts of a given test set stay; instead, each training row that by itself contains too much of one is dropped.
    Evaluation and held-out prompts get their "overlap". Raises DataError instead if data.duplicates is `error`.
    """
    over = _over(rows, config)
    if over and config.duplicates == "error":
        share, split = over[0]["overlap"]
        raise DataError(
            f"{len({row['prompt'] for row in over})} evaluation and held-out prompts are largely in the training "
            f"texts, such as {over[0]['where']} ({over[0]['split']}, {compared_text(over[0])[:40]!r}: {share:.0%} of "
            f"its {config.overlap_words}-word sequences, most in {split}); "
            "set data.duplicates to drop, give them the same group, or raise data.max_overlap"
        )
    if given := [compared_text(row) for row in over if is_given(row)]:
        trained = [row for row in rows if row["split"] in TRAINED]
        held = holders(given, [taught_texts(row) for row in trained], config.overlap_words, config.max_overlap)
        left_out = {id(trained[i]) for i in held}
        rows = [row for row in rows if id(row) not in left_out]
        over = _over(rows, config)
    own = [row for row in over if not is_given(row)]
    dropped = {id(row) for row in own}
    prompts = {split: len({row["prompt"] for row in own if row["split"] == split}) for split in MEASURED}
    return [row for row in rows if id(row) not in dropped], prompts


def contamination(rows: list[dict], dropped: int, config: DataConfig) -> dict[str, Any]:
    """The overlap of one split's prompts, for the data card.

    Returns:
        {"words": n, "limit", "dropped": distinct prompts over it, "prompts", "too_short", "mean", "max", "histogram":
        {"edges", "counts"}, "worst": up to ten `OverlapRow`s}
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
