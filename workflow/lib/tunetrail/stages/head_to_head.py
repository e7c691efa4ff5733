"""Head-to-head: compares every model with every other, prompt by prompt.

    python -m tunetrail.stages.head_to_head --config C.json --input evaluation.sft=… --input evaluation.dpo=… \
        --output … --state …

Nothing is sampled here, and no model runs unless `head_to_head.judge` names a local one. metrics.json:

    subjects       [name]: base, sft, then the policies by name
    reference      "sft", or "base" if no SFT model was trained
    sampled, greedy, judge
                   a match by the gold score of sampled responses (all pairs of two models' samples of a prompt), by
                   that of greedy responses, and by a language model's verdicts on the first sample of each, asked in
                   both orders. Pairs with an unreadable verdict are left out of the judge's match, so it has its own
                   n. null if not held
    others         a match of the sampled responses by each further scorer of `evaluation.gold`, without ties
    judge_verdicts null without a judge
    forgetting, preferences

The types are `Match`, `JudgeVerdicts`, `Forgetting` and `PreferenceShift` in `evaluation.schema`. Intervals are 95%, by
bootstrap over the prompts' source groups, which are also the units of the tests; those of `forgetting` are over texts.

Writes `probes.json`: {"pairs": [{"before", "after", "positions": [{"position", "token", "before", "after": probability
of the actual token, "tokens": [{"id", "token", "before", "after"}] the likeliest of both models, null if not among a
model's 50 likeliest}]}]}; and `judgements.jsonl` if there is a judge.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunetrail.config.comparisons import LlmJudge
from tunetrail.config.evaluation import HeadToHeadConfig
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.comparison import Evaluations, Rows, column, gold_outcomes, other_scores
from tunetrail.evaluation.matches import Outcomes, pairs_of
from tunetrail.evaluation.schema import JudgeVerdicts
from tunetrail.files import write_json, write_jsonl
from tunetrail.labeling.llm import judge_rows, pair_outcome
from tunetrail.provenance.record import dependency
from tunetrail.stages.registry import start


def verdict_outcomes(subjects: Sequence[str], answers: list[dict]) -> Outcomes:
    """Outcomes of answers [n] with "verdicts" [[i, j, verdict on (i, j), verdict on (j, i)]] for every i < j.

    NaN where a verdict could not be read; pairs without any readable verdict are left out.
    """
    place = {name: i for i, name in enumerate(subjects)}
    by_pair = [
        {(i, j): np.nan if None in both else (1 - pair_outcome(*both)) / 2 for i, j, *both in answer["verdicts"]}
        for answer in answers
    ]
    columns = {(a, b): np.array([row[place[b], place[a]] for row in by_pair]) for a, b in pairs_of(subjects)}
    return {pair: outcome for pair, outcome in columns.items() if not np.isnan(outcome).all()}


def judge_all(stage: Stage, judge: LlmJudge, samples: Rows, reference: str) -> tuple[Outcomes, JudgeVerdicts]:
    """A language model's verdicts on all pairs, and statistics of how it judged; writes `judgements.jsonl`."""
    rows = [
        {
            "id": i,
            "messages": row["messages"],
            "completions": [samples[subject][i]["completions"][0] for subject in samples],
        }
        for i, row in samples[reference].items()
    ]
    answers, source = judge_rows(rows, judge, stage, "head_to_head.judge")
    digest = source.pop("digest", None)
    who = source | ({} if digest else {"reason": "an endpoint does not reveal which model answers"})
    stage.draft.dependencies.append(dependency("judge", source.get("model") or source["path"], digest, **who))
    ordered, names = [answers[row["id"]] for row in rows], list(samples)
    judgements = [
        {"id": answer["id"], "verdicts": [[names[i], names[j], *both] for i, j, *both in answer["verdicts"]]}
        for answer in ordered
    ]
    write_jsonl(stage.work / "judgements.jsonl", judgements)
    both_orders = [(forward, backward) for answer in ordered for *_, forward, backward in answer["verdicts"]]
    verdicts = [verdict for both in both_orders for verdict in both]
    decided = [verdict for verdict in verdicts if verdict in ("A", "B")]
    return verdict_outcomes(names, ordered), {
        "verdicts": len(verdicts),
        "unparsed": verdicts.count(None),
        "inconsistent": sum(both in (("A", "A"), ("B", "B")) for both in both_orders),
        "first_wins": decided.count("A") / len(decided) if decided else None,
    }


def read_samples(evaluations: Evaluations) -> Rows:
    """samples.jsonl of every evaluation. Raises DataError if their prompts differ."""
    samples, reference = evaluations.rows("samples.jsonl"), evaluations.reference
    for subject, rows in samples.items():
        if list(rows) != list(samples[reference]):
            raise DataError(
                f"head_to_head: {subject} and {reference} were evaluated on different prompts; "
                "evaluate both on the same data"
            )
    return samples


def run(stage: Stage) -> dict[str, Any]:
    config = HeadToHeadConfig(**stage.config)
    folders = {role.partition(".")[2]: parent.folder for role, parent in stage.inputs.items()}
    evaluations = Evaluations.of(folders, stage.shared["evaluation.bootstrap"], stage.seed)
    samples, reference = read_samples(evaluations), evaluations.reference
    golds, greedy_golds = (column(samples, name) for name in ("gold", "greedy_gold"))
    sampled, greedy = (gold_outcomes(scores, config.tie) for scores in (golds, greedy_golds))
    judged, verdicts = judge_all(stage, config.judge, samples, reference) if config.judge else ({}, None)
    write_json(stage.work / "probes.json", {"pairs": evaluations.probe_shifts()})
    others = {
        name: evaluations.match(gold_outcomes(scores, 0.0), samples, "length", 0.0, scores)
        for name, scores in other_scores(samples).items()
    }
    return {
        "subjects": evaluations.subjects,
        "reference": reference,
        "sampled": evaluations.match(sampled, samples, "length", config.tie, golds),
        "greedy": evaluations.match(greedy, samples, "greedy_length", config.tie, greedy_golds),
        "others": others,
        "judge": evaluations.match(judged, samples, "length", 0.0),
        "judge_verdicts": verdicts,
        "forgetting": evaluations.forgetting(),
        "preferences": evaluations.preference_shifts(),
    }


if __name__ == "__main__":
    sys.exit(start("head_to_head", run))
