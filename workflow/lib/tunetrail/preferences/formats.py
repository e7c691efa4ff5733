"""Parses and checks the formats in which people record rankings, all into the same kind of rows.

    prompt, chosen, rejected            a pair; the responses may be texts or, as TRL writes them, messages
    chosen, rejected                    a pair of transcripts or chats that differ only in their last turn
    prompt, completions [K], ranks [K]  K completions; ranks are whole numbers from 1 (best), equal ranks are a tie
    prompt, a, b, labels                a pair and its annotators' verdicts: 0 tie, 1 a is better, 2 b is better

Feedback on single responses has the shape `prompt, completion, label` (TRL's unpaired preferences): the prompt is a
text or messages, the completion a text or one message from the assistant, and the label true (liked) or false.

`labeler` and `time` are optional, and so is `order` [K], the order in which the completions were shown. Training data,
the labeler `recorded` and `tunetrail label import` all read rankings with the functions of this module.
"""

import re
from typing import Any

from tunetrail.preferences.ranks import dense
from tunetrail.preferences.rows import FeedbackRow, Message, PreferenceRow, Ranking, Rating

SHAPES = "prompt, chosen, rejected; chosen, rejected (transcripts); prompt, completions, ranks; or prompt, a, b, labels"
VERDICTS = {0: [1, 1], 1: [1, 2], 2: [2, 1]}
"""Verdict on a and b -> their ranks."""
LABELS = {"true": True, "1": True, "false": False, "0": False}
"""The spellings of a label, which is text in CSV files."""


class BadRow(ValueError):
    """Says what is wrong with one row; the reader of the file adds where it is."""


# ----------------------------------------------------------------------------- values


