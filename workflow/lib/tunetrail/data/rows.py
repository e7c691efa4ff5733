"""The rows that the data stage writes."""

from typing import NotRequired, TypedDict

from tunetrail.preferences.rows import Message


class TextRow(TypedDict):
    """Raw text, in `sft.jsonl` and `heldout.jsonl`."""

    id: str
    group: str
    source: str
    weight: NotRequired[float]
    """How often it is in an epoch of training, if not once."""
    text: str


class PromptRow(TypedDict):
    """A prompt, and its answer if it has one, in the table of any split."""

    id: str
    group: str
    """The source group: all rows of a group are in the same split."""
    source: str
    prompt: str
    """Rendered with the chat template, as the model sees it."""
    messages: list[Message]
    """The conversation before rendering."""
    weight: NotRequired[float]
    """How often it, or a comparison collected for it, is in an epoch of training, if not once."""
    completion: NotRequired[str]
    """Missing if the source has only prompts."""
    labeler: NotRequired[str]
    """Pseudonym of the answer's author, if known."""


class OverlapRow(TypedDict):
    """How much of an evaluation prompt training texts contain, in `contamination.jsonl`."""

    id: str
    overlap: float | None
    """Share of its word n-grams; null for a prompt with too few words."""
    split: str | None
    """The split that contains most of them."""
