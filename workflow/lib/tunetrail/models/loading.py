"""Loads the models and tokenizers of a run and prepares them for training. `models.saving` writes them."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunetrail.config.training import Lora
from tunetrail.errors import ConfigError, DataError
from tunetrail.models.cpu.attention import plain_attention
from tunetrail.models.head import mark_plain_head
from tunetrail.models.scoring import FullPrecisionHead
from tunetrail.models.tree import share_prefixes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def why_not_loaded(error: Exception) -> str:
    """Why transformers loaded nothing, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run here; choose one whose architecture transformers has"
    return str(error).strip().splitlines()[0]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises DataError if pad and eos are the same token: no model could learn to stop."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: the tokenizer lacks a pad or an eos token; name one in base.pad_token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError(f"{folder}: pad and eos are both {tokenizer.eos_token!r}; name another token in base.pad_token")
    return tokenizer


def tokenizer_digest(folder: Path) -> str:
    """sha256 of the tokenizer's files and chat template."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files byte for byte, so that its digest stays the same."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turns dropout off: log-probs of policy, reference, reward and value must be functions of the text alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in vars(model.config).items():
        if "dropout" in name and isinstance(value, float):
            setattr(model.config, name, 0.0)
    return model


def load_causal_lm(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in a `model/` folder, without dropout and prepared to run fast."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return share_prefixes(mark_plain_head(plain_attention(without_dropout(model))))


def with_adapter(parent: Path, adapter: Path) -> PreTrainedModel:
    """The model in the folder `parent` with the LoRA adapter in the folder `adapter` merged into it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_causal_lm(parent), adapter).merge_and_unload()


def load_reward_model(folder: str | Path, **hub: Any) -> PreTrainedModel:
    """A sequence-classification model with one score. `models.scoring` says where its score is read."""
    return with_full_precision_head(
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **hub)
    )


def with_full_precision_head(classifier: PreTrainedModel) -> PreTrainedModel:
    """The classifier without dropout; its score is computed in float32 whatever the precision of the trunk."""
    classifier.score.__class__ = FullPrecisionHead  # same weights, same name in the saved file
    return share_prefixes(plain_attention(without_dropout(classifier)))


def with_lora(model: PreTrainedModel, lora: Lora | None, seed: int, extra_modules: list[str] | None = None) -> Any:
    """The model with a fresh LoRA adapter (Hu et al. 2021), or unchanged if `lora` is None.

    Raises ConfigError for unknown modules, and for modules whose adapter could not be merged.
    """
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    task = "SEQ_CLS" if extra_modules else "CAUSAL_LM"
    tied = model.get_input_embeddings(), model.get_output_embeddings()
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                target_modules=lora.target_modules,
                modules_to_save=extra_modules,
                task_type=task,
            ),
        )
    except ValueError as e:
        raise ConfigError(f"lora.target_modules: {lora.target_modules}: {e}") from None
    now = model.get_input_embeddings(), model.get_output_embeddings()
    if tied[1] is not None and tied[0].weight is tied[1].weight and now != tied:
        raise ConfigError(
            f"lora.target_modules: {lora.target_modules}: this model's input and output embeddings are one matrix, so "
            "an adapter on either could not be merged; name other layers"
        )
    return adapted


def training_flops(counts: dict[str, Any], tokens: int) -> float:
    """Floating-point operations to train on this many tokens: products with weights only, without attention.

    Per token and parameter 2 in the forward pass, 2 for the gradient of the inputs, and 2 for that of each trained
    weight (Kaplan et al. 2020).
    """
    return float(tokens * (4 * counts["parameters"] + 2 * counts["parameters_trained"]))


def trained_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of the weights that are trained."""
    return ((name, weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad)


def trained_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """For metrics.json: how the model is trained (`lora` or `full`), and how many parameters it has and trains."""
    return {
        "adapter": "lora" if hasattr(model, "peft_config") else "full",
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
