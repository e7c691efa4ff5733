"""Builds functions from the scorers in the config."""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from tunetrail.config.scorers import (
    ChrfScorer,
    ExactScorer,
    GuidelineScorer,
    LengthScorer,
    PythonScorer,
    RegexScorer,
    RewardModelScorer,
    ScorerConfig,
    SumScorer,
    known,
)
from tunetrail.errors import DataError
from tunetrail.scorers.chrf import chrf


class Completion(NamedTuple):
    """A completion to score."""

    prompt: str
    text: str
    reference: str | None
    """The author's text, if the data has one."""
    row: Mapping[str, Any]
    """The row of the data, with its `id`."""
    finished: bool = True
    """Whether it ended with EOS instead of being cut off."""


Score = float | dict[str, float]
"""A number, or named numbers including the score as `total`."""


@dataclass(frozen=True)
class Scorer:
    """A scorer, with its name in the config."""

    name: str
    function: Callable[[Sequence[Completion]], Sequence[Score]]
    low: float = -math.inf
    high: float = math.inf
    """The range of the score."""
    needs_reference: bool = False

    def scores(self, completions: Sequence[Completion]) -> list[float]:
        """[N]: the score of each completion; higher is better.

        Raises DataError if rows without a reference are given to a scorer that needs one.
        """
        return [score["total"] if isinstance(score, dict) else score for score in self.parts(completions)]

    def parts(self, completions: Sequence[Completion]) -> Sequence[Score]:
        """[N]: what the scorer returns for each completion, a number or named numbers."""
        if self.needs_reference and (lacking := [c.row.get("id") for c in completions if c.reference is None]):
            raise DataError(
                f"scorers.{self.name}: {len(lacking)} of {len(completions)} completions have no reference text to "
                f"compare with, first that of row {lacking[0]}; give demonstrations with completions, or another scorer"
            )
        return self.function(completions)


def normalised(text: str) -> str:
    """The text in lower case with single spaces, without white space and punctuation at its ends."""
    return " ".join(text.casefold().split()).strip(string.punctuation + string.whitespace)


def _each(function: Callable[[Completion], Score]) -> Callable[[Sequence[Completion]], list[Score]]:
    return lambda completions: [function(completion) for completion in completions]


def _own(name: str, config: PythonScorer) -> Callable[[Sequence[Completion]], Sequence[Score]]:
    from tunetrail.scorers.own import OwnScorer

    own = OwnScorer(name, config.path, config.function, config.timeout_seconds)
    return lambda completions: own([(c.prompt, c.text, c.reference, dict(c.row)) for c in completions])


def _reward_model(name: str, config: RewardModelScorer) -> Callable[[Sequence[Completion]], Sequence[Score]]:
    @cache
    def scorer() -> Callable[[Sequence[Completion]], Sequence[Score]]:
        from tunetrail.scorers.reward_model import ModelScorer  # torch

        return ModelScorer(name, config)

    return lambda completions: scorer()(completions)


def _guideline(completion: Completion) -> Score:
    from tunetrail.scorers.guideline import guideline  # pydocstyle

    return guideline(completion.prompt, completion.text)


def _sum(terms: list[tuple[float, Scorer]]) -> Callable[[Sequence[Completion]], list[Score]]:
    def total(completions: Sequence[Completion]) -> list[Score]:
        columns = [(weight, scorer.name, scorer.scores(completions)) for weight, scorer in terms]
        return [
            {name: column[i] for _, name, column in columns}
            | {"total": sum(weight * column[i] for weight, _, column in columns)}
            for i in range(len(completions))
        ]

    return total


def build(name: str, definitions: Mapping[str, Any]) -> Scorer:
    """The scorer with this name.

    Args:
        definitions: name -> block of `scorers`, as a mapping or parsed; built-in scorers need none.
    """
    definition: Any = known(definitions)[name]
    if isinstance(definition, Mapping):  # from a resolved config, which also has the digest of the user's file
        definition = {key: value for key, value in definition.items() if key != "sha256"}
    config: ScorerConfig = TypeAdapter(ScorerConfig).validate_python(definition)
    match config:
        case ChrfScorer(beta=beta):
            return Scorer(name, _each(lambda c: chrf(c.text, c.reference or "", beta)), *config.range, True)
        case GuidelineScorer():
            return Scorer(name, _each(_guideline), *config.range)
        case ExactScorer():
            return Scorer(
                name, _each(lambda c: float(normalised(c.text) == normalised(c.reference or ""))), *config.range, True
            )
        case RegexScorer(pattern=pattern):
            compiled = re.compile(pattern)
            return Scorer(name, _each(lambda c: float(bool(compiled.search(c.text)))), *config.range)
        case LengthScorer(unit=unit):
            return Scorer(
                name, _each(lambda c: float(len(c.text.split()) if unit == "words" else len(c.text))), *config.range
            )
        case PythonScorer():
            return Scorer(name, _own(name, config), needs_reference=config.needs_reference)
        case RewardModelScorer():
            return Scorer(name, _reward_model(name, config))
        case SumScorer():
            terms = [(weight, build(part, definitions)) for part, weight in config.of.items()]
            ends = [sorted((weight * part.low, weight * part.high)) if weight else [0.0, 0.0] for weight, part in terms]
            needs = any(part.needs_reference for weight, part in terms)
            return Scorer(name, _sum(terms), sum(low for low, _ in ends), sum(high for _, high in ends), needs)
