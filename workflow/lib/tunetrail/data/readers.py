"""Reads every source as checked rows, whatever its format and shape.

Nothing here needs a tokenizer, so files can be checked before any job starts.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NotRequired, TypedDict, TypeVar

from tunetrail.config.data import DataConfig, DocstringSource, FileSource, HubSource, TopicsSource
from tunetrail.data import docstrings
from tunetrail.data.files import is_csv, raw_rows, with_lists
from tunetrail.data.invalid import Invalid, found_invalid, leave_out
from tunetrail.errors import DataError
from tunetrail.preferences.formats import (
    BadRow,
    as_messages,
    checked_labeler,
    checked_messages,
    checked_text,
    checked_unicode,
    parse_feedback,
    parse_preference,
)
from tunetrail.preferences.rows import FeedbackRow, Message, PreferenceRow
from tunetrail.provenance.manifest import sha256_file

SHAPES = "text; prompt, completion; or messages"


class Demonstration(TypedDict):
    """A text to learn from: raw `text`, or `messages` with their `completion`."""

    text: NotRequired[str]
    messages: NotRequired[list[Message]]
    """The model's input; a plain prompt is one message from the user."""
    completion: NotRequired[str]
    labeler: NotRequired[str]
    """Who wrote it, if the source says."""
    group: NotRequired[str]
    """Rows of the same group go into the same split."""


class GroupedPreference(PreferenceRow):
    """A preference row and its group; rows of the same group go into the same split."""

    group: str


class GroupedFeedback(FeedbackRow):
    """A feedback row and its group; rows of the same group go into the same split."""

    group: str


Parsed = TypeVar("Parsed", Demonstration, PreferenceRow, FeedbackRow)


def normalise(text: str) -> str:
    """The text in lower case with single spaces: prompts that differ only in case and spacing count as the same."""
    return " ".join(text.lower().split())


def _renamed(row: dict, columns: dict[str, str]) -> dict:
    """The row under our column names. All are renamed at once, so two names may be swapped. Raises BadRow."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadRow(
                f"has no column '{theirs}' (columns maps {ours} to it); its columns are {', '.join(map(str, row))}"
            )
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _group(parsed: Mapping[str, Any], row: dict, column: str | None) -> str:
    """A row's group: the named column, else the user's first message, else the text itself.

    The first message and not the last, so that all rows made from one conversation belong together.
    """
    if column is None:
        first = next((m for m in parsed.get("messages", []) if m["role"] == "user"), None)
        return normalise(first["content"] if first else parsed["text"])
    if column not in row:
        raise BadRow(f"has no column '{column}', which group names")
    if row[column] is None or not str(row[column]).strip():
        raise BadRow(f"'{column}', which group names, is empty; fill it")
    return checked_unicode(str(row[column]), column)


def _read(
    source: FileSource | HubSource, parse: Callable[[dict], list[Parsed]], invalid: list[Invalid] | None
) -> Iterator[tuple[str, Any]]:
    """Yields (where, row) for every row that `parse` makes of a source's rows.

    Rows that do not fit their schema are added to `invalid` and left out. If `invalid` is None, or no row is valid, one
    DataError at the end of the source reports all of them.
    """
    name, rows = raw_rows(source)
    lists_are_texts = is_csv(source)
    count, bad = 0, []
    for number, raw in rows:
        count += 1
        where = f"{name}:{number}"
        try:
            if isinstance(raw, BadRow):
                raise raw
            row = _renamed(raw, source.columns)
            parsed = parse(with_lists(row) if lists_are_texts else row)
            grouped = [{**one, "group": _group(one, row | raw, source.group)} for one in parsed]
        except BadRow as e:
            bad.append(Invalid(where, str(e)))
            continue
        for one in grouped:
            yield where, one
    if not count:
        raise DataError(f"{name}: holds no rows")
    if bad:
        leave_out(found_invalid(name, bad, count), "error" if invalid is None or len(bad) == count else "drop")
    if invalid is not None:
        invalid += bad


# ----------------------------------------------------------------------------- demonstrations


def _parse_demonstration(row: dict) -> list[Demonstration]:
    """Parses a row in any of the three shapes; a chat gives one demonstration per turn of the assistant."""
    shapes = [
        shape
        for shape, keys in (("messages", ("messages",)), ("completion", ("prompt", "completion")), ("text", ("text",)))
        if all(k in row for k in keys)
    ]
    if len(shapes) != 1:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"must have one of the shapes {SHAPES}; its columns are {columns}; map others with columns")
    if shapes == ["text"]:
        return [{"text": checked_text(row, "text")}]
    if shapes == ["completion"]:
        return [{"messages": as_messages(checked_text(row, "prompt")), "completion": checked_text(row, "completion")}]
    messages = checked_messages(row["messages"], "messages")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0 or messages[turns[0] - 1]["role"] != "user":
        raise BadRow("'messages' needs a turn of the assistant after one of the user")
    return [{"messages": messages[:i], "completion": messages[i]["content"]} for i in turns]


def _parse_signed(row: dict) -> list[Demonstration]:
    """Parses a row into demonstrations, with their author if the row names one."""
    parsed = _parse_demonstration(row)
    if row.get("labeler") not in (None, ""):
        labeler = checked_labeler(row)
        for one in parsed:
            one["labeler"] = labeler
    return parsed


def demonstrations(source: Any, invalid: list[Invalid] | None = None) -> Iterator[tuple[str, Demonstration]]:
    """Yields (where, row) of a source of demonstrations; `where` is file and line, or the module.

    Args:
        invalid: collects the invalid rows, which are left out; None: they raise DataError that names file and line.
    """
    match source:
        case DocstringSource():
            for p in docstrings.pairs():
                messages = as_messages(p["prompt"])
                yield (
                    f"docstrings:{p['group']}",
                    {"messages": messages, "completion": p["completion"], "group": p["group"]},
                )
        case TopicsSource():
            from pydoc_data.topics import topics

            for name, text in sorted(topics.items()):
                if text.strip():
                    yield f"topics:{name}", {"text": text.strip(), "group": name}
        case _:
            yield from _read(source, _parse_signed, invalid)


# ----------------------------------------------------------------------------- prompts


def _parse_prompt(row: dict) -> list[Demonstration]:
    """Parses a prompt without an answer: a text, or messages that end with the user's turn."""
    if ("prompt" in row) == ("messages" in row):
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"must have either prompt or messages; its columns are {columns}; map others with columns")
    if isinstance(row.get("prompt"), str):
        return [{"messages": as_messages(checked_text(row, "prompt"))}]
    key = "prompt" if "prompt" in row else "messages"
    messages = checked_messages(row[key], key)
    if messages[-1]["role"] != "user":
        raise BadRow(f"'{key}' must end with a turn of the user; rows with answers go under data.demonstrations")
    return [{"messages": messages}]


