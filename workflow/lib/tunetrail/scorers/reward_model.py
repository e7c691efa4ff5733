"""A sequence-classification model as a scorer.

The model is used as published: with its own `forward`, in float32 (bf16 would tie scores that differ in the fourth
digit), and with its own tokenizer and chat template over the whole conversation. If it has no template, or the run uses
none, it reads prompt and completion as the policy does. With one label the score is its logit; with two, the second
logit less the first.

A reward model trained by this pipeline (its config has `reward_pooling` or `reward_bias`) is read as in the pipeline,
which differs from `forward`: prompt and completion are encoded separately, states are pooled as in training, and its
bias is subtracted.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForSequenceClassification

from tunetrail.config.imported import ImportedModel
from tunetrail.data.chat import render
from tunetrail.errors import DataError
from tunetrail.evaluation.models import reward_scores
from tunetrail.models import batching
from tunetrail.models.importing import load_own_tokenizer, load_pretrained
from tunetrail.models.lengths import positions
from tunetrail.models.loading import with_full_precision_head
from tunetrail.models.runtime import device, quiet_libraries
from tunetrail.scorers.build import Completion

BATCH_TOKENS = 8192


def load(key: str, source: ImportedModel) -> tuple[Any, Any]:
    """(model, tokenizer). Raises DataError that names the key unless the model is a classifier with 1 or 2 labels."""
    quiet_libraries()
    name = source.path or source.repo or ""
    model = load_pretrained(key, name, source.revision, AutoModelForSequenceClassification)
    if model.config.num_labels not in (1, 2):
        raise DataError(f"{key}: {name} has {model.config.num_labels} labels; a reward model has 1 or 2")
    if is_ours(model):
        model = with_full_precision_head(model)
    return model.to(device()).eval(), load_own_tokenizer(key, name, source.revision)


def is_ours(model: Any) -> bool:
    """Whether this pipeline trained it."""
    return hasattr(model.config, "reward_pooling") or hasattr(model.config, "reward_bias")


def conversation(tokenizer: Any, completion: Completion) -> list[dict] | None:
    """The messages before the completion; None if it is read as plain text."""
    messages = completion.row.get("messages")
    is_plain = not messages or completion.prompt == messages[-1]["content"]
    return None if is_plain or not tokenizer.chat_template else messages


def encode_parts(tokenizer: Any, completion: Completion) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids), as this pipeline encodes them."""
    messages = conversation(tokenizer, completion)
    prompt = completion.prompt if messages is None else render(tokenizer, messages)
    return batching.encode(tokenizer, prompt), batching.encode_response(tokenizer, completion.text, completion.finished)


def encode(tokenizer: Any, completion: Completion) -> list[int]:
    """Token ids of the conversation, rendered with the tokenizer's own template. For plain text: prompt, completion
    and, if it is finished, EOS; the tokenizer adds its special tokens unless the prompt already begins with BOS."""
    if (messages := conversation(tokenizer, completion)) is not None:
        answered = [*messages, {"role": "assistant", "content": completion.text}]
        return tokenizer.apply_chat_template(
            answered, return_dict=False, continue_final_message=not completion.finished
        )
    text = completion.prompt + completion.text + ((tokenizer.eos_token or "") if completion.finished else "")
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]


@torch.inference_mode()
def score(model: Any, sequences: list[list[int]]) -> list[float]:
    """The score that the model's own `forward` gives each token list."""
    pad_id = getattr(model.config, "pad_token_id", None)
    scores = [0.0] * len(sequences)
    # Without a padding token one by one: a limit of 0 tokens makes batches of one sequence.
    for rows in batching.token_batches(sequences, [[]] * len(sequences), 0 if pad_id is None else BATCH_TOKENS):
        width = max(len(sequences[i]) for i in rows)
        padding = [width - len(sequences[i]) for i in rows]
        ids = torch.tensor([sequences[i] + [pad_id] * p for i, p in zip(rows, padding, strict=True)])
        mask = torch.tensor([[1] * (width - p) + [0] * p for p in padding])
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
        values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        for i, value in zip(rows, values.tolist(), strict=True):
            scores[i] = value
    return scores


class ModelScorer:
    """Scores completions with a model, which is loaded on first use."""

    def __init__(self, name: str, source: ImportedModel):
        self.key, self.source = f"scorers.{name}", source

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load(self.key, self.source)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """[N]: the scores. Raises DataError if the model cannot score, or a completion is too long or scored NaN."""
        model, tokenizer = self.loaded
        if is_ours(model):
            parts = [self._encoded(encode_parts, completion) for completion in completions]
            self._check_lengths(completions, [len(prompt) + len(response) for prompt, response in parts])
            scores = reward_scores(model, parts, tokenizer.pad_token_id, "fp32", BATCH_TOKENS)
        else:
            sequences = [self._encoded(encode, completion) for completion in completions]
            self._check_lengths(completions, list(map(len, sequences)))
            scores = score(model, sequences)
        for completion, value in zip(completions, scores, strict=True):
            if not math.isfinite(value):
                raise DataError(
                    f"{self.key}: {self.source.name} scores a completion of row {completion.row.get('id')} {value}; "
                    "the model is broken"
                )
        return scores

    def _encoded(self, encode: Callable[[Any, Completion], Any], completion: Completion) -> Any:
        try:
            return encode(self.loaded[1], completion)
        except (TemplateError, ValueError) as e:  # ValueError: the template changes the text of an unfinished answer
            raise DataError(
                f"{self.key}: the chat template of {self.source.name} refuses the conversation of row "
                f"{completion.row.get('id')} ({e}); change the row or data.system, or take another model"
            ) from None

    def _check_lengths(self, completions: Sequence[Completion], lengths: Sequence[int]) -> None:
        model, tokenizer = self.loaded
        limit = min(tokenizer.model_max_length, positions(model.config) or math.inf)
        over = [
            (completion.row.get("id"), length)
            for completion, length in zip(completions, lengths, strict=True)
            if length > limit
        ]
        if over:
            raise DataError(
                f"{self.key}: {len(over)} of {len(lengths)} completions have more tokens with their prompts than "
                f"{self.source.name} reads ({limit}), first that of row {over[0][0]} ({over[0][1]}); lower "
                "data.max_prompt_tokens or the max_new_tokens of what is scored"
            )
