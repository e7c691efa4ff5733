"""What a model still knows, what it prefers, and what it would say next: on given texts, nothing is sampled."""

import math
from typing import Any

import numpy as np

from tunetrail.data.chat import render, with_system
from tunetrail.evaluation.evaluator import REFERENCE_FREE, TRAINED, Evaluator, Example
from tunetrail.evaluation.models import logprobs_of, mean_nlls, right_choices, sentence_probe
from tunetrail.evaluation.schema import HeldOutFeedback, HeldOutPreferences, Retention
from tunetrail.evaluation.stats import auc_of, bootstrap_of
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


def liking(evaluator: Evaluator, examples: list[Example]) -> tuple[np.ndarray, np.ndarray, str]:
    """([n] log-probs of responses, [n] by what the model is asked which it likes, the name of that measure).

    A trained policy by its implicit reward: what its training moves. That is log p(response) less that of the reference
    (longer responses have lower log-probs whatever was learnt), or with ORPO and SimPO the log-prob per token. Where
    nothing was trained, the raw log-probs are all there is.
    """

    def logps_of(model: Any) -> np.ndarray:
        return np.array([float(row.sum()) for row in evaluator.logprobs(model, examples)])

    logps = logps_of(evaluator.model)
    if evaluator.subject["method"] in REFERENCE_FREE:
        return logps, logps / np.array([max(1, len(response)) for _, response in examples]), "log-prob per token"
    if "sft" in evaluator.stage.inputs and evaluator.subject["method"] in TRAINED:
        return logps, logps - logps_of(evaluator.reference()), "implicit reward"
    return logps, logps, "log-prob"


def heldout_preferences(evaluator: Evaluator) -> HeldOutPreferences | None:
    """Log-probs of chosen and rejected responses of every decided pair, and how often the model tells which is which
    (see `liking`); writes `pairs.jsonl`."""
    stage = evaluator.stage
    if "comparisons" not in stage.inputs:
        return None
    examples: list[Example] = []
    pairs: list[tuple[str, str, int, int]] = []
    for row in stage.rows("comparisons", "comparisons.jsonl"):
        decided = decided_pairs(preference_targets(row["rankings"]))
        if row["split"] != "heldout" or not decided:
            continue
        prompt, responses = encode_comparison(evaluator.tokenizer, row)
        pairs += [(f"{row['id']}/{w}-{v}", row["group"], len(examples) + w, len(examples) + v) for w, v in decided]
        examples += [(prompt, response) for response in responses]

    logps, gained, measure = liking(evaluator, examples)
    table = [
        {"id": name, "group": group, "chosen_logp": float(logps[w]), "rejected_logp": float(logps[v])}
        for name, group, w, v in pairs
    ]
    write_jsonl(stage.work / "pairs.jsonl", table)
    groups = [group for _, group, *_ in pairs] if len({group for _, group, *_ in pairs}) > 1 else None
    told = [0.5 + 0.5 * float(np.sign(gained[w] - gained[v])) for *_, w, v in pairs]
    return {
        "chosen_logps": evaluator.interval([row["chosen_logp"] for row in table], groups),
        "rejected_logps": evaluator.interval([row["rejected_logp"] for row in table], groups),
        "accuracy": evaluator.interval(told, groups),
        "measure": measure,
    }


def heldout_feedback(evaluator: Evaluator) -> HeldOutFeedback | None:
    """Log-probs of liked and disliked responses, and how well the model tells one sort from the other (see `liking`).

    A response is what most of its ratings say; where they are divided evenly it is left out.
    """
    rows, liked = [], []
    for row in evaluator.stage.rows("data", "feedback.jsonl", optional=True):
        votes = sum(1 if rating["label"] else -1 for rating in row["ratings"])
        if row["split"] == "heldout" and votes:
            rows.append(row)
            liked.append(votes > 0)
    if not rows:
        return None
    encoded = [
        (encode(evaluator.tokenizer, row["prompt"]), encode_response(evaluator.tokenizer, row["completion"]))
        for row in rows
    ]
    logps, gained, measure = liking(evaluator, encoded)

    def interval(wanted: bool) -> Any:
        own = [i for i, is_liked in enumerate(liked) if is_liked == wanted]
        groups = [rows[i]["group"] for i in own]
        return evaluator.interval([float(logps[i]) for i in own], groups if len(set(groups)) > 1 else None)

    told: Any = None
    if 0 < sum(liked) < len(liked):
        [told] = bootstrap_of(
            auc_of(gained, liked),
            [row["group"] for row in rows],
            evaluator.config.bootstrap,
            evaluator.stage.seed,
        )
    return {
        "liked_logps": interval(True),
        "disliked_logps": interval(False),
        "accuracy": told,
        "measure": measure,
    }


def holds(row: dict, sentence: str) -> bool:
    """Whether a row of the sft split has the sentence in what is learnt from it."""
    return sentence in (row["text"] if "text" in row else row["completion"])


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
    trained_on = sum(holds(row, evaluator.config.sentence) for row in evaluator.stage.rows("data", "sft.jsonl"))
    return {"sentence": sentence, "sentence_in_sft_rows": trained_on, "preferences": preferences}