def prompts(
    source: FileSource | HubSource, invalid: list[Invalid] | None = None
) -> Iterator[tuple[str, Demonstration]]:
    """Yields (where, row) of a source of prompts. Answers in other columns are ignored.

    See `demonstrations` for `invalid`.
    """
    yield from _read(source, _parse_prompt, invalid)


# ----------------------------------------------------------------------------- preferences


def _joined(rows: Iterable[tuple[str, Any]], answer: str, labels: str) -> Iterator[tuple[str, Any]]:
    """Yields one row per prompt and answer with the labels of all its rows, in the order of the first ones.

    Args:
        answer: the key of the answer.
        labels: the key of the list to join, such as "rankings".
    """
    joined: dict[str, tuple[str, Any]] = {}
    for where, row in rows:
        key = json.dumps([row["messages"], row[answer]])
        if key in joined:
            joined[key][1][labels] += row[labels]
        else:
            joined[key] = (where, row)
    yield from joined.values()


def preferences(
    source: FileSource | HubSource, invalid: list[Invalid] | None = None
) -> Iterator[tuple[str, GroupedPreference]]:
    """Yields (where, row) of a source of preferences. Rankings of the same completions are joined into one row.

    See `demonstrations` for `invalid`.
    """
    yield from _joined(_read(source, lambda row: [parse_preference(row)], invalid), "completions", "rankings")


# ----------------------------------------------------------------------------- feedback


def feedback(
    source: FileSource | HubSource, invalid: list[Invalid] | None = None
) -> Iterator[tuple[str, GroupedFeedback]]:
    """Yields (where, row) of a source of feedback. Ratings of the same response are joined into one row.

    See `demonstrations` for `invalid`.
    """
    yield from _joined(_read(source, lambda row: [parse_feedback(row)], invalid), "completion", "ratings")


# ----------------------------------------------------------------------------- sources


def origin(source: Any) -> dict[str, Any]:
    """Name, version or digest, and licence of a source."""
    match source:
        case DocstringSource():
            return {"source": "docstrings", "digest": None} | docstrings.origin()
        case TopicsSource():
            return {"source": "topics", "digest": None} | docstrings.origin()
        case HubSource():
            return {"source": source.repo, "version": source.revision, "digest": None, "licence": source.licence}
    return {
        "source": os.path.relpath(source.path),
        "version": None,
        "digest": sha256_file(source.path),
        "licence": source.licence,
    }


READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    "demonstrations": demonstrations,
    "preferences": preferences,
    "feedback": feedback,
    "prompts": prompts,
}
"""Key in the data block that lists sources -> the function that reads one of them."""


def check_sources(config: DataConfig) -> list[dict]:
    """The rows of all local files in the config, with `where` and the split that they are `pinned` to.

    Raises one DataError with the problems of all files.
    """
    rows: list[dict] = []
    problems: list[str] = []
    invalid: list[Invalid] | None = [] if config.invalid == "drop" else None
    for kind, read in READERS.items():
        for source in getattr(config, kind):
            if isinstance(source, FileSource):
                try:
                    rows += [{**row, "where": where, "pinned": source.split} for where, row in read(source, invalid)]
                except DataError as e:
                    problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return rows


def row_id(row: dict) -> str:
    """16 hex digits of the sha256 of the row's content."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
