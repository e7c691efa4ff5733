"""Simulated labelers that rank by the score of any sequence-classification model.

The model is used as it was published: by its own `forward`, in float32 (bf16 would tie scores that differ in the fourth
digit), with the tokenizer from its own folder and the padding token of its config. With one label the score is its
logit, minus `reward_bias` of the model's config if it has one; with two labels, the second logit minus the first. A
reward model of this pipeline with `pooling: mean` is read as the pipeline reads it, which `forward` does not do.
"""

import math
from pathlib import Path
from typing import Any

from tunetrail.config.comparisons import RewardModelLabeler
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.labeling.labels import Labels, ranked_by_scores
from tunetrail.preferences.rows import SampledRow
from tunetrail.provenance.manifest import list_files, sha256_json

BATCH_TOKENS = 8192


def load(source: str | Path, revision: str | None) -> tuple[Any, Any]:
    """(model, tokenizer). Raises ConfigError unless it is a sequence classifier with one or two labels."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tunetrail.models.runtime import quiet_libraries

    quiet_libraries()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, revision=revision or "main", dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ConfigError(
            f"comparisons: {source}: cannot be loaded as a sequence-classification model: {reason}"
        ) from None
    if missing := sorted(info["missing_keys"]):
        # transformers fills in missing weights at random, so a language model would "score" as well.
        raise ConfigError(
            f"comparisons: {source}: holds no trained {missing[0]}; give a reward model, not a language model"
        )
    if model.config.num_labels not in (1, 2):
        raise ConfigError(f"comparisons: {source}: has {model.config.num_labels} labels; a reward model has 1 or 2")
    return model.eval(), tokenizer


def encode(tokenizer: Any, prompt: str, completion: str, finished: bool) -> list[int]:
    """Token ids of rendered prompt, completion and, if finished, EOS.

    The tokenizer adds its special tokens, unless the rendered prompt begins with BOS already.
    """
    text = prompt + completion + ((tokenizer.eos_token or "") if finished else "")
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]


def score(model: Any, sequences: list[list[int]]) -> list[float]:
    """The model's score of each token list."""
    import torch

    from tunetrail.models.batching import token_batches

    pad_id = getattr(model.config, "pad_token_id", None)
    bias = getattr(model.config, "reward_bias", 0.0)
    scores = [0.0] * len(sequences)
    with torch.inference_mode(), ProgressBar("comparisons", len(sequences), "completions") as bar:
        # Without a padding token, one by one: no batch of two fits into no tokens.
        for rows in token_batches(sequences, [[]] * len(sequences), 0 if pad_id is None else BATCH_TOKENS):
            width = max(len(sequences[i]) for i in rows)
            padding = [width - len(sequences[i]) for i in rows]
            ids = torch.tensor([sequences[i] + [pad_id] * p for i, p in zip(rows, padding, strict=True)])
            mask = torch.tensor([[1] * (width - p) + [0] * p for p in padding])
            logits = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
            values = logits[:, 0] - bias if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            for i, value in zip(rows, values.tolist(), strict=True):
                scores[i] = value
            bar.advance(len(rows))
    return scores


def pooled_scores(model: Any, tokenizer: Any, rows: list[SampledRow]) -> list[float]:
    """The score of each completion by a model of this pipeline that pools over the response's tokens."""
    from tunetrail.evaluation.models import reward_scores
    from tunetrail.models import batching
    from tunetrail.models.loading import with_full_precision_head

    # Encoded from text: the ids of a row are of another model's tokenizer.
    examples = [
        (batching.encode(tokenizer, row["prompt"]), batching.encode_response(tokenizer, completion, finished))
        for row in rows
        for completion, finished in zip(row["completions"], row["finished"], strict=True)
    ]
    return reward_scores(with_full_precision_head(model), examples, tokenizer.pad_token_id, "fp32", BATCH_TOKENS)


def rank(rows: list[SampledRow], config: RewardModelLabeler, stage: Stage) -> Labels:
    """Raises ConfigError for a model that cannot score, DataError for a completion too long for it or scored NaN."""
    from tunetrail.models.runtime import device
    from tunetrail.models.scoring import reward_pooling

    source = config.path or str(config.repo)
    model, tokenizer = load(source, config.revision)
    model.to(device())
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or math.inf)

    sequences, owners = [], []
    for row in rows:
        for k, (completion, finished) in enumerate(zip(row["completions"], row["finished"], strict=True)):
            sequences.append(encode(tokenizer, row["prompt"], completion, finished))
            owners.append(f"completions: row {row['id']}: completion {k}")
            if len(sequences[-1]) > limit:
                raise DataError(
                    f"{owners[-1]} is {len(sequences[-1])} tokens long with its prompt, but {source} reads {limit}; "
                    "lower data.max_prompt_tokens or completions.max_new_tokens"
                )
    pooled = reward_pooling(model) != "last"
    scores = pooled_scores(model, tokenizer, rows) if pooled else score(model, sequences)
    for owner, value in zip(owners, scores, strict=True):
        if not math.isfinite(value):
            raise DataError(f"{owner}: {source} scores it {value}; the model is broken")

    origin = (
        {"path": str(config.path), "digest": sha256_json(list_files(config.path))}
        if config.path
        else {"repo": config.repo, "revision": config.revision}
    )
    return Labels(ranked_by_scores(rows, scores, config, stage.seed), source=origin)
