"""Where all evaluations meet: every model against every other, prompt by prompt.

    python -m tunetrail.stages.head_to_head --config C.json --input evaluation.sft=… --input evaluation.dpo=… \
        --output … --state …

Nothing is sampled here, and no model is run unless `head_to_head.judge` names one that is local. An interval I is

    {"mean", "low", "high", "n", "group_low", "group_high", "groups"}

with 95% bounds by bootstrap over n prompts, and by bootstrap over the source groups that the prompts come from
(`groups` of them; null for a single group). Of `forgetting` it has no group bounds. metrics.json:

    subjects       [name], base, sft, then the policies by name; `first` of a pair stands later in this list than `second`
    reference      "sft", or "base" where none was trained
    sampled, greedy, judge
                   a match by gold score of sampled responses, by gold score of greedy ones, and by a language model's
                   verdicts on sampled ones, asked in both orders; a pair is left out where a verdict on it could not
                   be read, so that it has an n of its own. null where it was not held, else
        prompts, groups, tie
        pairs      [{"first", "second",
                     "family": what `p` is corrected within: "base" and "sft" (everyone against that one) or "policies",
                     "win_rate": I with "wins", "ties", "losses": first over second, a tie counts one half,
                     "length_controlled": I, the win rate at equal lengths (Dubois et al. 2024); null where one side is
                                          longer on over 95% of the prompts, so that equal lengths are not in the data,
                     "p": two-sided, by flipping the outcomes of whole groups, "p_holm": corrected within the family,
                     "significant": p_holm < 0.05,
                     "minimum_detectable": the difference from one half that n prompts show with 80% power at 5%
                                           divided by the size of the family; null where they cannot show any}]
        scores     [{"name", "score": I}] Bradley-Terry, in log-odds against the reference, which has 0
    judge_verdicts {"verdicts", "unparsed", "inconsistent": pairs whose two orders disagree, "first_wins": share of
                   the readable verdicts for the response shown first}; null without a judge
    forgetting     [{"first", "second", "adapters": [of first, of second: "full", "lora" or null],
                     "nll": I of the difference first - second in nats a token on unrelated text,
                     "choices": I of the difference in accuracy of the multiple-choice task; null where not measured}]
    preferences    [{"before", "after", "chosen", "rejected", "margin": I of the change of the log-prob on the
                     held-out pairs}], from base to the reference and from there to each policy

Writes `probes.json`: {"pairs": [{"before", "after", "positions": [{"position", "token", "before", "after":
probability of the token that is there, "tokens": [{"id", "token", "before", "after"}] the likeliest of both, null where
not among a model's 50 likeliest}]}]}; and `judgements.jsonl` with a judge.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunetrail.config.comparisons import LlmJudge
from tunetrail.config.evaluation import HeadToHeadConfig
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.matches import Outcomes, match, pairs_of
from tunetrail.evaluation.probes import shift
from tunetrail.evaluation.stats import bootstrap, bootstrap_of, mean_of, outcomes
from tunetrail.files import write_json, write_jsonl
from tunetrail.labeling.llm import judge_rows, pair_outcome
from tunetrail.provenance.manifest import METRICS
from tunetrail.provenance.record import dependency
from tunetrail.stages.registry import start

Rows = dict[str, dict[str, dict]]
"""Subject -> row id -> row."""


def read(stage: Stage, subjects: list[str], name: str) -> Rows:
    """A file of every evaluation, without those that have none."""
    roles = {subject: f"evaluation.{subject}" for subject in subjects}
    return {
        subject: {row["id"]: row for row in stage.rows(role, name)}
        for subject, role in roles.items()
        if (stage.inputs[role].folder / name).exists()
    }


def column(rows: Rows, name: str) -> dict[str, list]:
    """Subject -> values by row, of those who were measured."""
    columns = {subject: [row[name] for row in by_id.values()] for subject, by_id in rows.items()}
    return {subject: values for subject, values in columns.items() if None not in values}


def gold_outcomes(scores: dict[str, list[float]], tie: float) -> Outcomes:
    return {(a, b): outcomes(scores[a], scores[b], tie) for a, b in pairs_of(list(scores))}


def verdict_outcomes(subjects: Sequence[str], answers: list[dict]) -> Outcomes:
    """Of answers [n] with "verdicts" [[i, j, verdict on (i, j), verdict on (j, i)]] of every i < j.

    NaN where a verdict could not be read; a pair of which none could is left out.
    """
    place = {name: i for i, name in enumerate(subjects)}
    found = [
        {(i, j): np.nan if None in both else (1 - pair_outcome(*both)) / 2 for i, j, *both in answer["verdicts"]}
        for answer in answers
    ]
    columns = {(a, b): np.array([row[place[b], place[a]] for row in found]) for a, b in pairs_of(subjects)}
    return {pair: outcome for pair, outcome in columns.items() if not np.isnan(outcome).all()}


def judged(stage: Stage, judge: LlmJudge, samples: Rows, reference: str) -> tuple[Outcomes, dict]:
    """A language model's verdicts on all pairs, and how it came to them; writes `judgements.jsonl`."""
    rows = [
        {
            "id": i,
            "messages": row["messages"],
            "completions": [samples[subject][i]["completion"] for subject in samples],
        }
        for i, row in samples[reference].items()
    ]
    answers, source = judge_rows(rows, judge, stage, "head_to_head.judge")
    digest = source.pop("digest", None)
    who = source | ({} if digest else {"reason": "an endpoint does not show what answers"})
    stage.draft.dependencies.append(dependency("judge", source.get("model") or source["path"], digest, **who))
    ordered, names = [answers[row["id"]] for row in rows], list(samples)
    write_jsonl(
        stage.work / "judgements.jsonl",
        [
            {"id": answer["id"], "verdicts": [[names[i], names[j], *both] for i, j, *both in answer["verdicts"]]}
            for answer in ordered
        ],
    )
    both_orders = [(forward, backward) for answer in ordered for *_, forward, backward in answer["verdicts"]]
    verdicts = [verdict for both in both_orders for verdict in both]
    decided = [verdict for verdict in verdicts if verdict in ("A", "B")]
    return verdict_outcomes(names, ordered), {
        "verdicts": len(verdicts),
        "unparsed": verdicts.count(None),
        "inconsistent": sum(both in (("A", "A"), ("B", "B")) for both in both_orders),
        "first_wins": decided.count("A") / len(decided) if decided else None,
    }


