"""Events: what the chain of the label store consists of."""

from typing import NotRequired, TypedDict


class Event(TypedDict):
    """One action. Its canonical JSON is stored, and the event after it holds the sha256 of that.

    All kinds have the keys up to `version`.
    """

    number: int
    """From 1, without gaps."""
    previous: str
    """The sha256 of the event before, or `store.START`."""
    kind: str
    """publish: these tasks and settings apply from now on; ranking and demonstration: an answer of that kind;
    skip: a labeler passed a task on; undo: a labeler took an answer or a skip back."""
    at: str
    """UTC, in ISO 8601."""
    labeler: str | None
    """A pseudonym; None for publish."""
    nonce: str | None
    """The nonce of the assignment that is answered."""
    version: str
    """The version of tunetrail."""

    # publish
    count: NotRequired[int]
    """How many tasks."""
    tasks: NotRequired[str]
    """The digest of the list of the tasks' digests."""
    settings: NotRequired[dict]
    """`Settings`, guidelines included."""

    # ranking, demonstration, skip; `task` also for undo
    task: NotRequired[str]
    """The task's id."""
    task_digest: NotRequired[str]
    task_kind: NotRequired[str]
    purpose: NotRequired[str]
    """label, gold, training or repeat."""
    shown: NotRequired[list[int]]
    """[K], the order in which the completions were shown."""
    ranks: NotRequired[list[int] | None]
    """[K], like ratings and flags in the task's order of completions."""
    ratings: NotRequired[list[int | None] | None]
    flags: NotRequired[list[list[str]]]
    all_bad: NotRequired[bool]
    comment: NotRequired[str]
    text: NotRequired[str | None]
    skipped: NotRequired[str | None]
    """Why, a key of `answers.REASONS`."""
    seconds: NotRequired[float]
    """Seconds of activity as the page counted them, at most the time since the task was opened."""
    opened: NotRequired[float]
    """Seconds since the epoch."""
    guidelines: NotRequired[str]
    """The sha256 of the guidelines that applied."""

    # undo
    undoes: NotRequired[int]
    """The number of the event that no longer counts."""
