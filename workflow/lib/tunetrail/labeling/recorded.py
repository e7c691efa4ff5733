"""Rankings that were recorded before, looked up in a file.

The file is JSONL, a ranking a line, in one of three shapes:

    {"prompt", "completions": [K], "ranks": [K], "labeler", "time", "order"}   the last three optional
    {"prompt", "chosen", "rejected", "labeler", "time"}                        the last two optional
    {"prompt", "completions": [K], "rankings": [{"ranks": [K], "labeler", "time", "order"}]}

the last being what the `comparisons` stage writes. Ranks are whole numbers from 1 (best), equal = tie.

A line belongs to a comparison row when

1. its prompt equals the row's rendered prompt, or else its last user message (space around either is
   ignored); and
2. it ranks every completion of the row (space around them is ignored). It may rank more: the ranks of
   the others are left out and the rest closed up.

All lines that belong give a ranking each, so several labelers, or one line a labeler, are fine.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunetrail.config.comparisons import RecordedLabeler
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.ranks import dense
from tunetrail.provenance.manifest import sha256_file


@dataclass
class Recorded:
    """One ranking of the file."""

    line: int
    prompt: str
    completions: list[str]
    ranks: list[int]
    order: list[int]
    labeler: str
    time: str | None

    def of(self, completions: list[str]) -> dict | None:
        """The ranking of these completions; None where one of them was not ranked."""
        place = {completion: i for i, completion in enumerate(self.completions)}
        if not all(completion.strip() in place for completion in completions):
            return None
        places = [place[completion.strip()] for completion in completions]
        return {
            "labeler": self.labeler,
            "ranks": dense([self.ranks[i] for i in places]),
            "order": [places.index(i) for i in self.order if i in places],
            "time": self.time,
            "scores": None,
        }


def _parse(row: dict, line: int) -> Iterator[Recorded]:
    """The rankings in one row. Raises ValueError saying what is wrong with it."""
    if "chosen" in row and "completions" not in row:
        row = row | {"completions": [row["chosen"], row.get("rejected")], "ranks": [1, 2]}
    prompt, completions = row.get("prompt"), row.get("completions")
    if not isinstance(prompt, str):
        raise ValueError("'prompt' must be a text")
    if not isinstance(completions, list) or not all(isinstance(c, str) for c in completions):
        raise ValueError("needs 'completions' (a list of texts) with 'ranks', or 'chosen' and 'rejected'")
    completions = [c.strip() for c in completions]
    if len(set(completions)) < len(completions):
        raise ValueError("'completions' holds the same text twice")
    for ranking in row.get("rankings", [row]):
        ranks, order = ranking.get("ranks"), ranking.get("order") or list(range(len(completions)))
        if (
            not isinstance(ranks, list)
            or len(ranks) != len(completions)
            or not all(type(r) is int and r > 0 for r in ranks)
        ):
            raise ValueError(f"'ranks' must be {len(completions)} whole numbers from 1 (best), one a completion")
        if sorted(order) != list(range(len(completions))):
            raise ValueError("'order' must name each completion once, counting from 0")
        labeler = str(ranking.get("labeler") or "recorded")
        yield Recorded(line, prompt.strip(), completions, ranks, order, labeler, ranking.get("time"))


def read_rankings(path: Path, columns: dict[str, str]) -> dict[str, list[Recorded]]:
    """The rankings of a file by prompt.

    Args:
        columns: our name of a column -> the file's name, where they differ.

    Raises DataError naming the line.
    """
    found: dict[str, list[Recorded]] = defaultdict(list)
    ours = {theirs: name for name, theirs in columns.items()}
    with path.open(encoding="utf-8") as f:
        for line, text in enumerate(f, 1):
            try:
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError("must be a JSON object")
                for recorded in _parse({ours.get(key, key): value for key, value in row.items()}, line):
                    found[recorded.prompt].append(recorded)
            except (ValueError, TypeError) as e:
                raise DataError(f"{path}:{line}: {e}") from None
    return found


def _short(prompt: str) -> str:
    text = " ".join(prompt.split())
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def rank(rows: list[dict], config: RecordedLabeler, stage: Stage) -> Labels:
    """Raises DataError for a row that the file does not rank."""
    recorded = read_rankings(config.path, config.columns)

    rankings = []
    for row in rows:
        prompt = row["prompt"].strip()
        if prompt not in recorded:
            prompt = row["messages"][-1]["content"].strip()
        if prompt not in recorded:
            raise DataError(
                f"{config.path}: no line ranks completions of the prompt {_short(prompt)} (row {row['id']})"
            )
        found = [ranking for entry in recorded[prompt] if (ranking := entry.of(row["completions"]))]
        if not found:
            entry = recorded[prompt][0]
            lacking = next(c for c in row["completions"] if c.strip() not in entry.completions)
            raise DataError(
                f"{config.path}:{entry.line}: does not rank the completion {_short(lacking)} "
                f"of the prompt {_short(prompt)} (row {row['id']}); add a line that ranks all its completions"
            )
        rankings.append(found)
    return Labels(rankings, source={"files": {os.path.relpath(config.path): sha256_file(config.path)}})
