"""Compares the evaluations of a run: outcomes prompt by prompt, forgetting, and shifts of preferences."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunetrail.evaluation.matches import Outcomes, match, pairs_of
from tunetrail.evaluation.probes import shift
from tunetrail.evaluation.schema import Forgetting, Interval, Match, PreferenceShift
from tunetrail.evaluation.stats import bootstrap, bootstrap_of, mean_of, outcomes
from tunetrail.files import read_jsonl
from tunetrail.provenance.manifest import METRICS

Rows = dict[str, dict[str, dict]]
"""Subject -> row id -> row."""


def column(rows: Rows, name: str) -> dict[str, list]:
    """Subject -> the column's values by row, for subjects with no value missing."""
    columns = {subject: [row[name] for row in by_id.values()] for subject, by_id in rows.items()}
    return {subject: values for subject, values in columns.items() if None not in values}


def other_scores(rows: Rows) -> dict[str, dict[str, list]]:
    """Scorer -> subject -> [n, samples], for the further gold scorers that measured every subject."""
    first = [next(iter(by_id.values()), {}) for by_id in rows.values()]
    names = [name for name in first[0].get("scores", {}) if all(name in row.get("scores", {}) for row in first)]
    return {
        name: {subject: [row["scores"][name] for row in by_id.values()] for subject, by_id in rows.items()}
        for name in names
    }


def prompt_means(columns: dict[str, list]) -> dict[str, list[float]]:
    """Subject -> the mean over each prompt's samples; columns hold lists or single numbers."""
    return {subject: [float(np.mean(value)) for value in values] for subject, values in columns.items()}


def gold_outcomes(scores: dict[str, list], tie: float) -> Outcomes:
    """The outcomes for every pair of subjects, from their scores [n, samples] or [n]."""
    return {(a, b): outcomes(scores[a], scores[b], tie) for a, b in pairs_of(list(scores))}


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run, compared by bootstrap with `n_resamples`."""

    folders: dict[str, Path]
    """By subject: base, sft, then the policies by name."""
    n_resamples: int
    seed: int

    @classmethod
    def of(cls, folders: dict[str, Path], n_resamples: int, seed: int) -> "Evaluations":
        ordered = sorted(folders, key=lambda name: (name != "base", name != "sft", name))
        return cls({name: folders[name] for name in ordered}, n_resamples, seed)

    @property
    def subjects(self) -> list[str]:
        return list(self.folders)

    @property
    def reference(self) -> str:
        """The model that policies start from by default."""
        return "sft" if "sft" in self.folders else "base"

    @property
    def changes(self) -> list[tuple[str, str]]:
        """(before, after) of every training: from base to the reference, and from each policy's start to the policy."""
        first = [("base", self.reference)] if self.reference != "base" else []
        # Best-of-n trains nothing and has no probes.
        policies = [name for name in self.folders if name not in ("base", "sft")]
        trained = [name for name in policies if (self.folders[name] / "probes.json").exists()]
        return first + [(self.content(name, METRICS).get("start") or self.reference, name) for name in trained]

    def rows(self, name: str) -> Rows:
        """A JSONL file of every evaluation that has it."""
        paths = {subject: folder / name for subject, folder in self.folders.items()}
        return {
            subject: {row["id"]: row for row in read_jsonl(path)} for subject, path in paths.items() if path.exists()
        }

    def content(self, subject: str, name: str) -> Any:
        """A JSON file of one evaluation."""
        return json.loads((self.folders[subject] / name).read_text(encoding="utf-8"))

    def match(
        self, outcome_of: Outcomes, samples: Rows, length: str, tie: float, scores: dict[str, list] | None = None
    ) -> Match | None:
        """The match with these outcomes; None if there are none.

        Args:
            samples: the rows of samples.jsonl.
            length: the column with the lengths of the compared responses.
            scores: by subject, [n, samples] or [n], to report differences of; None: no differences.
        """
        if not outcome_of:
            return None
        players = [name for name in self.folders if any(name in pair for pair in outcome_of)]
        groups = [row["group"] for row in samples[self.reference].values()]
        lengths = prompt_means(column(samples, length))
        means = prompt_means(scores) if scores else None
        return {"tie": tie} | match(  # type: ignore[return-value]
            players, self.reference, outcome_of, lengths, groups, self.n_resamples, self.seed, means
        )

    def probe_shifts(self) -> list[dict[str, Any]]:
        """How each training changed the next-token probabilities of the probe sentence."""
        return [
            {
                "before": before,
                "after": after,
                "positions": shift(*(self.content(name, "probes.json")["sentence"] for name in (before, after))),
            }
            for before, after in self.changes
        ]

    def forgetting(self) -> list[Forgetting]:
        """How much more each model forgot than each model before it, compared text by text."""
        texts = column(self.rows("retention.jsonl"), "nll")
        choices = column(self.rows("choices.jsonl"), "correct")
        adapters = {name: self.content(name, METRICS)["adapter"] for name in self.folders}

        def difference(values: dict[str, list], a: str, b: str) -> Interval | None:
            if a not in values or b not in values:
                return None
            differences = [float(x) - float(y) for x, y in zip(values[a], values[b], strict=True)]
            return bootstrap(differences, self.n_resamples, self.seed)  # type: ignore[return-value]

        return [
            {
                "first": a,
                "second": b,
                "adapters": [adapters[a], adapters[b]],
                "nll": difference(texts, a, b),
                "choices": difference(choices, a, b),
            }
            for a, b in pairs_of([name for name in self.folders if name in texts])
        ]

    def preference_shifts(self) -> list[PreferenceShift]:
        """How each training changed the log-probs of chosen and rejected responses, compared pair by pair."""
        pairs = self.rows("pairs.jsonl")
        return [self._preference_shift(before, after, pairs) for before, after in self.changes if pairs.get(before)]

    def _preference_shift(self, before: str, after: str, pairs: Rows) -> PreferenceShift:
        rows = [(pairs[before][i], row) for i, row in pairs[after].items()]
        chosen, rejected = ([b[key] - a[key] for a, b in rows] for key in ("chosen_logp", "rejected_logp"))
        margin = list(np.subtract(chosen, rejected))
        groups = [row["group"] for _, row in rows]
        shifts = {
            name: bootstrap_of(mean_of(values), groups, self.n_resamples, self.seed)[0]
            for name, values in (("chosen", chosen), ("rejected", rejected), ("margin", margin))
        }
        return {"before": before, "after": after} | shifts  # type: ignore[return-value]
