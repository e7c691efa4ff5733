"""From the rows of all sources to the tables of the splits."""

from typing import Any

from tunetrail.data.rows import PromptRow, TextRow
from tunetrail.errors import DataError


def best(row: dict) -> str:
    """The completion with the lowest mean rank."""
    k = len(row["completions"])
    means = [sum(ranking["ranks"][i] for ranking in row["rankings"]) for i in range(k)]
    return row["completions"][means.index(min(means))]


JOINED = {"preferences": "rankings", "feedback": "ratings"}
"""Kind of row -> what people said of it, of which there may be several."""


def merged(rows: list[dict]) -> list[dict]:
    """One row per id. Rankings, or ratings, of the same completions are joined, say from one file per labeler.

    Raises DataError if sources of different weight have the same row: whose it would be depended on their order.
    """
    found: dict[str, dict] = {}
    torn: list[tuple[dict, dict]] = []
    for row in rows:
        first = found.setdefault(row["id"], row)
        if first.get("weight") != row.get("weight"):
            torn.append((first, row))
        elif first is not row and (said := JOINED.get(row["kind"])):
            found[row["id"]] = first | {said: first[said] + row[said]}
    if torn:
        first, row = torn[0]
        raise DataError(
            f"data: {len(torn)} rows are in sources of different weight, first {row['where']} ({row['weight']:g}) and "
            f"{first['where']} ({first['weight']:g}); give both sources one weight, or remove the rows from one of them"
        )
    return list(found.values())


def one_each(rows: list[dict]) -> list[dict]:
    """One row per prompt, demonstrations first, then preferences: in an interval over prompts each counts once."""
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (answer_of(row) is None, row["kind"])):
        first.setdefault(row["prompt"], row["id"])
    return [row for row in rows if first[row["prompt"]] == row["id"]]


def answer_of(row: dict) -> str | None:
    """What a model learns to say: the demonstration, or the preferred completion; None for a prompt alone, and for
    feedback, whose completion may be a bad one."""
    if row["kind"] == "feedback":
        return None
    return best(row) if row["kind"] == "preferences" else row.get("completion")


def weighted(row: dict, split: str) -> dict[str, float]:
    """{"weight"} of a row of this split's table that counts more or less than once in training."""
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
