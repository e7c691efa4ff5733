"""Readers: every source as checked rows, whatever its format and shape.

A demonstration row is `{"text", "group"}` or `{"messages", "completion", "group"}`; a preference row is
`{"messages", "completions", "rankings", "group"}`. `messages` is what the model is shown, a single
prompt being one message of the user. Nothing here needs a tokenizer, so files can be checked before
any job starts.
"""

import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunetrail.config import DataConfig, DocstringSource, FileSource, HubSource, TopicsSource
from tunetrail.contract import sha256_file
from tunetrail.data import docstrings
from tunetrail.errors import DataError

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


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise DataError(
                        f"{path}:{number}: not valid JSON ({e}); every line must hold one JSON object"
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
                yield number, row
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8; convert the file with iconv") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: the gzip file is cut short or damaged; copy it again") from None


def _plain(value: Any) -> Any:
    """A cell of a table as JSON would hold it: numpy arrays as lists, missing values as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV (cells that look like JSON lists are read as lists) or Parquet file, numbered from 1."""
    import pandas as pd

    is_csv = ".csv" in path.suffixes
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False) if is_csv else pd.read_parquet(path)
    except Exception as e:  # pandas and pyarrow raise many kinds
        raise DataError(
            f"{path}: cannot be read as {'CSV' if is_csv else 'Parquet'}: {str(e).splitlines()[0]}"
        ) from None
    for number, row in enumerate(frame.to_dict("records"), 1):
        cells = {str(key): _plain(value) for key, value in row.items()}
        if is_csv:
            cells = {k: json.loads(v) if v[:1] == "[" and _is_json(v) else v for k, v in cells.items()}
        yield number, cells


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _hub(source: HubSource) -> Iterator[tuple[int, dict]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.repo, source.subset, revision=source.revision, split=source.split)
    except Exception as e:
        raise DataError(
            f"{source.repo}@{source.revision}: cannot be loaded from the hub: {str(e).splitlines()[0]}"
        ) from None
    yield from enumerate(rows, 1)


