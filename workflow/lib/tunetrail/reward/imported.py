"""Imports reward models that were trained elsewhere, and checks two things: that the pipeline reads their scores as
their trainer did, and that they prefer better responses.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from tunetrail.config.data import SPLITS
from tunetrail.config.imported import ImportedModel
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.models import reward_scores
from tunetrail.evaluation.stats import Groups, sign_flip_p, spearman
from tunetrail.files import write_jsonl
from tunetrail.models.batching import encode, encode_comparison, encode_response
from tunetrail.models.importing import check_fits, publish_imported, read_source
from tunetrail.models.loading import load_reward_model, load_tokenizer
from tunetrail.models.runtime import device
from tunetrail.models.saving import ROWS, TOLERANCE, answers
from tunetrail.models.scoring import reward_pooling
from tunetrail.preferences.rows import ComparisonRow
from tunetrail.reward.calibration import ceiling, evaluate, heldout_pairs, right, units
from tunetrail.scorers.reward_model import score

log = logging.getLogger("tunetrail")

Example = tuple[list[int], list[int]]
"""(prompt ids, response ids)"""
PROMPTS = 200
"""The direction of the scores is checked on at least this many prompts, if there are so many."""
CLEARLY = 0.01
"""p-value below which a model that is mostly wrong is refused."""
ALIKE = 0.9
"""Rank correlation below which scores of the same texts, read in two ways, count as different."""
AS_SCORER = "or use it as a scorer (scorers, `scorer: reward_model`), which reads a model as it was published"


def check_head(name: str, model: Any, eos_id: int) -> None:
    """Raises DataError unless the model reads one score from the state of a response's last token, eos."""
    if model.config.num_labels != 1:
        raise DataError(
            f"reward: {name} has {model.config.num_labels} labels; import one with num_labels 1, {AS_SCORER}"
        )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise DataError(
            f"reward: {name} is a {type(model).__name__}, which has no linear layer `score` on the last token's state; "
            f"import a decoder's, {AS_SCORER}"
        )
    if model.config.pad_token_id == eos_id:
        raise DataError(
            f"reward: {name} pads with eos (pad_token_id in its config.json), so it reads its score before eos and the "
            f"pipeline at eos; train it with another pad token, {AS_SCORER}"
        )


def check_reading(name: str, model: Any, own: Sequence[float], ours: Sequence[float]) -> None:
    """Raises DataError if the pipeline reads other scores than the model's own `forward` gives.

    Args:
        own, ours: [n], scores of the same sequences by `forward` and by the pipeline.
    """
    off = max(abs(a - b) for a, b in zip(own, ours, strict=True))
    # Only this pipeline reads states that are pooled over the response.
    if reward_pooling(model) == "last" and not off <= TOLERANCE * max(1.0, *map(abs, own)):
        raise DataError(
            f"reward: {name}: read from the last token's state, its scores are off by up to {off:.2g}: a "
            f"{type(model).__name__} reads them differently; import another architecture, {AS_SCORER}"
        )


def direction(correct: np.ndarray, groups: Groups) -> dict[str, Any]:
    """How often the better of two responses gets the higher score, and its p-value if the model could not tell.

    Args:
        correct: [n], 1 where it does, one half for equal scores.
        groups: [n]; pairs of the same group depend on one another.
    """
    return {"pairs": len(correct), "accuracy": float(correct.mean()), "p": sign_flip_p(correct, groups)}


def check_direction(name: str, result: dict[str, Any], of: str, refuse: bool) -> None:
    """Warns if a model does not significantly prefer the better response.

    Args:
        result: from `direction`.
        of: what the pairs are, for the message.
        refuse: raise DataError if it clearly prefers the worse response.
    """
    figures = f"the better one scores higher in {result['accuracy']:.0%} of {result['pairs']} {of}, p {result['p']:.2g}"
    if refuse and result["accuracy"] < 0.5 and result["p"] < CLEARLY:
        raise DataError(
            f"reward: {name} prefers the worse response: {figures}; import a model whose higher score is better, or "
            "check whether the ranks of the comparisons are the wrong way round (1 is best)"
        )
    if result["accuracy"] <= 0.5 or result["p"] >= 0.05:
        log.warning("reward: warning: %s may not tell better responses from worse: %s", name, figures)


def whole_conversations(tokenizer: Any, rows: Sequence[dict], texts: Sequence[str]) -> list[list[int]] | None:
    """Token ids of prompts and answers, rendered together by the chat template as other trainers do. None if prompts
    are plain text."""
    if not tokenizer.chat_template or any(row["prompt"] == row["messages"][-1]["content"] for row in rows):
        return None
    return [
        tokenizer.apply_chat_template([*row["messages"], {"role": "assistant", "content": text}], return_dict=False)
        for row, text in zip(rows, texts, strict=True)
    ]


