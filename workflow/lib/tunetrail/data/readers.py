"""Readers: every source as checked rows, whatever its format and shape.

A demonstration row is `{"text", "group"}` or `{"messages", "completion", "group"}`, with `labeler` where the source names
who wrote it; a preference row is
`{"messages", "completions", "rankings", "group"}`. `messages` is what the model is shown, a single
prompt being one message of the user. Nothing here needs a tokenizer, so files can be checked before
any job starts.
"""

import gzip
import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunetrail.config.data import DataConfig, DocstringSource, FileSource, HubSource, TopicsSource
from tunetrail.data import docstrings
from tunetrail.errors import DataError
from tunetrail.preferences.ranks import dense
from tunetrail.provenance.manifest import sha256_file

SHAPES = "text; prompt, completion; or messages"
PREFERENCE_SHAPES = (
    "prompt, chosen, rejected; chosen, rejected (transcripts); prompt, completions, ranks; or prompt, a, b, labels"
)


class BadRow(ValueError):
    """What is wrong with one row; the reader adds where it is."""


def normalise(text: str) -> str:
    """Case and space do not make a prompt another one."""
    return " ".join(text.lower().split())


# ----------------------------------------------------------------------------- files


def _reason(error: Exception) -> str:
    """The first line of a library's error."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            # Decoded line by line: a text file decodes ahead, and could not say which line is bad.
            for number, line in enumerate(f, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if not text.strip():
                        continue
                    row = json.loads(text)
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number}: not UTF-8; convert the file with iconv") from None
                except (ValueError, RecursionError) as e:
                    raise DataError(
                        f"{path}:{number}: not valid JSON ({e}); every line must hold one JSON object"
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
                yield number, row
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: the gzip file is cut short or damaged; copy it again") from None


def _plain(value: Any) -> Any:
    """A cell of a table as JSON would hold it: arrays as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _table(path: Path, suffix: str) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV or Parquet file, numbered from 1; missing values are None."""
    import pandas as pd

    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: the gzip file is cut short or damaged; copy it again") from None
    try:
        with warnings.catch_warnings():
            # Where rows have more cells than the header, pandas would shift the columns, or drop cells with a warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            if suffix == ".csv":
                frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, index_col=False)
            else:
                frame = pd.read_parquet(io.BytesIO(content))
    except pd.errors.ParserWarning:
        raise DataError(f"{path}: rows have more cells than the header; quote cells that hold a comma") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; convert the file with iconv") from None
    except Exception as e:  # pandas and pyarrow raise many kinds
        raise DataError(f"{path}: cannot be read as {'CSV' if suffix == '.csv' else 'Parquet'}: {_reason(e)}") from None
    frame = frame.astype(object).where(frame.notna(), None)
    for number, row in enumerate(frame.to_dict("records"), 1):
        yield number, {str(key): _plain(value) for key, value in row.items()}


def _listed(row: dict) -> dict:
    """A CSV's row with lists read as such where a list is due: a prompt may well look like one and be a text."""

    def cell(key: str, text: str | None) -> Any:
        try:
            value = json.loads(text) if text and text[0] == "[" else text
        except (ValueError, RecursionError):
            return text
        is_chat = isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
        return value if key in ("messages", "completions", "ranks", "order", "labels") or is_chat else text

    return {key: cell(key, text) for key, text in row.items()}


def _hub(source: HubSource) -> Iterator[tuple[int, dict]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.repo, source.subset, revision=source.revision, split=source.split)
    except Exception as e:
        raise DataError(f"{source.repo}@{source.revision}: cannot be loaded from the hub: {_reason(e)}") from None
    yield from enumerate(rows, 1)


def _raw_rows(source: FileSource | HubSource) -> tuple[str, str, Iterator[tuple[int, dict]]]:
    """(name, suffix, numbered rows) of a source as it stands."""
    if isinstance(source, HubSource):
        return f"{source.repo}@{source.revision}", "", _hub(source)
    name, path = str(source.path), source.path
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if suffix not in (".jsonl", ".csv", ".parquet"):
        raise DataError(f"{name}: unknown format; the name must end in .jsonl, .csv or .parquet (.gz may follow)")
    return name, suffix, _jsonl(path) if suffix == ".jsonl" else _table(path, suffix)


