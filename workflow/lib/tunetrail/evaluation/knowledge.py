"""What a model still knows, what it prefers, and which tokens it predicts, measured on given texts without sampling."""

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
    """Loss on unrelated text and accuracy on multiple-choice questions; writes `retention.jsonl` and
    `choices.jsonl`."""
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
    """([n] log-probs of responses, [n] how much the model likes each, the name of that measure).

    For a trained policy the measure is its implicit reward, which is what its training moves: log p(response) less that
    of the reference, whereas raw log-probs always favour short responses, or with ORPO and SimPO the log-prob per
    token. For other models the measure is the raw log-prob, for lack of a reference.
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
    """Log-probs of chosen and rejected responses of every decided pair, and how often the model likes the chosen one
    more (see `liking`); writes `pairs.jsonl`."""
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

    logps, likings, measure = liking(evaluator, examples)
    table = [
        {"id": name, "group": group, "chosen_logp": float(logps[w]), "rejected_logp": float(logps[v])}
        for name, group, w, v in pairs
    ]
    write_jsonl(stage.work / "pairs.jsonl", table)
    groups = [group for _, group, *_ in pairs] if len({group for _, group, *_ in pairs}) > 1 else None
    correct = [0.5 + 0.5 * float(np.sign(likings[w] - likings[v])) for *_, w, v in pairs]
    return {
        "chosen_logps": evaluator.interval([row["chosen_logp"] for row in table], groups),
        "rejected_logps": evaluator.interval([row["rejected_logp"] for row in table], groups),
        "accuracy": evaluator.interval(correct, groups),
        "measure": measure,
    }


def heldout_feedback(evaluator: Evaluator) -> HeldOutFeedback | None:
    """Log-probs of liked and disliked responses, and how well the model tells them apart (see `liking`).

    The majority of a response's ratings decides; responses with evenly divided ratings are left out.
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
    logps, likings, measure = liking(evaluator, encoded)

    def interval(wanted: bool) -> Any:
        own = [i for i, is_liked in enumerate(liked) if is_liked == wanted]
        groups = [rows[i]["group"] for i in own]
        return evaluator.interval([float(logps[i]) for i in own], groups if len(set(groups)) > 1 else None)

    accuracy: Any = None
    if 0 < sum(liked) < len(liked):
        [accuracy] = bootstrap_of(
            auc_of(likings, liked),
            [row["group"] for row in rows],
            evaluator.config.bootstrap,
            evaluator.stage.seed,
        )
    return {
        "liked_logps": interval(True),
        "disliked_logps": interval(False),
        "accuracy": accuracy,
        "measure": measure,
    }


def holds(row: dict, sentence: str) -> bool:
    """Whether the text that a row of the sft split teaches contains the sentence."""
    return sentence in (row["text"] if "text" in row else row["completion"])


def probes(evaluator: Evaluator) -> dict[str, Any]:
    """Next-token probabilities of the sentence, and log-probs of both responses of each preference probe."""
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
