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
    """[K], in the order of the row's completions: 1 is best, equal ranks are a tie, and there are no gaps."""
    order: list[int]
    """[K]: the order in which the completions were shown, as indices from 0."""
    time: str | None
    """In ISO 8601, if known."""
    scores: list[float] | None
    """[K]: the scores of a simulated labeler or a judge, from which the ranks follow."""


class PreferenceRow(TypedDict):
    """A prompt with ranked completions, as in a file of preferences."""

    messages: list[Message]
    """The model's input; the last turn is the user's."""
    completions: list[str]
    """[K], no two of them the same."""
    rankings: list[Ranking]


class Rating(TypedDict):
    """One person's thumbs up or down."""

    labeler: str
    """A pseudonym."""
    label: bool
    """Whether they liked the response."""


class FeedbackRow(TypedDict):
    """A response that was rated by itself, as in a file of feedback."""

    messages: list[Message]
    """The model's input; the last turn is the user's."""
    completion: str
    ratings: list[Rating]


class SampledRow(TypedDict):
    """A prompt with the completions sampled for it: a line of `completions.jsonl`."""

    id: str
    group: str
    """Rows of the same group are in the same split."""
    split: str
    """reward or heldout."""
    prompt: str
    """The messages, rendered with the chat template."""
    messages: list[Message]
    reference: str | None
    """The author's answer, if the data has one."""
    completions: list[str]
    """[K], stripped of surrounding white space."""
    completion_ids: NotRequired[list[list[int]]]
    """[K]: the sampled tokens, including EOS if the completion ended; missing if the texts came from a file. Encoding a
    text again may give different tokens."""
    weight: NotRequired[float]
    """How often it is in an epoch of training, if not once."""
    finished: list[bool]
    """[K]: whether each completion ended with EOS."""


class ComparisonRow(SampledRow):
    """A sampled row with its rankings: a line of `comparisons.jsonl`."""

    rankings: list[Ranking]