def _renamed(row: dict, columns: dict[str, str]) -> dict:
    """The row under our column names, all renamed at once so that two may change places. Raises BadRow."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadRow(
                f"has no column '{theirs}' (columns maps {ours} to it); its columns are {', '.join(map(str, row))}"
            )
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _group(parsed: dict, row: dict, column: str | None) -> str:
    """What keeps rows in one split: the named column, else what the user said first, else the text itself.

    The first turn and not the last: rows made of one conversation belong together.
    """
    if column is None:
        first = next((m for m in parsed.get("messages", []) if m["role"] == "user"), None)
        return normalise(first["content"] if first else parsed["text"])
    if column not in row:
        raise BadRow(f"has no column '{column}', which group names")
    if row[column] is None or not str(row[column]).strip():
        raise BadRow(f"'{column}', which group names, is empty; fill it")
    return _unicode(str(row[column]), column)


def _read(
    source: FileSource | HubSource, parse: Callable[[dict], list[dict]], invalid: list[str] | None
) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row that `parse` makes of a source's rows.

    A row that fails its schema raises DataError naming file and line, or is noted in `invalid` and left out.
    """
    name, suffix, rows = _raw_rows(source)
    count, good, first = 0, 0, ""
    for number, raw in rows:
        count += 1
        where = f"{name}:{number}"
        try:
            row = _renamed(raw, source.columns)
            parsed = [
                found | {"group": _group(found, row | raw, source.group)}
                for found in parse(_listed(row) if suffix == ".csv" else row)
            ]
        except BadRow as e:
            if invalid is None:
                raise DataError(f"{where}: {e}") from None
            invalid.append(f"{where}: {e}")
            first = first or invalid[-1]
            continue
        good += 1
        for found in parsed:
            yield where, found
    if not count:
        raise DataError(f"{name}: holds no rows")
    if not good:
        raise DataError(f"{name}: every row is invalid, the first: {first}")


# ----------------------------------------------------------------------------- shapes


def _unicode(value: str, key: str) -> str:
    """JSON may spell halves of a character, which no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"'{key}' holds half of a surrogate pair, which is no character; remove it") from None
    return value


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a text, got {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"'{key}' is empty; remove the row or fill it")
    return _unicode(value, key)


def _messages(value: Any, key: str) -> list[dict]:
    """A chat, checked: non-empty messages of system, user and assistant."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{key}' must be a non-empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(f"'{key}[{i}]' must have 'role' and 'content'")
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"'{key}[{i}].role' must be system, user or assistant, got {message['role']!r}")
        if message["role"] == "system" and i:
            raise BadRow(f"'{key}[{i}]': a system message must come first")
        _text(message, "content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _user(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def _signed(row: dict) -> list[dict]:
    """A demonstration with its author, where one is named."""
    author = {} if row.get("labeler") in (None, "") else {"labeler": _labeler(row)}
    return [found | author for found in _demonstration(row)]


def _demonstration(row: dict) -> list[dict]:
    """One row in any of the three shapes; a chat gives a row for every turn of the assistant."""
    shapes = [
        shape
        for shape, keys in (("messages", ("messages",)), ("completion", ("prompt", "completion")), ("text", ("text",)))
        if all(k in row for k in keys)
    ]
    if len(shapes) != 1:
        found = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"must have one of the shapes {SHAPES}; its columns are {found}; map others with columns")
    if shapes == ["text"]:
        return [{"text": _text(row, "text")}]
    if shapes == ["completion"]:
        return [{"messages": _user(_text(row, "prompt")), "completion": _text(row, "completion")}]
    messages = _messages(row["messages"], "messages")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0 or messages[turns[0] - 1]["role"] != "user":
        raise BadRow("'messages' needs a turn of the assistant after one of the user")
    return [{"messages": messages[:i], "completion": messages[i]["content"]} for i in turns]


def parse_transcript(text: str) -> list[dict]:
    """HH's transcripts: turns that begin with '\\n\\nHuman: ' and '\\n\\nAssistant: '. Raises BadRow."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 5:
        raise BadRow("a transcript must start with '\\n\\nHuman: ' and hold '\\n\\nAssistant: '")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _transcripts(row: dict) -> tuple[list[dict], str, str]:
    """(messages, chosen, rejected) of two transcripts, or two chats, that differ in their last turn only."""

    def turns(key: str) -> list[dict]:
        return parse_transcript(_text(row, key)) if isinstance(row[key], str) else _messages(row[key], key)

    chosen, rejected = turns("chosen"), turns("rejected")
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        raise BadRow("'chosen' and 'rejected' must be the same conversation up to the last turn")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise BadRow("the last turn of 'chosen' and 'rejected' must be the assistant's")
    if chosen[-2]["role"] != "user":
        raise BadRow("the turn before the last of 'chosen' and 'rejected' must be the user's")
    for key, turn in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if not turn["content"].strip():
            raise BadRow(f"the last turn of '{key}' is empty; remove the row")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _reply(row: dict, key: str, prompt: list[dict]) -> str:
    """The response in TRL's conversational format: one turn of the assistant, which may follow the whole prompt."""
    turns = _messages(row[key], key)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(f"'{key}' must be one message of the assistant, or the prompt's messages and then that one")
    return turns[0]["content"]


def _labeler(row: dict) -> str:
    value = row.get("labeler")
    if value is None or value == "":
        return "recorded"
    if not isinstance(value, str | int):
        raise BadRow(f"'labeler' must be a name, got {type(value).__name__}")
    return _unicode(str(value), "labeler")


def _time(row: dict) -> str | None:
    value = row.get("time")
    if value is None or value == "":
        return None
    if hasattr(value, "isoformat"):  # Parquet and the hub have times of their own
        value = value.isoformat()
    if not isinstance(value, str):
        raise BadRow(f"'time' must be a text such as 2026-01-01T12:00:00Z, got {type(value).__name__}")
    return _unicode(value, "time")


