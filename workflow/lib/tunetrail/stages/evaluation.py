"""Evaluation of one model (base, sft or a policy) on prompts that no stage has trained on.

    python -m tunetrail.stages.evaluation --config C.json --input model=… --input data=… \
        [--input sft=… --input reward=… --input retention=… --input comparisons=…] …

Samples at the configured temperature and measures the gold score (by the labeler's scorer, never the reward model), the
reward model's score, KL to the SFT model, length and distinct-n; the likelihood of unrelated text and the accuracy on
multiple-choice questions; log-probs of preferred and dispreferred, and of liked and disliked responses; and the probes.
The gold score is also measured with greedy decoding, where a policy gains nothing by only becoming surer of what it
said before. If no SFT model was trained, the base model takes its place. `stages.head_to_head` compares the models.

Every model draws its own random numbers, so that a win rate always compares independent responses. If best-of-n shared
those of the model it is compared with, it would choose among that model's own samples and could not lose to them; if
only the other models shared theirs, its win rate would not mean the same as theirs. Best-of-n has no weights of its
own: forgetting, preferences and probes are measured once, for the model that it samples from.

Intervals are 95%, by bootstrap over the prompts' source groups, or over prompts if there is only one group; standard
errors likewise. `evaluation.schema` has the types of metrics.json; null means not measured.

Writes `samples.jsonl`: one row per prompt; `completions`, `gold`, `reward`, `length` and `finished` are lists with one
entry per sample, or null; `scores` has such a list for each further gold scorer. Except for best-of-n, also writes
`probes.json`, `retention.jsonl` ({"id", "nll"} per text), `choices.jsonl` ({"id", "correct"} per question) and
`pairs.jsonl` ({"id", "group", "chosen_logp", "rejected_logp"} per held-out pair).
"""

import logging
import math
import sys
from typing import Any

from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.evaluator import Evaluator, Samples
from tunetrail.evaluation.frontier import (
    best_of_n,
    frontier,
    kept_checkpoints,
    sample_checkpoints,
    sample_yardstick,
)
from tunetrail.evaluation.knowledge import heldout_feedback, heldout_preferences, probes, retention
from tunetrail.evaluation.stats import distinct_n
from tunetrail.files import write_json, write_jsonl
from tunetrail.models.runtime import prepare
from tunetrail.stages.registry import start

log = logging.getLogger("tunetrail")


def finished(evaluator: Evaluator, samples: Samples) -> list[bool]:
    """Which responses ended with EOS before the limit."""
    return [response[-1] == evaluator.tokenizer.eos_token_id for _, response in samples.examples]


def sample_table(evaluator: Evaluator, rows: list[dict], samples: Samples, greedy: Samples | None) -> list[dict]:
    """The rows of samples.jsonl."""
    sampled: dict[str, list | None] = {
        "completions": samples.texts,
        "gold": samples.gold,
        "reward": samples.reward,
        "length": samples.lengths,
        "finished": finished(evaluator, samples),
    }
    by_prompt: dict[str, list | None] = {
        "kl": samples.kl,
        "greedy": greedy.texts if greedy else None,
        "greedy_gold": greedy.gold if greedy else None,
        "greedy_length": greedy.lengths if greedy else None,
    }
    k = samples.k
    others = {name: [values[i * k : (i + 1) * k] for i in range(len(rows))] for name, values in samples.others.items()}
    return [
        {key: row[key] for key in ("id", "group", "prompt", "messages")}
        | {"reference": row.get("completion")}
        | ({"scores": {name: values[i] for name, values in others.items()}} if others else {})
        | {name: values and values[i * k : (i + 1) * k] for name, values in sampled.items()}
        | {name: values and values[i] for name, values in by_prompt.items()}
        for i, row in enumerate(rows)
    ]


def read_rows(stage: Stage) -> list[dict]:
    """The prompts of the evaluation split. Raises DataError if there is none."""
    rows = [row for row in stage.rows("data", "evaluation.jsonl") if "prompt" in row]
    if not rows:
        raise DataError(
            "evaluation: the evaluation split has no prompts; raise data.shares.evaluation or data.limits.evaluation"
        )
    return rows


def run(stage: Stage) -> dict[str, Any]:
    prepare(stage.seed, "evaluation")
    stage.draft.about = ("model",)
    rows = read_rows(stage)
    evaluator = Evaluator(stage, rows)
    if lacking := evaluator.not_measured:
        log.warning(
            "evaluation: %d of %d prompts have no reference answer, which %s compares with: it is not measured; name "
            "other scorers under evaluation.gold, or give prompts with answers",
            lacking["prompts"], len(rows), ", ".join(lacking["scorers"]),
        )  # fmt: skip
    kept = kept_checkpoints(stage.inputs["model"].folder)
    with evaluator.bar as bar:
        # Greedy responses are compared only by their gold score; best-of-n has no greedy response.
        with_greedy = evaluator.n == 1 and evaluator.gold is not None
        k = evaluator.config.samples * evaluator.n
        samples, greedy = evaluator.sampled(evaluator.model, rows, k, with_greedy)
        yardstick, checkpoints = sample_yardstick(evaluator), sample_checkpoints(evaluator, kept)
        bar.advance(1, "sampled")
        evaluator.reward([samples, *checkpoints.values(), *([yardstick] if yardstick else [])])
        samples = evaluator.best(samples)
        bar.advance(1, "scored")
        evaluator.kl([(samples, None), *((checkpoints[step], folder) for step, folder in kept.items())])
        bar.advance(1, "compared")
        remembered, preferred, rated = None, None, None
        if evaluator.n == 1:
            remembered, preferred = retention(evaluator), heldout_preferences(evaluator)
            rated = heldout_feedback(evaluator)
            write_json(stage.work / "probes.json", probes(evaluator))
        bar.advance(3, "probed")
    write_jsonl(stage.work / "samples.jsonl", sample_table(evaluator, rows, samples, greedy))

    responses = [response for _, response in samples.examples]
    return {
        "policy": evaluator.subject["name"],
        "method": evaluator.subject["method"],
        "start": evaluator.subject.get("start"),
        "adapter": evaluator.made.get("adapter"),
        "n_prompts": len(rows),
        "samples_per_prompt": samples.k,
        "not_measured": evaluator.not_measured,
        "gold": evaluator.over_prompts(samples.means("gold")),
        "greedy_gold": evaluator.over_prompts(greedy.gold) if greedy else None,
        "scores": {
            name: evaluator.over_prompts(samples.prompt_means(values)) for name, values in samples.others.items()
        },
        "reward": evaluator.over_prompts(samples.means("reward")),
        "kl_to_sft": evaluator.divergence(samples),
        "frontier": frontier(evaluator, samples, checkpoints),
        "best_of_n": best_of_n(evaluator, yardstick),
        "length": evaluator.over_prompts(samples.means("lengths")),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "finished": math.fsum(finished(evaluator, samples)) / len(responses),
        "retention": remembered,
        "comparisons": preferred,
        "feedback": rated,
    }


if __name__ == "__main__":
    sys.exit(start("evaluation", run))
