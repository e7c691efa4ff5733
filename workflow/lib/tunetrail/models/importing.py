"""Models that were made elsewhere: loads them and checks that they fit into a run.

A run has one tokenizer and one chat template, those of its base model. An imported model must tokenize alike. It keeps
its weights and gets the base model's tokenizer files, since other tools write the same tokenizer with other bytes.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunetrail.config.data import SPLITS
from tunetrail.config.imported import ImportedModel
from tunetrail.contract.scorers import check_unchanged
from tunetrail.contract.stage import Stage
from tunetrail.data.ancestry import check_unseen
from tunetrail.data.contamination import MEASURED
from tunetrail.errors import DataError
from tunetrail.models.lengths import positions
from tunetrail.models.loading import copy_tokenizer, why_not_loaded, without_dropout
from tunetrail.models.saving import answers, check_reloads, save_weights
from tunetrail.provenance.models import hub_model, local_model

KINDS = {
    AutoModelForCausalLM: "a causal language model",
    AutoModelForSequenceClassification: "a sequence-classification model",
}
SAMPLE = 50
"""How many rows of each split both tokenizers are compared on."""


def load_pretrained(
    key: str, name: str | Path, revision: str | None = None, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """Loads a model that the user names, in float32.

    Args:
        key: the config key that messages begin with.

    Raises DataError if it cannot be loaded, is an adapter, or lacks weights.
    """
    try:
        model, loading = auto_class.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError) as e:
        raise DataError(f"{key}: cannot load {name} as {KINDS[auto_class]}: {why_not_loaded(e)}") from None
    if hasattr(model, "peft_config"):  # its weights are elsewhere, perhaps in yet another adapter's model
        raise DataError(f"{key}: {name} is an adapter; merge it into its model first (PEFT's merge_and_unload)")
    if missing := sorted(loading["missing_keys"]):  # transformers initialises them at random
        raise DataError(f"{key}: {name} holds no trained {missing[0]}; give {KINDS[auto_class]}")
    return model


def load_own_tokenizer(key: str, name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model. Raises DataError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise DataError(f"{key}: {name} has no tokenizer that can be loaded: {why_not_loaded(e)}") from None


def set_pad_and_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the tokenizer's pad and eos ids into the model's config and generation config."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id


def sample_texts(stage: Stage) -> list[str]:
    """Prompts, answers and raw texts from the first rows of each split of the run's data."""
    rows = (row for split in SPLITS for row in islice(stage.rows("data", f"{split}.jsonl", optional=True), SAMPLE))
    return [row[key] for row in rows for key in ("prompt", "completion", "text") if key in row]


def check_tokenizer(
    key: str,
    name: str,
    theirs: PreTrainedTokenizerBase,
    ours: PreTrainedTokenizerBase,
    texts: Iterable[str],
) -> None:
    """Raises DataError if an imported model tokenizes text differently from the base model.

    Args:
        theirs: the imported model's tokenizer.
        ours: the base model's.
        texts: texts that both must split alike.
    """
    fix = "set base to the model that it was trained from, or import one that was trained from this base"
    if theirs.get_vocab() != ours.get_vocab():
        raise DataError(
            f"{key}: the vocabulary of {name} ({len(theirs)} tokens) differs from that of the base model "
            f"({len(ours)} tokens); {fix}"
        )
    if theirs.eos_token_id != ours.eos_token_id:
        raise DataError(
            f"{key}: the eos token of {name} is {theirs.eos_token!r}, that of the base model {ours.eos_token!r}; {fix}"
        )
    texts = list(texts)
    different = [text for text in texts if _ids(theirs, text) != _ids(ours, text)]
    if different:
        raise DataError(
            f"{key}: {name} splits {len(different)} of {len(texts)} texts of the data into other tokens than the base "
            f"model, first {different[0][:40]!r}; {fix}"
        )
    if theirs.chat_template != ours.chat_template:
        has = "another chat template than the base model" if theirs.chat_template else "no chat template, the base has"
        raise DataError(
            f"{key}: {name} has {has}; give base.chat_template the one that it was trained with, or put the base's "
            "into its tokenizer if it was trained with that"
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_fits(stage: Stage, source: ImportedModel, model: PreTrainedModel, parent: Path, ours: Any) -> None:
    """Raises DataError if an imported model's tokenizer, vocabulary or positions do not fit the run, or if another run
    trained it on what this one measures on.

    Args:
        parent: the `model/` folder whose tokenizer it gets.
        ours: that tokenizer.
    """
    if "model" in stage.inputs:
        measured = [row for split in MEASURED for row in stage.rows("data", f"{split}.jsonl", optional=True)]
        check_unseen(f"{stage.name}.path", stage.inputs["model"].folder, measured)
    theirs = load_own_tokenizer(stage.name, source.path or source.repo or "", source.revision)
    check_tokenizer(stage.name, source.name, theirs, ours, sample_texts(stage))
    if (rows := model.get_input_embeddings().num_embeddings) < len(ours):
        raise DataError(
            f"{stage.name}: {source.name} has {rows} embeddings for {len(ours)} tokens; import the model that belongs "
            "to its tokenizer"
        )
    limit = positions(model.config)
    base_limit = positions(AutoConfig.from_pretrained(parent, trust_remote_code=False))
    if limit is not None and (base_limit is None or limit < base_limit):
        raise DataError(
            f"{stage.name}: {source.name} reads {limit} tokens, the base model {base_limit or 'any number'}; import "
            "one that reads as many"
        )


def read_source(stage: Stage, source: ImportedModel, auto_class: Any) -> PreTrainedModel:
    """Loads the model that a stage imports and puts its origin into the record. Raises DataError if it has changed
    since the run was planned."""
    if source.path is not None:
        check_unchanged(f"{stage.name}.path", source.path, stage.shared.get("sha256"))
    model = load_pretrained(stage.name, source.path or source.repo or "", source.revision, auto_class)
    if source.path is None:
        dependency = hub_model(stage.name, source.repo or "", source.revision or "", source.licence)
        stage.draft.dependencies.append(dependency)
    elif "model" not in stage.inputs:  # an artifact of another run is an input with a record of its own
        stage.draft.dependencies.append(local_model(stage.name, source.path, source.licence))
    return model


def publish_imported(
    stage: Stage,
    model: PreTrainedModel,
    parent: Path,
    ours: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    auto_class: Any = AutoModelForCausalLM,
) -> dict[str, Any]:
    """Writes and checks `model/`; returns what metrics.json says about every imported model.

    Args:
        parent: the `model/` folder whose tokenizer it gets.
        rows: token ids on which the written model must give the same answers.
    """
    expected = answers(model.eval(), list(rows))
    set_pad_and_eos(model, ours)
    save_weights(without_dropout(model), stage.work / "model")
    copy_tokenizer(parent, stage.work / "model")
    check_reloads(stage, ours, list(rows), expected, auto_class)
    return {
        "source": {key: stage.config[key] for key in ("path", "repo", "revision", "licence")},
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