class Imported:
    """An imported reward model in the stage's `model/`, checked in the form in which it will be used."""

    def __init__(self, stage: Stage, name: str, tokenizer: Any):
        self.stage, self.name, self.tokenizer = stage, name, tokenizer
        self.model = load_reward_model(stage.work / "model").to(device()).eval()

    def scores(self, examples: Sequence[Example]) -> np.ndarray:
        """[n], in float32: the check is about the model's scores, not about bf16's rounding."""
        return np.array(reward_scores(self.model, list(examples), self.tokenizer.pad_token_id, "fp32"))

    def template(self, rows: Sequence[dict], texts: Sequence[str]) -> float | None:
        """Rank correlation between the scores of answers as the pipeline encodes them and as the template renders whole
        conversations. Warns if it is low. None if both give the same tokens."""
        examples = [
            (encode(self.tokenizer, row["prompt"]), encode_response(self.tokenizer, text))
            for row, text in zip(rows, texts, strict=True)
        ]
        whole = whole_conversations(self.tokenizer, rows, texts)
        if whole is None or whole == [prompt + response for prompt, response in examples]:
            return None
        correlation = spearman(self.scores(examples), np.array(score(self.model, whole))) or 0.0  # None if constant
        if correlation < ALIKE:
            log.warning(
                "reward: warning: %s may have been trained to score another position: the chat template puts other "
                "tokens around an answer than the pipeline, which ends it with eos; over %d answers the scores of both "
                "have a rank correlation of %.2f",
                self.name,
                len(rows),
                correlation,
            )
        return correlation

    def on_comparisons(self, rows: list[ComparisonRow]) -> dict[str, Any]:
        """Accuracy on held-out comparisons, as for a model trained here, and the direction on more comparisons."""
        heldout = [row for row in rows if row["split"] == "heldout"]
        others = [row for row in rows if row["split"] != "heldout"][: max(0, PROMPTS - len(heldout))]
        checked = cast(list[dict], heldout + others)
        encoded = [encode_comparison(self.tokenizer, row) for row in checked]
        sequences = [(prompt, response) for prompt, responses in encoded for response in responses]
        scores = self.scores(sequences)
        by_prompt = np.split(scores, np.cumsum([len(responses) for _, responses in encoded])[:-1])
        data = [self.stage.rows("data", f"{split}.jsonl", optional=True) for split in SPLITS]
        sources = {row["id"]: row["source"] for of_split in data for row in of_split}
        pairs = heldout_pairs(checked, by_prompt, None, sources)
        if not pairs:
            return {}
        result = direction(right(pairs, "margin"), units(pairs))
        check_direction(self.name, result, "pairs of the run's comparisons", refuse=True)
        lengths = np.array([len(response) for _, response in sequences])
        metrics = {"direction": result, "length_correlation": spearman(scores, lengths)}
        pairs = heldout_pairs(checked[: len(heldout)], by_prompt[: len(heldout)], None, sources)
        if not pairs:
            return metrics
        write_jsonl(self.stage.work / "pairs.jsonl", cast(list[dict], pairs))
        seed = self.stage.seed
        return metrics | evaluate(pairs, seed) | {"ceiling": ceiling(checked[: len(heldout)], seed)}

    def on_demonstrations(self, rows: Sequence[dict]) -> dict[str, Any]:
        """Compares the author's answer to each prompt with that of the next row, written for another prompt."""
        prompts = [encode(self.tokenizer, row["prompt"]) for row in rows]
        written = [encode_response(self.tokenizer, row["completion"]) for row in rows]
        own = self.scores(list(zip(prompts, written, strict=True)))
        others = self.scores(list(zip(prompts, written[1:] + written[:1], strict=True)))
        result = direction(np.where(own == others, 0.5, own > others), [row["group"] for row in rows])
        of = "pairs of an author's answer and one written for another prompt"
        check_direction(self.name, result, of, refuse=False)
        return {"direction": result}


def import_reward_model(stage: Stage, source: ImportedModel) -> dict[str, Any]:
    """Imports a reward model; returns the stage's metrics. Raises DataError if it cannot be used here."""
    parent: Path = stage.inputs["policy"].folder / "model"
    tokenizer, name = load_tokenizer(parent), source.name
    model = read_source(stage, source, AutoModelForSequenceClassification).eval()
    check_head(name, model, tokenizer.eos_token_id)
    check_fits(stage, source, model, parent, tokenizer)
    compared = stage.rows("comparisons", "comparisons.jsonl") if "comparisons" in stage.inputs else []
    prompts = [row for split in SPLITS for row in stage.rows("data", f"{split}.jsonl", True) if "prompt" in row]
    written = [row for row in prompts if "completion" in row]
    answered = [(row, row["completions"][0]) for row in compared] or [(row, row["completion"]) for row in written]
    answered = (answered or [(row, "") for row in prompts])[:PROMPTS]
    examples = [(encode(tokenizer, row["prompt"]), encode_response(tokenizer, text)) for row, text in answered[:ROWS]]
    sequences = [prompt + response for prompt, response in examples]
    own = [float(answer) for answer in answers(model, sequences)]
    metrics = publish_imported(stage, model, parent, tokenizer, sequences, AutoModelForSequenceClassification)
    del model
    imported = Imported(stage, name, tokenizer)
    check_reading(name, imported.model, own, imported.scores(examples).tolist())
    metrics["template_correlation"] = imported.template(*zip(*answered, strict=True))
    if compared:
        return metrics | imported.on_comparisons(cast(list[ComparisonRow], compared))
    if len(written) > 1:
        return metrics | imported.on_demonstrations(written[:PROMPTS])
    log.warning("reward: warning: %s was not tested, since there are neither comparisons nor demonstrations", name)
    return metrics
