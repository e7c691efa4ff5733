"""The rows that the data stage writes."""

from typing import NotRequired, TypedDict

from tunetrail.preferences.rows import Message


class TextRow(TypedDict):
    """Raw text, of `sft.jsonl` and `heldout.jsonl`."""

    id: str
    group: str
    source: str
    weight: NotRequired[float]
    """How often an epoch of training has it, where that is not once."""
    text: str


class PromptRow(TypedDict):
    """A prompt, and its answer where it has one, of every split."""

    id: str
    group: str
    """The source group: all rows of a group are in one split."""
    source: str
    prompt: str
    """As the model is shown it, rendered by the chat template."""
    messages: list[Message]
    """What was said, before rendering."""
    weight: NotRequired[float]
    """How often an epoch of training has it, or what is collected for it, where that is not once."""
    completion: NotRequired[str]
    """Missing where a source has prompts only."""
    labeler: NotRequired[str]
    """The pseudonym of who wrote the answer, where it is known."""


class OverlapRow(TypedDict):
    """How much of an evaluation prompt stands in the training texts, of `contamination.jsonl`."""

    id: str
    overlap: float | None
    """Share of its word n-grams; null for a prompt of too few words."""
    split: str | None
    """Where most of them are."""