def _ranking(ranks: list[int], row: dict, labeler: str) -> dict:
    order = row.get("order") or list(range(len(ranks)))
    if (
        not isinstance(order, list)
        or not all(type(i) is int for i in order)
        or sorted(order) != list(range(len(ranks)))
    ):
        raise BadRow(f"'order' must name each of the {len(ranks)} completions once, counting from 0")
    return {"labeler": labeler, "ranks": ranks, "order": order, "time": _time(row), "scores": None}


def _preference(row: dict) -> list[dict]:
    """One row in any of the preference shapes."""
    labeler = _labeler(row)
    messages = None
    if isinstance(row.get("prompt"), list):
        messages = _messages(row["prompt"], "prompt")
        if messages[-1]["role"] != "user":
            raise BadRow("'prompt' must end with a turn of the user")
    if "completions" in row:
        completions, ranks = row["completions"], row.get("ranks")
        if not isinstance(completions, list) or len(completions) < 2:
            raise BadRow("'completions' must be a list of at least two texts")
        completions = [_text({"completions": c}, "completions") for c in completions]
        if (
            not isinstance(ranks, list)
            or len(ranks) != len(completions)
            or not all(type(r) is int and r > 0 for r in ranks)
        ):
            raise BadRow(f"'ranks' must be {len(completions)} whole numbers from 1 (best), one a completion")
        rankings = [_ranking(dense(ranks), row, labeler)]
    elif "labels" in row and "a" in row and "b" in row:
        completions, labels = [_text(row, "a"), _text(row, "b")], row["labels"]
        verdicts = {0: [1, 1], 1: [1, 2], 2: [2, 1]}
        if not isinstance(labels, list) or not labels or not all(type(v) is int and v in verdicts for v in labels):
            raise BadRow("'labels' must be a non-empty list of 0 (tie), 1 (a is better) or 2 (b is better)")
        rankings = [_ranking(verdicts[label], {}, f"annotator-{i}") for i, label in enumerate(labels)]
    elif "chosen" in row and "rejected" in row:
        if "prompt" in row and isinstance(row["chosen"], str):
            completions = [_text(row, "chosen"), _text(row, "rejected")]
        elif "prompt" in row:
            messages = messages or _user(_text(row, "prompt"))
            completions = [_reply(row, key, messages) for key in ("chosen", "rejected")]
        else:
            messages, *completions = _transcripts(row)
        rankings = [_ranking([1, 2], {"time": row.get("time")}, labeler)]
    else:
        found = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(
            f"must have one of the shapes {PREFERENCE_SHAPES}; its columns are {found}; map others with columns"
        )
    if len({c.strip() for c in completions}) < len(completions):
        raise BadRow("two of its responses are the same text; remove the row")
    return [{"messages": messages or _user(_text(row, "prompt")), "completions": completions, "rankings": rankings}]


# ----------------------------------------------------------------------------- sources


def demonstrations(source: Any, invalid: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """(where, row) of a demonstration source, `where` being file and line, or module.

    Args:
        invalid: collects what is wrong with rows that are left out; None: the first one raises
            DataError naming file and line.
    """
    match source:
        case DocstringSource():
            for p in docstrings.pairs():
                row = {"messages": _user(p["prompt"]), "completion": p["completion"], "group": p["group"]}
                yield f"docstrings:{p['group']}", row
        case TopicsSource():
            from pydoc_data.topics import topics

            for name, text in sorted(topics.items()):
                if text.strip():
                    yield f"topics:{name}", {"text": text.strip(), "group": name}
        case _:
            yield from _read(source, _signed, invalid)


def preferences(source: FileSource | HubSource, invalid: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """(where, row) of a preference source, several labelers' rankings of the same completions merged into one row.

    `invalid` as in `demonstrations`.
    """
    rows: dict[str, tuple[str, dict]] = {}
    for where, row in _read(source, _preference, invalid):
        key = json.dumps([row["messages"], row["completions"]])
        if key in rows:
            rows[key][1]["rankings"] += row["rankings"]
        else:
            rows[key] = (where, row)
    yield from rows.values()


def read_demonstrations(source: Any, invalid: list[str] | None = None) -> list[dict]:
    """The rows of `demonstrations`."""
    return [row for _, row in demonstrations(source, invalid)]


def read_preferences(source: FileSource | HubSource, invalid: list[str] | None = None) -> list[dict]:
    """The rows of `preferences`."""
    return [row for _, row in preferences(source, invalid)]


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


def check_sources(config: DataConfig) -> None:
    """Reads every local file of the config once. Raises DataError at the first bad row."""
    for sources, read in ((config.demonstrations, read_demonstrations), (config.preferences, read_preferences)):
        for source in sources:
            if isinstance(source, FileSource):
                read(source, [] if config.invalid == "drop" else None)


def row_id(row: dict) -> str:
    """16 hex digits of the row's content."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
