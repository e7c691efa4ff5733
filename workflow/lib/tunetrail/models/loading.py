"""Loading and saving the models of a run: plain weights or a LoRA adapter, always with their tokenizer.

A `model/` folder holds either full weights or a LoRA adapter with `parent.json`, which names the
model the adapter sits on and its manifest's digest. `load_causal_lm` follows that chain and checks it.
"""

import hashlib
import json
import os
import shutil
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
from tunetrail.files import write_json
from tunetrail.models.cpu.attention import plain_attention
from tunetrail.models.head import look_at_head
from tunetrail.models.scoring import FullPrecisionHead
from tunetrail.models.tree import share_prefixes
from tunetrail.provenance.manifest import MANIFEST, sha256_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises DataError where pad and eos are one token: then the end of a response could not be learnt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: the tokenizer lacks a pad or an eos token; name one in base.pad_token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError(f"{folder}: pad and eos are both {tokenizer.eos_token!r}; name another token in base.pad_token")
    return tokenizer


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer's files and its chat template."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """The very same bytes, so that the digest stays."""
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


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def load_causal_lm(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `folder` as plain weights; a LoRA adapter is merged into the model it sits on.

    Raises DataError when that model is no longer the one the adapter was trained on.
    """
    if not is_adapter(folder):
        model = plain_attention(without_dropout(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)))
        return share_prefixes(look_at_head(model))
    from peft import PeftModel

    parent = json.loads((folder / "parent.json").read_text())
    parent_folder = Path(parent["model"])
    manifest = parent_folder.parent / MANIFEST
    if not manifest.exists() or sha256_json(json.loads(manifest.read_text())) != parent["manifest"]:
        raise DataError(
            f"{folder}: its adapter sits on {parent_folder}, which is gone or has changed since; run the stages between again"
        )
    merged = PeftModel.from_pretrained(load_causal_lm(parent_folder, dtype), folder).merge_and_unload()
    return without_dropout(merged)


def load_reward_model(folder: str | Path, **hub: Any) -> PreTrainedModel:
    """A sequence-classification model with one score. See `models.scoring` for how it is read."""
    return with_full_precision_head(
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **hub)
    )


def with_full_precision_head(classifier: PreTrainedModel) -> PreTrainedModel:
    """The classifier without dropout, its score computed in float32 whatever the precision of the trunk."""
    classifier.score.__class__ = FullPrecisionHead  # same weights, same name in the saved file
    return share_prefixes(plain_attention(without_dropout(classifier)))


def with_lora(model: PreTrainedModel, lora: Lora | None, seed: int, extra_modules: list[str] | None = None) -> Any:
    """The model with a fresh LoRA adapter (Hu et al. 2021), or as it is. Raises ConfigError for unknown modules."""
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    task = "SEQ_CLS" if extra_modules else "CAUSAL_LM"
    try:
        return get_peft_model(
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


def training_flops(counts: dict[str, int], tokens: int) -> float:
    """Floating-point operations of the products with weights in training on so many tokens, attention left out.

    2 a parameter and token forwards, 2 backwards to the inputs, 2 to the weights that are trained (Kaplan et al. 2020).
    """
    return float(tokens * (4 * counts["parameters"] + 2 * counts["parameters_trained"]))


def trained_parameters(model: torch.nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def save_causal_lm(
    model: Any,
    tokenizer_from: Path,
    work: Path,
    lora: Lora | None,
    parent: Path,
    parent_manifest: dict,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes `work/model` (weights, or adapter with parent.json) and, on request, `work/merged`.

    Args:
        parent: the `model/` folder that was trained on; an adapter refers to it, relative to the
            folder the pipeline runs in, so that `from_pretrained` finds it from there.
        state: the weights, where the model itself holds only a share of them.
    """
    folder = work / "model"
    parent = Path(os.path.relpath(parent))
    if lora is not None:
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(parent)
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card
    copy_tokenizer(tokenizer_from, folder)
    if lora is not None:
        adapter = json.loads((folder / "adapter_config.json").read_text())
        # peft keeps them in a set, whose order changes from process to process.
        modules = adapter["target_modules"]
        adapter["target_modules"] = sorted(modules) if isinstance(modules, list) else modules
        write_json(folder / "adapter_config.json", adapter)
        write_json(folder / "parent.json", {"model": str(parent), "manifest": sha256_json(parent_manifest)})
        if lora.export_merged:
            load_causal_lm(folder).save_pretrained(work / "merged")
            copy_tokenizer(tokenizer_from, work / "merged")
