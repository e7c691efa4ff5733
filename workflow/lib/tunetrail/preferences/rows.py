"""The rows that carry rankings from files and labelers to the reward model, DPO and evaluation."""

from typing import NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


class Ranking(TypedDict):
    """How one labeler ranked the K completions of a row."""

    labeler: str
    """A pseudonym, such as human-1 or simulated-0."""
    ranks: list[int]
    """[K], in the order of the row's completions: 1 is best, equal ranks are a tie, no rank is left out."""
    order: list[int]
    """[K]: the order in which the completions were shown, as indices from 0."""
    time: str | None
    """When, in ISO 8601, where it is known."""
    scores: list[float] | None
    """[K]: what a simulated labeler or a judge scored, which the ranks follow from."""


class PreferenceRow(TypedDict):
    """A prompt whose completions were ranked, as a file of preferences holds it."""

    messages: list[Message]
    """What the model is shown; the last turn is the user's."""
    completions: list[str]
    """[K], no two of them the same."""
    rankings: list[Ranking]


class Rating(TypedDict):
    """One person's thumb, up or down."""

    labeler: str
    """A pseudonym."""
    label: bool
    """Whether they liked the response."""


class FeedbackRow(TypedDict):
    """A response that was rated by itself, as a file of feedback holds it."""

    messages: list[Message]
    """What the model was shown; the last turn is the user's."""
    completion: str
    ratings: list[Rating]


class SampledRow(TypedDict):
    """A prompt with the completions sampled for it: a line of `completions.jsonl`."""

    id: str
    group: str
    """What keeps rows in one split."""
    split: str
    """reward or heldout."""
    prompt: str
    """The messages rendered by the chat template."""
    messages: list[Message]
    reference: str | None
    """The author's own answer, where the data has one."""
    completions: list[str]
    """[K], without the white space around them."""
    completion_ids: NotRequired[list[list[int]]]
    """[K]: the tokens that the model sampled, with EOS where it ended; missing where texts came from a file. Encoding a
    text again may give other tokens."""
    weight: NotRequired[float]
    """How often an epoch of training has it, where that is not once."""
    finished: list[bool]
    """[K]: whether each completion ended with EOS."""


class ComparisonRow(SampledRow):
    """A sampled row once it is ranked: a line of `comparisons.jsonl`."""

    rankings: list[Ranking]
