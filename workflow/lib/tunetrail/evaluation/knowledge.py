"""What a model still knows, what it prefers, and what it would say next: on given texts, nothing is sampled."""

import math
from typing import Any

from tunetrail.data.chat import render, with_system
from tunetrail.evaluation.evaluator import Evaluator
from tunetrail.evaluation.models import logprobs_of, mean_nlls, right_choices, sentence_probe
from tunetrail.evaluation.schema import HeldOutPreferences, Retention
from tunetrail.files import write_jsonl
from tunetrail.models.batching import encode, encode_comparison, encode_response
from tunetrail.preferences.pairs import decided_pairs, preference_targets


def retention(evaluator: Evaluator) -> Retention | None:
    """Loss on unrelated text and a multiple-choice task; writes `retention.jsonl` and `choices.jsonl`."""
    stage, config = evaluator.stage, evaluator.config
    if "retention" not in stage.inputs:
        return None
    rows, questions = (stage.rows("retention", name) for name in ("retention.jsonl", "choices.jsonl"))
    texts = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    model, pad_id, precision = evaluator.model, evaluator.pad_id, evaluator.precision
    nlls = mean_nlls(model, texts, pad_id, precision, config.batch_tokens)
    correct = right_choices(model, questions, pad_id, precision, config.batch_tokens)
    for name, key, values, of in (("retention", "nll", nlls, rows), ("choices", "correct", correct, questions)):
        table = [{"id": row["id"], key: value} for row, value in zip(of, values, strict=True)]
        write_jsonl(stage.work / f"{name}.jsonl", table)
    nll: Any = evaluator.interval(nlls)
    accuracy: Any = evaluator.interval([float(c) for c in correct])
    return {
        "nll": nll,
        "perplexity": nll and nll | {end: math.exp(nll[end]) for end in ("mean", "low", "high")},
        "choices": {
            "accuracy": accuracy,
            "chance": sum(1 / len(row["choices"]) for row in questions) / len(questions),
        }
        if questions
        else None,
    }


def heldout_preferences(evaluator: Evaluator) -> HeldOutPreferences | None:
    """Log-probs of chosen and rejected responses, and how often chosen is the likelier; writes `pairs.jsonl`."""
    stage = evaluator.stage
    if "comparisons" not in stage.inputs:
        return None
    chosen, rejected, rows = [], [], []
    for row in stage.rows("comparisons", "comparisons.jsonl"):
        pairs = decided_pairs(preference_targets(row["rankings"]))
        if row["split"] != "heldout" or not pairs:
            continue
        prompt, responses = encode_comparison(evaluator.tokenizer, row)
        winner, loser = ((prompt, responses[i]) for i in pairs[0])
        chosen.append(winner)
        rejected.append(loser)
        rows.append(row)
    logps = [float(row.sum()) for row in evaluator.logprobs(evaluator.model, chosen + rejected)]
    chosen_logps, rejected_logps = logps[: len(rows)], logps[len(rows) :]
    table = [
        {"id": row["id"], "group": row["group"], "chosen_logp": c, "rejected_logp": r}
        for row, c, r in zip(rows, chosen_logps, rejected_logps, strict=True)
    ]
    write_jsonl(stage.work / "pairs.jsonl", table)
    groups = [row["group"] for row in rows] if len({row["group"] for row in rows}) > 1 else None
    likelier = [float(c > r) for c, r in zip(chosen_logps, rejected_logps, strict=True)]
    return {
        "chosen_logps": evaluator.interval(chosen_logps, groups),
        "rejected_logps": evaluator.interval(rejected_logps, groups),
        "accuracy": evaluator.interval(likelier, groups),
    }


def probes(evaluator: Evaluator) -> dict[str, Any]:
    """Next-token probabilities of the sentence, and log-probs of the two responses of each preference probe."""
    tokenizer, shared = evaluator.tokenizer, evaluator.stage.shared
    as_chat = shared["data.chat"] and tokenizer.chat_template
    preferences = []
    for probe in evaluator.config.preferences:
        messages = with_system([{"role": "user", "content": probe.prompt}], shared["data.system"])
        prompt = encode(tokenizer, render(tokenizer, messages) if as_chat else probe.prompt)
        examples = [(prompt, encode_response(tokenizer, text)) for text in (probe.preferred, probe.dispreferred)]
        logps = logprobs_of(evaluator.model, examples, evaluator.pad_id, "fp32")
        preferred, dispreferred = (float(row.sum()) for row in logps)
        preferences.append(probe.model_dump() | {"preferred_logp": preferred, "dispreferred_logp": dispreferred})
    sentence = sentence_probe(evaluator.model, tokenizer, evaluator.config.sentence)
    return {"sentence": sentence, "preferences": preferences}