def checked_unicode(value: str, key: str) -> str:
    """The text itself. Raises BadRow for half a surrogate pair, which JSON can express but UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"'{key}' holds half of a surrogate pair, which is no character; remove it") from None
    return value


def checked_text(row: dict, key: str, allow_empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a text, got {type(value).__name__}")
    if not allow_empty and not value.strip():
        raise BadRow(f"'{key}' is empty; remove the row or fill it")
    return checked_unicode(value, key)


def checked_messages(value: Any, key: str) -> list[Message]:
    """A chat: non-empty messages from system (only as the first), user and assistant."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{key}' must be a non-empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(f"'{key}[{i}]' must have 'role' and 'content'")
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"'{key}[{i}].role' must be system, user or assistant, got {message['role']!r}")
        if message["role"] == "system" and i:
            raise BadRow(f"'{key}[{i}]': a system message must come first")
        checked_text(message, "content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def as_messages(prompt: str) -> list[Message]:
    """A plain prompt as one message from the user."""
    return [{"role": "user", "content": prompt}]


def checked_completions(row: dict, allow_empty: bool = False) -> list[str]:
    value = row.get("completions")
    if not isinstance(value, list) or len(value) < 2:
        raise BadRow("'completions' must be a list of at least two texts")
    return [checked_text({"completions": text}, "completions", allow_empty) for text in value]


def checked_ranks(value: Any, k: int) -> list[int]:
    """The ranks of k completions, without gaps."""
    if not isinstance(value, list) or len(value) != k or not all(type(rank) is int and rank > 0 for rank in value):
        raise BadRow(f"'ranks' must be {k} whole numbers from 1 (best), one per completion")
    return dense(value)


def checked_order(row: dict, k: int) -> list[int]:
    """The order in which k completions were shown; if it was not recorded, that of the row."""
    order = row.get("order") or list(range(k))
    if not isinstance(order, list) or not all(type(i) is int for i in order) or sorted(order) != list(range(k)):
        raise BadRow(f"'order' must name each of the {k} completions once, counting from 0")
    return order


def checked_labeler(row: dict) -> str:
    value = row.get("labeler")
    if value is None or value == "":
        return "recorded"
    if not isinstance(value, str | int):
        raise BadRow(f"'labeler' must be a name, got {type(value).__name__}")
    return checked_unicode(str(value), "labeler")


def checked_time(row: dict) -> str | None:
    value = row.get("time")
    if value is None or value == "":
        return None
    if hasattr(value, "isoformat"):  # Parquet and the hub have a type for times
        value = value.isoformat()
    if not isinstance(value, str):
        raise BadRow(f"'time' must be a text such as 2026-01-01T12:00:00Z, got {type(value).__name__}")
    return checked_unicode(value, "time")


def _ranking(ranks: list[int], row: dict, labeler: str) -> Ranking:
    order, time = checked_order(row, len(ranks)), checked_time(row)
    return {"labeler": labeler, "ranks": ranks, "order": order, "time": time, "scores": None}


# ----------------------------------------------------------------------------- pairs of conversations


def parse_transcript(text: str) -> list[Message]:
    """The turns of an HH transcript; each begins with '\\n\\nHuman: ' or '\\n\\nAssistant: '. Raises BadRow."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 5:
        raise BadRow("a transcript must start with '\\n\\nHuman: ' and hold '\\n\\nAssistant: '")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[speaker], "content": words.strip()} for speaker, words in turns]


def _conversations(row: dict) -> tuple[list[Message], list[str]]:
    """(messages, [chosen, rejected]) of two transcripts, or two chats, that differ only in their last turn."""

    def turns(key: str) -> list[Message]:
        is_transcript = isinstance(row[key], str)
        return parse_transcript(checked_text(row, key)) if is_transcript else checked_messages(row[key], key)

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
    return chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]]


def _reply(row: dict, key: str, prompt: list[Message]) -> str:
    """A response in TRL's conversational format: one turn of the assistant, with or without the prompt before it."""
    turns = checked_messages(row[key], key)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow(f"'{key}' must be one message of the assistant, or the prompt's messages and then that one")
    return turns[0]["content"]


def _pair(row: dict, prompt: list[Message] | None, allow_empty: bool) -> tuple[list[Message] | None, list[str]]:
    """(messages, [chosen, rejected]) of a row with these two columns; messages are None if the prompt is a text."""
    if "prompt" not in row:
        return _conversations(row)
    if isinstance(row["chosen"], str):
        return prompt, [checked_text(row, key, allow_empty) for key in ("chosen", "rejected")]
    prompt = prompt or as_messages(checked_text(row, "prompt"))
    return prompt, [_reply(row, key, prompt) for key in ("chosen", "rejected")]


# ----------------------------------------------------------------------------- rows


def _chat_prompt(row: dict) -> list[Message] | None:
    """A prompt that is a chat; None if it is a text or missing."""
    if not isinstance(row.get("prompt"), list):
        return None
    messages = checked_messages(row["prompt"], "prompt")
    if messages[-1]["role"] != "user":
        raise BadRow("'prompt' must end with a turn of the user")
    return messages


def checked_label(row: dict) -> bool:
    value = LABELS.get(str(row["label"]).strip().lower())
    if value is None:
        raise BadRow(f"'label' must be true (liked) or false (disliked), got {row['label']!r}")
    return value


def parse_feedback(row: dict) -> FeedbackRow:
    """A row of feedback: a response that was liked or disliked. Raises BadRow."""
    if lacking := [key for key in ("prompt", "completion", "label") if key not in row]:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(
            f"must have prompt, completion and label, but lacks {', '.join(lacking)}; its columns are {columns}; map "
            "others with columns"
        )
    messages = _chat_prompt(row) or as_messages(checked_text(row, "prompt"))
    is_text = isinstance(row["completion"], str)
    completion = checked_text(row, "completion") if is_text else _reply(row, "completion", messages)
    rating: Rating = {"labeler": checked_labeler(row), "label": checked_label(row)}
    return {"messages": messages, "completion": completion, "ratings": [rating]}


def parse_preference(row: dict, allow_empty: bool = False) -> PreferenceRow:
    """A row of preferences in any of the shapes. Raises BadRow.

    Args:
        allow_empty: accept completions without text.
    """
    labeler, messages = checked_labeler(row), _chat_prompt(row)
    if "completions" in row:
        completions = checked_completions(row, allow_empty)
        rankings = [_ranking(checked_ranks(row.get("ranks"), len(completions)), row, labeler)]
    elif "labels" in row and "a" in row and "b" in row:
        completions, labels = [checked_text(row, key, allow_empty) for key in "ab"], row["labels"]
        if not isinstance(labels, list) or not labels or not all(type(v) is int and v in VERDICTS for v in labels):
            raise BadRow("'labels' must be a non-empty list of 0 (tie), 1 (a is better) or 2 (b is better)")
        rankings = [_ranking(list(VERDICTS[label]), {}, f"annotator-{i}") for i, label in enumerate(labels)]
    elif "chosen" in row and "rejected" in row:
        messages, completions = _pair(row, messages, allow_empty)
        rankings = [_ranking([1, 2], {"time": row.get("time")}, labeler)]
    else:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"must have one of the shapes {SHAPES}; its columns are {columns}; map others with columns")
    if len({c.strip() for c in completions}) < len(completions):
        raise BadRow("two of its responses are the same text; remove the row")
    messages = messages or as_messages(checked_text(row, "prompt"))
    return {"messages": messages, "completions": completions, "rankings": rankings}
