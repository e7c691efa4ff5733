"""Tasks: what people are asked to rank or to write."""

from pathlib import Path
from typing import Any, TypedDict

from tunetrail.data.files import jsonl_rows
from tunetrail.errors import DataError
from tunetrail.preferences.ranks import gapless

MOST = 9
"""The most outputs of a task."""


class Gold(TypedDict):
    """A known ranking."""

    ranks: list[int]
    """[K], 1 is best, equal ranks are a tie, no gaps."""


class Task(TypedDict):
    """What one page shows: a line of `tasks.jsonl`."""

    id: str
    kind: str
    """ranking or demonstration."""
    prompt: str
    """As the labeler sees it, without the chat template."""
    completions: list[str]
    """[K], 2 to 9 for a ranking, none for a demonstration."""
    draft: str | None
    """For a demonstration: an answer to edit."""
    gold: Gold | None
    """For a ranking: the known ranking, if there is one."""
    split: str
    """The split that its prompt is from, or empty."""


def checked_task(task: Any, where: str) -> Task:
    """A task with all its keys. Raises DataError naming the place and what is wrong."""

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise DataError(f"{where}: {message}")

    need(isinstance(task, dict), "must be a JSON object")
    full = {"kind": "ranking", "completions": [], "draft": None, "gold": None, "split": ""} | task
    unknown = set(full) - set(Task.__annotations__)
    need(not unknown, f"unknown key {min(unknown, default='')!r}")
    for key in ("id", "prompt"):
        need(isinstance(full.get(key), str) and full[key] != "", f"'{key}' must be a text")
    need(full["kind"] in ("ranking", "demonstration"), "'kind' must be ranking or demonstration")
    completions = full["completions"]
    are_texts = isinstance(completions, list) and all(isinstance(c, str) for c in completions)
    need(are_texts, "'completions' must be a list of texts")
    need(full["draft"] is None or isinstance(full["draft"], str), "'draft' must be a text or null")
    if full["kind"] == "demonstration":
        need(full["gold"] is None, "a demonstration has no 'gold'")
        return full
    k = len(completions)
    need(2 <= k <= MOST, f"a ranking needs 2 to {MOST} completions, here are {k}")
    if full["gold"] is not None:
        ranks: Any = full["gold"].get("ranks") if isinstance(full["gold"], dict) else None
        valid = isinstance(ranks, list) and len(ranks) == k and all(type(r) is int for r in ranks) and gapless(ranks)
        need(valid, f"'gold' must be {{'ranks': [{k} whole numbers from 1 (best), equal for ties, no gaps]}}")
    return full


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file; empty lines are skipped. Raises DataError naming the line."""
    return [checked_task(row, f"{path}:{number}") for number, row in jsonl_rows(path)]
