"""Labels as files for other tools, and back: `tunetrail label export` and `tunetrail label import`.

    jsonl   one line per ranking: equal ranks are ties, and nothing is lost. `data.preferences` and the labeler
            `recorded` read it
    trl     one line per decided pair of a ranking: prompt, chosen, rejected; a tied pair has no line. The columns `id`
            and `labeler` are added, and with them all ranks can be recovered, except for a ranking that ties
            everything. A line without them is read as a ranking of two

Only jsonl keeps ratings, flags, comments and times. Demonstrations have a format of their own, which is only written:
prompt, completion and, as `labeler`, the author's pseudonym; `data.demonstrations` reads it.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from tunetrail.data.files import Rows, jsonl_rows
from tunetrail.errors import DataError
from tunetrail.labeling.labels import Label, RankedLabel, by_task, counted
from tunetrail.labeling.tasks import Task
from tunetrail.preferences.formats import checked_completions, checked_labeler, checked_ranks, checked_text
from tunetrail.preferences.ranks import dense

EXTRAS = ("ratings", "flags", "all_bad", "comment", "seconds")
"""What jsonl keeps of a label in addition to labeler, ranks, order and time; see `Label`."""
Row = dict[str, Any]


class LabeledRanking(TypedDict):
    """One labeler's ranking of an item, with what was recorded about it."""

    labeler: str
    ranks: list[int]
    """[K]: 1 is best, equal ranks are a tie."""
    order: NotRequired[list[int]]
    """[K], the order in which the completions were shown."""
    time: NotRequired[str | None]
    ratings: NotRequired[list[int | None] | None]
    flags: NotRequired[list[list[str]]]
    all_bad: NotRequired[bool]
    comment: NotRequired[str]
    seconds: NotRequired[float]


class Item(TypedDict):
    """A task with its rankings: what every format is written from and read into."""

    id: str
    prompt: str
    completions: list[str]
    rankings: list[LabeledRanking]


def items_of(tasks: Iterable[Task], labels: Iterable[Label]) -> list[Item]:
    """The rankings that count, by task; a task without any is left out."""
    answers = by_task(counted(labels))
    return [
        {
            "id": task["id"],
            "prompt": task["prompt"],
            "completions": task["completions"],
            "rankings": [_ranking_of(label) for label in answers[task["id"]]],
        }
        for task in tasks
        if task["id"] in answers
    ]


def _ranking_of(label: RankedLabel) -> LabeledRanking:
    ranking = {"labeler": label["labeler"], "ranks": label["ranks"], "order": label["shown"], "time": label["at"]}
    return cast(LabeledRanking, ranking | {key: label[key] for key in EXTRAS})  # type: ignore[literal-required]


def demonstrations(tasks: Iterable[Task], labels: Iterable[Label]) -> list[Row]:
    """The answers that labelers wrote, with their pseudonyms."""
    prompts = {task["id"]: task["prompt"] for task in tasks}
    return [
        {"prompt": prompts[row["task"]], "completion": row["text"], "labeler": row["labeler"], "id": row["task"]}
        for row in labels
        if row["kind"] == "demonstration" and row["skipped"] is None and not row["repeat"]
    ]


def as_tasks(items: Iterable[Item]) -> list[Row]:
    """The items as tasks to be ranked on the page."""
    return [{"id": item["id"], "prompt": item["prompt"], "completions": item["completions"]} for item in items]


def _joined(items: Iterable[Item]) -> list[Item]:
    """Joins items with the same id and texts, in the order of their first appearance."""
    first: dict[tuple, Item] = {}
    for item in items:
        key = item["id"], item["prompt"], *item["completions"]
        if key in first:
            first[key]["rankings"] += item["rankings"]
        else:
            first[key] = item
    return list(first.values())


class _BadRow(Exception):
    """Says what is wrong with which row; the reader adds the file."""


