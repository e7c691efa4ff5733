"""Writes model folders that load anywhere, and loads each once before it is published.

`model/` holds full weights, config, generation config and tokenizer. Plain `from_pretrained` needs nothing else, on any
machine and from any working directory. A stage that trains with LoRA merges its adapter into these weights, so that
every stage downstream loads the same kind of folder. It also writes the adapter alone into `adapter/`, for servers that
put several adapters on one model. An adapter fits only the `model/` that its stage started from. PEFT would name that
model by its path on this machine, so no name is written: the stage's record has its digest.

`check_reloads` compares what was written with what was trained. Without it, a folder could load without a warning and
answer like a different model.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tunetrail.contract.stage import Stage
from tunetrail.errors import TunetrailError
from tunetrail.files import write_json
from tunetrail.models.loading import copy_tokenizer, load_tokenizer, with_adapter

TOLERANCE = 1e-3
"""In nats per token, or units of a score: what merging an adapter or another device may change in float32."""
ROWS, TOKENS = 4, 64
"""How many rows are compared, and how many tokens of each."""
SENTENCE = "A model that loads without a warning may yet be another one: what it makes of this sentence tells."
"""Compared if there are no rows."""


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json for transformers 4 and 5, without traces of this machine or of training.

    transformers 5 writes the rotary embedding as `rope_parameters`. Version 4 silently ignores that key and uses its
    defaults; it reads `rope_theta`, `partial_rotary_factor` and `rope_scaling`. The result has both forms. Parameters
    per type of layer stay as they are, since no form works in all of version 4.
    """
    portable = {key: value for key, value in config.items() if not key.endswith("name_or_path")}
    if "use_cache" in portable:
        portable["use_cache"] = True  # trainers switch it off
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        portable |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            portable["rope_scaling"] = rope
    return portable


def portable_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json for transformers 4 and 5.

    Version 4 knows neither the class `TokenizersBackend` nor `extra_special_tokens` as a list.
    """
    portable = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    return portable


def save_weights(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes weights, config and generation config.

    Args:
        state: the weights, if the model itself holds only a shard of them.
    """
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            write_json(path, portable_config(json.loads(path.read_text())))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, positions: int | None) -> None:
    """Writes the tokenizer, including how many tokens its model can read.

    Args:
        positions: the model's limit; None if it has none.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, portable_tokenizer_config(json.loads(path.read_text())))


def save_adapter(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes only the adapter of a model, without any path in it."""
    options = {} if state is None else {"state_dict": state}
    # The trained adapter only: TRL's DPO adds another as the reference.
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False, **options)
    (folder / "README.md").unlink()  # PEFT's empty card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    if isinstance(config["target_modules"], list):  # PEFT keeps a set, whose order differs between processes
        config["target_modules"].sort()
    write_json(path, config)


def save_kept(model: Any, parent: Path, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a model kept along the way: `folder/model`, or only the far smaller `folder/adapter` if it has one."""
    if hasattr(model, "peft_config"):
        save_adapter(model, folder / "adapter", state)
    else:
        save_weights(model, folder / "model", state)
        copy_tokenizer(parent, folder / "model")


def save_trained(
    stage: Stage,
    model: Any,
    parent: Path,
    rows: Iterable[list[int]],
    state: dict[str, torch.Tensor] | None = None,
    auto_class: Any = AutoModelForCausalLM,
) -> Any:
    """Writes and checks `model/`, and writes `adapter/` if there is one; returns the model with its adapter merged.

    Args:
        parent: the `model/` folder that the stage started from; the tokenizer is copied from it.
        rows: token ids to compare on.
        state: the weights, gathered by the caller, if the model itself holds only a shard of them.
        auto_class: the transformers class that loads the folder.
    """
    rows = [ids[:TOKENS] for ids in itertools.islice(rows, ROWS)]
    expected = answers(model, rows)
    if hasattr(model, "peft_config"):
        adapter = stage.work / "adapter"
        save_adapter(model, adapter, state)
        # A sharded model cannot be merged in place.
        model, state = model.merge_and_unload() if state is None else with_adapter(parent, adapter), None
    save_weights(model, stage.work / "model", state)
    copy_tokenizer(parent, stage.work / "model")
    check_reloads(stage, load_tokenizer(parent), rows, expected, auto_class)
    return model


@torch.no_grad()
def answers(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """What a plain forward pass gives for each row of T tokens, in float32 on the CPU.

    [T] for a causal model: at each position the log-prob of the next token, at the last one that of the first token.
    [1] for a sequence classifier: its score less its bias.
    """
    device = next(model.parameters()).device
    bias = getattr(model.config, "reward_bias", 0.0)
    results = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        if logits.dim() == 1:
            results.append(logits.cpu() - bias)
        else:
            results.append(logits.log_softmax(-1).gather(1, ids[0].roll(-1)[:, None])[:, 0].cpu())
    return results


def check_reloads(
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    expected: list[torch.Tensor],
    auto_class: Any = AutoModelForCausalLM,
) -> None:
    """Loads `model/` as any user would, and compares. Raises TunetrailError if it answers like a different model.

    Args:
        tokenizer: the one that the model was trained with.
        expected: what `answers` gives for `rows` with the model in memory.
    """
    if wrong := differences(stage.work / "model", tokenizer, rows, expected, auto_class):
        raise TunetrailError(
            f"{stage.name}: the written model folder does not load as the model in memory: {wrong}. Nothing was "
            f"published. transformers {transformers.__version__} does not read back what it wrote for this model: try "
            "another version, or report this"
        )


def differences(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    expected: list[torch.Tensor],
    auto_class: Any = AutoModelForCausalLM,
) -> str:
    """How the model in a folder differs from the one in memory (see `check_reloads`); empty if it does not."""
    model = auto_class.from_pretrained(folder, trust_remote_code=False).eval()
    reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pairs = zip(answers(model, rows), expected, strict=True)
    off = torch.cat([(a - b).abs() for a, b in pairs]).max().item()
    text = tokenizer.decode(rows[0])
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    configs = {"config.json": model.config, "generation_config.json": getattr(model, "generation_config", None)}
    wrong = [
        f"{name} has other pad and eos tokens than its tokenizer"
        for name, config in configs.items()
        if config is not None and (config.pad_token_id, config.eos_token_id) != special
    ]
    if (reloaded.pad_token_id, reloaded.eos_token_id) != special or reloaded.chat_template != tokenizer.chat_template:
        wrong.append("its tokenizer has other special tokens or another chat template")
    if reloaded.encode(text) != tokenizer.encode(text) or reloaded.decode(rows[0]) != text:
        wrong.append("its tokenizer splits text differently")
    if not off <= TOLERANCE:
        wrong.append(f"its log-probs or scores are off by up to {off:.2g} (tolerance {TOLERANCE:g})")
    return "; ".join(wrong)
