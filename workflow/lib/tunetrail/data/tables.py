"""Turns the rows of all sources into the tables of the splits."""

from typing import Any

from tunetrail.data.rows import PromptRow, TextRow
from tunetrail.errors import DataError


def best(row: dict) -> str:
    """The completion with the lowest mean rank."""
    k = len(row["completions"])
    means = [sum(ranking["ranks"][i] for ranking in row["rankings"]) for i in range(k)]
    return row["completions"][means.index(min(means))]


JOINED = {"preferences": "rankings", "feedback": "ratings"}
"""Kind of row -> the key of its labels, which are joined if several rows have the same content."""


def merged(rows: list[dict]) -> list[dict]:
    """One row per id. Rankings, or ratings, of the same completions are joined, say from one file per labeler.

    Raises DataError if sources with different weights contain the same row: its weight would depend on their order.
    """
    by_id: dict[str, dict] = {}
    conflicts: list[tuple[dict, dict]] = []
    for row in rows:
        first = by_id.setdefault(row["id"], row)
        if first.get("weight") != row.get("weight"):
            conflicts.append((first, row))
        elif first is not row and (labels := JOINED.get(row["kind"])):
            by_id[row["id"]] = first | {labels: first[labels] + row[labels]}
    if conflicts:
        first, row = conflicts[0]
        raise DataError(
            f"data: {len(conflicts)} rows are in sources of different weight, first {row['where']} "
            f"({row['weight']:g}) and {first['where']} ({first['weight']:g}); give both sources the same weight, or "
            "remove the rows from one of them"
        )
    return list(by_id.values())


def one_each(rows: list[dict]) -> list[dict]:
    """One row per prompt, since confidence intervals count each prompt once. Demonstrations win over preferences."""
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (answer_of(row) is None, row["kind"])):
        first.setdefault(row["prompt"], row["id"])
    return [row for row in rows if first[row["prompt"]] == row["id"]]


def answer_of(row: dict) -> str | None:
    """The answer to learn: a demonstration's completion, or the preferred one; None for bare prompts and for feedback,
    whose completion may be bad."""
    if row["kind"] == "feedback":
        return None
    return best(row) if row["kind"] == "preferences" else row.get("completion")


def weighted(row: dict, split: str) -> dict[str, float]:
    """{"weight"} of a row in this split's table, if training sees it more or less than once per epoch; else empty."""
    return {"weight": row["weight"]} if split in ("sft", "reward") and row["weight"] != 1 else {}


def prompt_row(row: dict, split: str) -> PromptRow | TextRow:
    """A row of a split's table."""
    common = {key: row[key] for key in ("id", "group", "source", "labeler") if key in row} | weighted(row, split)
    if "text" in row:
        return common | {"text": row["text"]}  # type: ignore[return-value]
    shown = common | {"prompt": row["prompt"], "messages": row["messages"]}
    answer = answer_of(row)
    return shown if answer is None else shown | {"completion": answer}  # type: ignore[return-value]


def comparison_row(row: dict) -> dict[str, Any]:
    """A row of comparisons.jsonl."""
    return {
        "id": row["id"],
        "group": row["group"],
        "split": row["split"],
        "prompt": row["prompt"],
        "messages": row["messages"],
        "reference": None,
        "completions": row["completions"],
        "finished": [True] * len(row["completions"]),
        "rankings": row["rankings"],
    } | weighted(row, row["split"])


def feedback_row(row: dict) -> dict[str, Any]:
    """A row of feedback.jsonl."""
    kept = ("id", "group", "split", "prompt", "messages", "completion", "ratings")
    return {key: row[key] for key in kept} | weighted(row, row["split"])