def _each(rows: Iterable[tuple[int, Any]], parse: Callable[[Any, int], Any]) -> Iterator[Any]:
    for number, row in rows:
        try:
            yield parse(row, number)
        except (ValueError, TypeError) as e:
            raise _BadRow(f"{number}: {e}") from None


# ----------------------------------------------------------------------------- jsonl


def to_jsonl(items: Iterable[Item]) -> list[Row]:
    return [
        {"id": item["id"], "prompt": item["prompt"], "completions": item["completions"], **ranking}
        for item in items
        for ranking in item["rankings"]
    ]


def _from_jsonl(row: Row, number: int) -> Item:
    completions = checked_completions(row, allow_empty=True)
    ranking = {"labeler": checked_labeler(row), "ranks": checked_ranks(row.get("ranks"), len(completions))}
    ranking |= {key: row[key] for key in ("order", "time", *EXTRAS) if key in row}
    return {
        "id": str(row.get("id", f"line-{number}")),
        "prompt": checked_text(row, "prompt", allow_empty=True),
        "completions": completions,
        "rankings": [cast(LabeledRanking, ranking)],
    }


def from_jsonl(rows: Rows) -> list[Item]:
    return _joined(_each(rows, _from_jsonl))


# ----------------------------------------------------------------------------- TRL


def to_trl(items: Iterable[Item]) -> list[Row]:
    rows = []
    for item in items:
        texts = item["completions"]
        for ranking in item["rankings"]:
            ranks = ranking["ranks"]
            for i, j in combinations(range(len(texts)), 2):
                if ranks[i] != ranks[j] and texts[i] != texts[j]:
                    better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                    rows.append(
                        {"prompt": item["prompt"], "chosen": texts[better], "rejected": texts[worse]}
                        | {"id": item["id"], "labeler": ranking["labeler"]}
                    )
    return rows


def from_trl(rows: Rows) -> list[Item]:
    """Rankings recovered from their pairs: a completion's rank follows from how many are above it.

    Raises _BadRow for pairs that no ranking gives.
    """
    pairs_of: dict[tuple, list[tuple[str, str]]] = {}
    first_line: dict[tuple, int] = {}

    def collect(row: Row, number: int) -> None:
        prompt, chosen, rejected = (
            checked_text(row, key, allow_empty=True) for key in ("prompt", "chosen", "rejected")
        )
        name = row.get("id")
        key = (f"line-{number}" if name is None else str(name), prompt, checked_labeler(row))
        pairs_of.setdefault(key, []).append((chosen, rejected))
        first_line.setdefault(key, number)

    def as_item(key: tuple, number: int) -> Item:
        name, prompt, labeler = key
        pairs = set(pairs_of[key])
        # Two labelers' pairs come in different orders, but belong to one item: hence a sorted list of texts.
        texts = sorted({text for pair in pairs for text in pair})
        above = {text: sum(rejected == text for _, rejected in pairs) for text in texts}
        if pairs != {(a, b) for a in texts for b in texts if above[a] < above[b]}:
            raise ValueError(f"the pairs of id {name!r} by {labeler} do not form a ranking")
        ranks = dense([above[text] + 1 for text in texts])
        return {"id": name, "prompt": prompt, "completions": texts, "rankings": [{"labeler": labeler, "ranks": ranks}]}

    list(_each(rows, collect))
    return _joined(_each(((number, key) for key, number in first_line.items()), as_item))


# ----------------------------------------------------------------------------- files


EXPORT: dict[str, Callable[[Iterable[Item]], list[Row]]] = {"jsonl": to_jsonl, "trl": to_trl}
IMPORT: dict[str, Callable[[Rows], list[Item]]] = {"jsonl": from_jsonl, "trl": from_trl}


def written(rows: list[Row]) -> str:
    """The content of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, form: str) -> list[Item]:
    """The items of a file. Raises DataError naming the line."""
    try:
        return IMPORT[form](jsonl_rows(path))
    except _BadRow as e:
        raise DataError(f"{path}:{e}") from None
