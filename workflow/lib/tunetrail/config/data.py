"""`data`: what to learn from, and how it is split."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tunetrail.config.fields import Block, Count, Flag, Fraction, Positive, Repo, Text

SPLITS = ("sft", "reward", "rl", "evaluation", "heldout")
KINDS = ("preferences", "feedback", "demonstrations", "prompts", "text")
"""Kinds of rows. A group with several kinds is split as the first of them."""
UNPACKED_MB = 1024
"""The most MB that a data file may hold once it is unpacked: all of it is read into memory."""
TOLERANCE = 1e-3
"""How far a sum of shares may differ from 1, since shares are printed with four digits."""
Split = Literal["sft", "reward", "rl", "evaluation", "heldout"]


class Source(Block):
    """Shared by all sources."""

    split: Split | None = Field(
        default=None,
        description="the split for all its rows, whatever the shares; null: they are split by the shares. "
        "A source pinned to evaluation or heldout is a test set: rows that it shares with others are refused, or "
        "left out of those. Only the probes of `evaluation` may be about training data",
    )
    weight: Positive = Field(
        default=1.0,
        description="how often sft, reward and all policies but ppo see its rows per epoch; with 2.5, half of the rows "
        "come a third time, drawn afresh for each epoch. Test rows count once",
    )

    @model_validator(mode="after")
    def _weight_counts(self):
        if self.weight != 1 and self.split in ("rl", "evaluation", "heldout"):
            raise ValueError(f"weight has no effect with split: {self.split}, whose rows count once; remove it")
        return self


class DocstringSource(Source):
    """Functions of the local Python standard library; the answer is the first sentence of the docstring."""

    source: Literal["docstrings"]
    max_code_tokens: Count = Field(
        default=64,
        description="tokens; functions with more code are left out. Raise it for more rows and slower sampling",
    )
    max_answer_tokens: Count = Field(default=40, description="tokens; longer sentences are left out")


class TopicsSource(Source):
    """Raw text: the prose of `pydoc_data.topics`, which is in every CPython."""

    source: Literal["topics"]


class Rows(Source):
    """Shared by all tables of rows."""

    columns: dict[str, str] = Field(
        default={}, description="our column: the source's column, if the names differ, such as `{prompt: question}`"
    )
    group: str | None = Field(
        default=None,
        description="column; rows with the same value stay in one split. null: the prompt. Name the user, document or "
        "conversation that rows come from; otherwise models are tested on siblings of training rows",
    )
    licence: str | None = Field(default=None, description="SPDX name, recorded in the data card")


class FileSource(Rows):
    """Rows of a JSONL, CSV or Parquet file."""

    source: Literal["file"]
    path: Path = Field(
        description="a `.jsonl`, `.csv` or `.parquet` file (`.gz` may follow), relative to where Snakemake runs"
    )
    unpacked_mb: Count = Field(
        default=UNPACKED_MB, description="MB; a file that unpacks to more is refused before it fills the memory"
    )


class HubSource(Rows):
    """Rows of a data set on the Hugging Face hub."""

    source: Literal["hub"]
    repo: Repo = Field(description="owner/name")
    revision: Text = Field(description="a commit hash or tag; a branch may move")
    hub_split: Text = Field(default="train", description="which split of the data set to read")
    subset: str | None = Field(default=None, description="the data set's configuration, if it has several")

    @field_validator("split", mode="before")
    @classmethod
    def _split_of_ours(cls, split):
        if isinstance(split, str) and split not in SPLITS:
            raise ValueError(
                f"must be one of this run's splits, {', '.join(SPLITS)}, got {split!r}; the key for the data set's own "
                "split was renamed to hub_split"
            )
        return split

    @model_validator(mode="after")
    def _both_splits_are_named(self):
        if self.split and "hub_split" not in self.model_fields_set:
            raise ValueError(
                f"split: {self.split} sends all rows to this run's split of that name; it used to name the data set's "
                "own split, which is hub_split now: give hub_split too (its default is train)"
            )
        return self


DemonstrationSource = Annotated[DocstringSource | TopicsSource | FileSource | HubSource, Field(discriminator="source")]
PromptSource = Annotated[FileSource | HubSource, Field(discriminator="source")]
PreferenceSource = Annotated[FileSource | HubSource, Field(discriminator="source")]
FeedbackSource = Annotated[FileSource | HubSource, Field(discriminator="source")]


class Shares(Block):
    """The share of the groups in each split. null follows the stages: a split that no stage reads gets nothing."""

    sft: Fraction | None = Field(default=None, description="share of the groups; sft's training data")
    reward: Fraction | None = Field(
        default=None,
        description="share of the groups; prompts whose responses are compared or rated, for reward and policies",
    )
    rl: Fraction | None = Field(default=None, description="share of the groups; prompts that ppo trains on")
    evaluation: Fraction | None = Field(
        default=None, description="share of the groups; prompts that all models are evaluated on; null: 0.1"
    )
    heldout: Fraction | None = Field(
        default=None,
        description="share of the groups; comparisons to test the reward model on, and sft's held-out loss; null: 0.1",
    )

    @property
    def given(self) -> dict[str, float]:
        """The shares that the config sets."""
        return {split: share for split in SPLITS if (share := getattr(self, split)) is not None}

    @model_validator(mode="after")
    def _at_most_one(self):
        total = sum(self.given.values())
        if total > 1 + TOLERANCE or (len(self.given) == len(SPLITS) and total < 1 - TOLERANCE):
            raise ValueError(f"the shares of the splits must add up to 1, got {total:g}")
        return self


class Limits(Block):
    """The most rows to keep in each split, drawn by the seed and evenly over groups; null: all. Fewer rows save
    time."""

    sft: Count | None = Field(default=None, description="rows")
    reward: Count | None = Field(default=None, description="rows; each is sampled K times")
    rl: Count | None = Field(default=None, description="rows")
    evaluation: Count | None = Field(default=None, description="rows; 4 times as many halve the intervals")
    heldout: Count | None = Field(default=None, description="rows")


class DataConfig(Block):
    """What to learn from, how it is split, and what to do with rows that do not fit."""

    demonstrations: list[DemonstrationSource] = Field(
        default=[], description="sources of raw text, prompts with answers, or chats"
    )
    preferences: list[PreferenceSource] = Field(
        default=[],
        description="sources of existing comparisons; reward and dpo learn from them, and from those that "
        "`completions` collects",
    )
    feedback: list[FeedbackSource] = Field(
        default=[],
        description="sources of single responses that were liked or disliked, as `prompt, completion, label`; kto "
        "learns from them",
    )
    prompts: list[PromptSource] = Field(
        default=[], description="sources of prompts without answers, for `completions`, `ppo` and the evaluation"
    )
    sft_on_chosen: Flag = Field(
        default=False,
        description="sft also trains on the best response of each preference row that reward and dpo train on",
    )
    chat: Flag = Field(
        default=True, description="render prompts with the chat template; false: plain text, for models without one"
    )
    system: str | None = Field(default=None, description="system message put before every prompt; null: none")
    max_prompt_tokens: Count = Field(default=512, description="the most tokens of a rendered prompt")
    max_completion_tokens: Count = Field(default=512, description="the most tokens of an answer")
    invalid: Literal["error", "drop"] = Field(
        default="error",
        description="rows that cannot be read, lack something, or are refused by the chat template: stop and report "
        "all of them by kind, or leave them out and count them",
    )
    too_long: Literal["error", "drop"] = Field(
        default="error",
        description="rows over the two limits above, or longer than the base model's positions: stop and say how many "
        "there are and which limit would fit them, or leave them out and count them",
    )
    shares: Shares = Field(default=Shares(), description="share of the groups in each split")
    limits: Limits = Field(default=Limits(), description="cap on the rows of each split")
    max_per_group: Count | None = Field(
        default=None, description="the most rows of one group in a split; null: no limit of its own"
    )
    near_duplicate: Fraction = Field(
        default=0.9,
        description="Jaccard similarity of word 3-grams that counts as a near duplicate; 1: only exact duplicates",
    )
    duplicates: Literal["error", "drop"] = Field(
        default="error", description="duplicates across splits: stop, or leave out the training row"
    )
    overlap_words: Count = Field(
        default=8,
        description="length of the word n-grams of evaluation and held-out prompts that are searched for in training "
        "texts; "
        "shorter prompts are searched for as a whole",
    )
    max_overlap: Fraction = Field(
        default=0.5,
        description="share of a prompt's n-grams that training texts may contain; above it `duplicates` decides "
        "whether to stop or to leave the prompt out. 1: all are kept and reported",
    )

    @model_validator(mode="after")
    def _some_data(self):
        if not self.sources:
            raise ValueError("give at least one source under demonstrations, preferences, feedback or prompts")
        return self

    @property
    def sources(self) -> list[Source]:
        return [*self.demonstrations, *self.preferences, *self.feedback, *self.prompts]

    def pins(self, kind: str) -> set[str | None]:
        """The splits that sources of this kind of row are pinned to, including None if one is not pinned.

        A file of demonstrations may hold raw text as well.
        """
        if kind not in ("demonstrations", "text"):
            return {source.split for source in getattr(self, kind)}
        other = TopicsSource if kind == "demonstrations" else DocstringSource
        return {source.split for source in self.demonstrations if not isinstance(source, other)}