def read_rows(source: FileSource | HubSource) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row, under our column names. Raises DataError naming file and line."""
    if isinstance(source, HubSource):
        name, rows = f"{source.repo}@{source.revision}", _hub(source)
    else:
        name, suffixes = str(source.path), [s for s in source.path.suffixes if s != ".gz"]
        if not suffixes or suffixes[-1] not in (".jsonl", ".csv", ".parquet"):
            raise DataError(f"{name}: unknown format; the name must end in .jsonl, .csv or .parquet (.gz may follow)")
        rows = _jsonl(source.path) if suffixes[-1] == ".jsonl" else _table(source.path)
    count = 0
    for number, row in rows:
        count += 1
        for ours, theirs in source.columns.items():
            if theirs not in row:
                raise DataError(
                    f"{name}:{number}: has no column '{theirs}' (columns maps {ours} to it); its columns are {', '.join(map(str, row))}"
                )
            row = {k: v for k, v in row.items() if k != theirs} | {ours: row[theirs]}
        if source.group is not None and source.group not in row:
            raise DataError(f"{name}:{number}: has no column '{source.group}', which group names")
        yield f"{name}:{number}", row
    if not count:
        raise DataError(f"{name}: holds no rows")


# ----------------------------------------------------------------------------- shapes


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a text, got {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"'{key}' is empty; remove the row or fill it")
    return value


def _messages(value: Any, key: str) -> list[dict]:
    """A chat, checked: non-empty messages of system, user and assistant."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{key}' must be a non-empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or set(message) < {"role", "content"}:
            raise BadRow(f"'{key}[{i}]' must have 'role' and 'content'")
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"'{key}[{i}].role' must be system, user or assistant, got {message['role']!r}")
        if message["role"] == "system" and i:
            raise BadRow(f"'{key}[{i}]': a system message must come first")
        _text(message, "content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _user(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


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
    for key, turn in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if not turn["content"].strip():
            raise BadRow(f"the last turn of '{key}' is empty; remove the row")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _ranking(ranks: list[int], row: dict, labeler: str) -> dict:
    order = row.get("order") or list(range(len(ranks)))
    if sorted(order) != list(range(len(ranks))):
        raise BadRow(f"'order' must name each of the {len(ranks)} completions once, counting from 0")
    return {"labeler": labeler, "ranks": ranks, "order": order, "time": row.get("time"), "scores": None}


def _dense(ranks: list[int]) -> list[int]:
    places = {rank: i for i, rank in enumerate(sorted(set(ranks)), 1)}
    return [places[rank] for rank in ranks]


def _preference(row: dict) -> dict:
    """One row in any of the preference shapes."""
    labeler = str(row.get("labeler") or "recorded")
    messages = _messages(row["prompt"], "prompt") if isinstance(row.get("prompt"), list) else None
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
        rankings = [_ranking(_dense(ranks), row, labeler)]
    elif "labels" in row and "a" in row and "b" in row:
        completions, labels = [_text(row, "a"), _text(row, "b")], row["labels"]
        verdicts = {0: [1, 1], 1: [1, 2], 2: [2, 1]}
        if not isinstance(labels, list) or not labels or not all(type(v) is int and v in verdicts for v in labels):
            raise BadRow("'labels' must be a non-empty list of 0 (tie), 1 (a is better) or 2 (b is better)")
        rankings = [_ranking(verdicts[label], {}, f"annotator-{i}") for i, label in enumerate(labels)]
    elif "chosen" in row and "rejected" in row:
        if "prompt" in row and isinstance(row["chosen"], str):
            completions = [_text(row, "chosen"), _text(row, "rejected")]
        elif "prompt" in row:  # TRL's conversational format: the last turns apart
            completions = [_messages(row[key], key)[-1]["content"] for key in ("chosen", "rejected")]
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
    return {"messages": messages or _user(_text(row, "prompt")), "completions": completions, "rankings": rankings}


# ----------------------------------------------------------------------------- sources


def _group(parsed: dict, row: dict, column: str | None) -> str:
    """What keeps rows in one split: the named column, else the prompt (the user's last turn), else the text itself."""
    if column is not None:
        return str(row[column])
    return normalise(parsed["messages"][-1]["content"] if "messages" in parsed else parsed["text"])


def _checked(parse: Callable[[dict], Any], where: str, row: dict, invalid: list[str] | None) -> Any:
    """The parsed row; a bad one raises DataError, or is noted in `invalid` and gives None."""
    try:
        return parse(row)
    except BadRow as e:
        if invalid is None:
            raise DataError(f"{where}: {e}") from None
        invalid.append(f"{where}: {e}")
        return None


def read_demonstrations(source: Any, invalid: list[str] | None = None) -> list[dict]:
    """The rows of a demonstration source.

    Args:
        invalid: collects what is wrong with rows that are left out; None: the first one raises
            DataError naming file and line.
    """
    match source:
        case DocstringSource():
            return [
                {"messages": _user(p["prompt"]), "completion": p["completion"], "group": p["group"]}
                for p in docstrings.pairs()
            ]
        case TopicsSource():
            from pydoc_data.topics import topics

            return [{"text": text.strip(), "group": name} for name, text in sorted(topics.items()) if text.strip()]
    rows = []
    for where, row in read_rows(source):
        for parsed in _checked(_demonstration, where, row, invalid) or []:
            rows.append(parsed | {"group": _group(parsed, row, source.group)})
    return rows


def read_preferences(source: FileSource | HubSource, invalid: list[str] | None = None) -> list[dict]:
    """The rows of a preference source, several labelers' rankings of the same completions merged into one row.

    `invalid` as in `read_demonstrations`.
    """
    rows: dict[str, dict] = {}
    for where, row in read_rows(source):
        parsed = _checked(_preference, where, row, invalid)
        if parsed is None:
            continue
        key = json.dumps([parsed["messages"], parsed["completions"]])
        if key in rows:
            rows[key]["rankings"] += parsed["rankings"]
        else:
            rows[key] = parsed | {"group": _group(parsed, row, source.group)}
    return list(rows.values())


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
    content = json.dumps({k: v for k, v in row.items() if k != "group"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