def run(stage: Stage) -> dict:
    config = HeadToHeadConfig(**stage.config)
    tie, n_resamples = config.tie, stage.shared["evaluation.bootstrap"]
    evaluated = [role.partition(".")[2] for role in stage.inputs if role.startswith("evaluation.")]
    subjects = sorted(evaluated, key=lambda name: (name != "base", name != "sft", name))
    reference = "sft" if "sft" in subjects else "base"
    samples = read(stage, subjects, "samples.jsonl")
    for subject, rows in samples.items():
        if list(rows) != list(samples[reference]):
            raise DataError(
                f"head_to_head: {subject} was evaluated on other prompts than {reference}; evaluate both on the same data"
            )
    groups = [row["group"] for row in samples[reference].values()]

    def held(found: Outcomes, length: str, tie: float) -> dict | None:
        if not found:
            return None
        players = [name for name in subjects if any(name in pair for pair in found)]
        return {"tie": tie} | match(players, reference, found, column(samples, length), groups, n_resamples, stage.seed)

    verdicts, how = judged(stage, config.judge, samples, reference) if config.judge else ({}, None)
    before = [("base", reference)] if reference != "base" else []
    changes = before + [(reference, name) for name in subjects if name not in ("base", "sft")]
    write_json(
        stage.work / "probes.json",
        {"pairs": [{"before": a, "after": b, "positions": shift(*(content(stage, name, "probes.json")["sentence"] for name in (a, b)))} for a, b in changes]},
    )  # fmt: skip
    return {
        "subjects": subjects,
        "reference": reference,
        "sampled": held(gold_outcomes(column(samples, "gold"), tie), "length", tie),
        "greedy": held(gold_outcomes(column(samples, "greedy_gold"), tie), "greedy_length", tie),
        "judge": held(verdicts, "length", 0.0),
        "judge_verdicts": how,
        "forgetting": forgetting(stage, subjects, n_resamples),
        "preferences": preferences(stage, changes, n_resamples),
    }


def content(stage: Stage, subject: str, name: str) -> Any:
    """A JSON file of one evaluation."""
    return json.loads((stage.inputs[f"evaluation.{subject}"].folder / name).read_text(encoding="utf-8"))


def forgetting(stage: Stage, subjects: list[str], n_resamples: int) -> list[dict]:
    """How much more each model forgot than each that stands before it, text by text."""
    texts, choices = (
        column(read(stage, subjects, "retention.jsonl"), "nll"),
        column(read(stage, subjects, "choices.jsonl"), "correct"),
    )
    adapters = {name: content(stage, name, METRICS)["adapter"] for name in subjects}

    def difference(values: dict[str, list], a: str, b: str) -> dict | None:
        if a not in values or b not in values:
            return None
        return bootstrap(
            [float(x) - float(y) for x, y in zip(values[a], values[b], strict=True)], n_resamples, stage.seed
        )

    return [
        {"first": a, "second": b, "adapters": [adapters[a], adapters[b]], "nll": difference(texts, a, b), "choices": difference(choices, a, b)}
        for a, b in pairs_of([name for name in subjects if name in texts])
    ]  # fmt: skip


def preferences(stage: Stage, changes: list[tuple[str, str]], n_resamples: int) -> list[dict]:
    """How the log-probs of chosen and rejected responses changed, pair by pair."""
    pairs = read(stage, list({name for change in changes for name in change}), "pairs.jsonl")
    found = []
    for before, after in changes:
        if not pairs.get(before):
            continue
        rows = [(pairs[before][i], row) for i, row in pairs[after].items()]
        chosen, rejected = ([b[key] - a[key] for a, b in rows] for key in ("chosen_logp", "rejected_logp"))
        margin = [c - r for c, r in zip(chosen, rejected, strict=True)]
        groups = [row["group"] for _, row in rows]
        shifts = {
            name: bootstrap_of(mean_of(values), groups, n_resamples, stage.seed)[0]
            for name, values in (("chosen", chosen), ("rejected", rejected), ("margin", margin))
        }
        found.append({"before": before, "after": after} | shifts)
    return found


if __name__ == "__main__":
    sys.exit(start("head_to_head", run))
