"""`scorers`: named scorers of completions."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from tunetrail.config.fields import Block, Name, Positive, Text, no_flags
from tunetrail.config.imported import ImportedModel

Weight = Annotated[float, no_flags]


class ChrfScorer(Block):
    """Overlap of character n-grams with the author's text (Popović 2015), 0 to 100."""

    range: ClassVar[tuple[float, float]] = (0, 100)
    scorer: Literal["chrf"]
    beta: Positive = Field(
        default=1.0, description="recall counts beta times as much as precision; above 1, longer texts win"
    )


class GuidelineScorer(Block):
    """How many rules of PEP 257 a docstring's first sentence keeps, 0 to 5, as pydocstyle reads them."""

    range: ClassVar[tuple[float, float]] = (0, 5)
    scorer: Literal["guideline"]


class ExactScorer(Block):
    """1 if the completion is the author's text, except for case, spaces and punctuation at its ends; else 0."""

    range: ClassVar[tuple[float, float]] = (0, 1)
    scorer: Literal["exact"]


class RegexScorer(Block):
    """1 if a regular expression is found in the completion, else 0."""

    range: ClassVar[tuple[float, float]] = (0, 1)
    scorer: Literal["regex"]
    pattern: Text = Field(description="Python's syntax; anchor it with ^ and $ to match the whole completion")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"is no regular expression: {e}") from None
        return pattern


class LengthScorer(Block):
    """The completion's length; give it a negative weight in a sum to prefer short ones."""

    range: ClassVar[tuple[float, float]] = (0, math.inf)
    scorer: Literal["length"]
    unit: Literal["characters", "words"] = Field(default="words", description="what is counted")


class PythonScorer(Block):
    """A function of your own: `def score(prompt, completion, reference, row) -> float`, or a dict with a `total`."""

    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    scorer: Literal["python"]
    path: Path = Field(description="the Python file; an edit reruns what used it")
    function: Text = Field(default="score", description="its name in the file")
    timeout_seconds: Positive = Field(
        default=10.0, description="time limit per call; a call that takes longer ends the stage"
    )
    needs_reference: bool = Field(default=False, description="refuse rows without the author's text")


class RewardModelScorer(ImportedModel):
    """The score of any sequence-classification model with one label, or with two (the second logit less the first). It
    reads the conversation with its own tokenizer and chat template: give `path`, or `repo` and `revision`.
    """

    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    scorer: Literal["reward_model"]


class SumScorer(Block):
    """A weighted sum of other scorers."""

    scorer: Literal["sum"]
    of: Annotated[dict[Name, Weight], Field(min_length=1)] = Field(description="name of a scorer: its weight")


ScorerConfig = Annotated[
    ChrfScorer
    | GuidelineScorer
    | ExactScorer
    | RegexScorer
    | LengthScorer
    | PythonScorer
    | RewardModelScorer
    | SumScorer,
    Field(discriminator="scorer"),
]
BUILT_IN: Mapping[str, ScorerConfig] = {
    "chrf": ChrfScorer(scorer="chrf"),
    "guideline": GuidelineScorer(scorer="guideline"),
    "exact": ExactScorer(scorer="exact"),
    "length": LengthScorer(scorer="length"),
}
"""Scorers that need no definition."""


def known(defined: Mapping[str, ScorerConfig]) -> dict[str, ScorerConfig]:
    """All scorers by name, including the built-in ones."""
    return {**BUILT_IN, **defined}


def terms(scorer: ScorerConfig | None) -> list[str]:
    """The names of a sum's parts; empty for other scorers."""
    return list(scorer.of) if isinstance(scorer, SumScorer) else []


def needed(names: Iterable[str], defined: Mapping[str, ScorerConfig]) -> dict[str, ScorerConfig]:
    """The scorers with these names and, if they are sums, all their parts, by name. The names must be known."""
    scorers = known(defined)
    return {name: scorers[name] for name in sorted(_reached(names, scorers))}


def unknown(name: str, scorers: Iterable[str]) -> str:
    """The message about a name that no scorer has."""
    near = difflib.get_close_matches(name, scorers, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"there is no scorer {name!r}, only {', '.join(sorted(scorers))}{hint}"


def weighted_range(of: Mapping[str, float], scorers: Mapping[str, ScorerConfig]) -> tuple[float, float]:
    """The lowest and the highest sum of scorers with these weights. No sum may contain itself.

    >>> weighted_range({"guideline": 1.0, "exact": -2.0}, BUILT_IN)
    (-2.0, 5.0)
    """
    low = high = 0.0
    for name, weight in of.items():
        scorer = scorers[name]
        ends = weighted_range(scorer.of, scorers) if isinstance(scorer, SumScorer) else scorer.range
        least, most = sorted(weight * end for end in ends) if weight else (0.0, 0.0)
        low, high = low + least, high + most
    return low, high


def problems_of_sums(defined: Mapping[str, ScorerConfig]) -> Iterator[str]:
    """A line for each sum with an unknown part, or that contains itself."""
    scorers = known(defined)
    for name, scorer in defined.items():
        for part in terms(scorer):
            if part not in scorers:
                yield f"scorers.{name}.of.{part}: {unknown(part, scorers)}"
        parts = _reached(terms(scorer), scorers)
        if name in parts and parts <= scorers.keys():
            yield f"scorers.{name}.of: the sum contains itself"


def _reached(names: Iterable[str], scorers: Mapping[str, ScorerConfig]) -> set[str]:
    """These names, the names of their parts, and so on; including unknown ones."""
    names_reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in names_reached:
            names_reached.add(name)
            waiting += terms(scorers.get(name))
    return names_reached
