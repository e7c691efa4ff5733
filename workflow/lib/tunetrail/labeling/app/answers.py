"""Which answers are valid. Anything else is refused before it reaches the store."""

from dataclasses import dataclass
from typing import Any

from tunetrail.preferences.ranks import gapless

FLAGS = {
    "instruction": "misses the instruction",
    "invented": "states something false",
    "harmful": "gives harmful advice",
    "abuse": "encourages abuse or self-harm",
    "violent": "violent",
    "sexual": "sexual",
    "denigrating": "denigrates a group of people",
    "moralising": "moralises",
    "unsuitable": "inappropriate for an assistant",
}
"""What may be wrong with an output: key -> the page's wording."""
REASONS = {
    "unclear": "I do not understand the prompt",
    "expertise": "It needs knowledge that I do not have",
    "broken": "The prompt or an output is broken",
    "distressing": "I would rather not read this",
    "other": "Another reason",
}
"""Why a task may be skipped."""
RATINGS = range(1, 8)
COMMENT, TEXT = 4_000, 40_000
"""The most characters in a comment and in an answer."""


class Refused(Exception):
    """A request that is not carried out, with its HTTP status."""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """An answer as the page sends it: lists are in the order in which the outputs were shown."""

    ranks: list[int] | None
    ratings: list[int | None] | None
    flags: list[list[str]]
    all_bad: bool
    comment: str
    text: str | None
    seconds: float


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise Refused(message)


def _text(value: Any, most: int, name: str) -> str:
    _need(isinstance(value, str), f"{name} must be a text")
    _need(len(value) <= most, f"{name} is longer than {most} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name} contains half of a surrogate pair") from None
    _need("\0" not in value, f"{name} contains a null character")  # PostgreSQL cannot store one
    return value.replace("\r\n", "\n")


def _seconds(value: Any) -> float:
    _need(type(value) in (int, float) and 0 <= value < 1e7, "seconds must be a number")
    return round(float(value), 1)


def as_answer(sent: dict, kind: str, k: int) -> Answer:
    """Checks an answer to a task of this kind with k outputs. Raises Refused."""
    allowed = {"seconds", "comment"} | ({"ranks", "ratings", "flags", "all_bad"} if kind == "ranking" else {"text"})
    _need(set(sent) <= allowed, f"unknown key {min(set(sent) - allowed, default='')!r}")
    seconds, comment = _seconds(sent.get("seconds", 0)), _text(sent.get("comment", ""), COMMENT, "the comment")
    if kind == "demonstration":
        text = _text(sent.get("text"), TEXT, "the answer")
        _need(text.strip() != "", "the answer is empty")
        return Answer(None, None, [], False, comment, text.strip(), seconds)
    ranks: Any = sent.get("ranks")
    ratings, flags, all_bad = sent.get("ratings"), sent.get("flags", [[]] * k), sent.get("all_bad", False)
    good = isinstance(ranks, list) and len(ranks) == k and all(type(r) is int for r in ranks)
    _need(good, f"give each of the {k} outputs a rank")
    _need(gapless(ranks), "ranks must count from 1 without gaps")
    if ratings is not None:
        good = isinstance(ratings, list) and len(ratings) == k
        _need(good and all(r is None or (type(r) is int and r in RATINGS) for r in ratings), "ratings go from 1 to 7")
        ratings = ratings if any(r is not None for r in ratings) else None
    good = isinstance(flags, list) and len(flags) == k and all(isinstance(marks, list) for marks in flags)
    _need(good and all(isinstance(mark, str) and mark in FLAGS for marks in flags for mark in marks), "unknown flag")
    _need(type(all_bad) is bool, "all_bad must be true or false")
    return Answer(ranks, ratings, [sorted(set(marks)) for marks in flags], all_bad, comment, None, seconds)


def as_skip(sent: dict) -> tuple[str, Answer]:
    """The reason why a task is skipped, and an answer without content. Raises Refused."""
    _need(set(sent) <= {"reason", "comment", "seconds"}, "unknown key")
    reason = sent.get("reason")
    _need(isinstance(reason, str) and reason in REASONS, "unknown reason")
    comment = _text(sent.get("comment", ""), COMMENT, "the comment")
    return str(reason), Answer(None, None, [], False, comment, None, _seconds(sent.get("seconds", 0)))
