"""Models that were made elsewhere: what loads them, and whether they fit into a run.

A run has one tokenizer and one chat template, from its base model. An imported model keeps its weights and gets the
very files of that tokenizer, if its own does the same: tokenizer files that other tools write differ in their bytes.
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
"""Rows of each split whose texts both tokenizers must split alike."""


def load_pretrained(
    key: str, name: str | Path, revision: str | None = None, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model of the user's, in float32.

    Args:
        key: of the config, which messages begin with.

    Raises DataError for what cannot be loaded, for an adapter, and where weights are missing.
    """
    try:
        model, found = auto_class.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError) as e:
        raise DataError(f"{key}: cannot load {name} as {KINDS[auto_class]}: {why_not_loaded(e)}") from None
    if hasattr(model, "peft_config"):  # its weights are elsewhere, perhaps below yet another adapter
        raise DataError(f"{key}: {name} is an adapter; merge it into its model first (PEFT's merge_and_unload)")
    if missing := sorted(found["missing_keys"]):  # transformers fills them in at random
        raise DataError(f"{key}: {name} holds no trained {missing[0]}; give {KINDS[auto_class]}")
    return model


def load_own_tokenizer(key: str, name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Raises DataError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise DataError(f"{key}: {name} has no tokenizer that can be loaded: {why_not_loaded(e)}") from None


def set_pad_and_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes them into the model's config and generation config."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id


def own_texts(stage: Stage) -> list[str]:
    """Prompts, answers and raw text of the run's own data, some of each split."""
    rows = (row for split in SPLITS for row in islice(stage.rows("data", f"{split}.jsonl", optional=True), SAMPLE))
    return [row[key] for row in rows for key in ("prompt", "completion", "text") if key in row]


def check_tokenizer(
    key: str,
    name: str,
    theirs: PreTrainedTokenizerBase,
    ours: PreTrainedTokenizerBase,
    texts: Iterable[str],
) -> None:
    """Raises DataError where an imported model reads text in another way than the base model.

    Args:
        texts: that both must split alike.
    """
    fix = "set base to the model that it was trained from, or import one that was trained from this base"
    if theirs.get_vocab() != ours.get_vocab():
        raise DataError(
            f"{key}: {name} has another vocabulary ({len(theirs)} tokens) than the base model ({len(ours)}); {fix}"
        )
    if theirs.eos_token_id != ours.eos_token_id:
        raise DataError(
            f"{key}: the eos token of {name} is {theirs.eos_token!r}, that of the base model {ours.eos_token!r}; {fix}"
        )
    texts = list(texts)
    apart = [text for text in texts if _ids(theirs, text) != _ids(ours, text)]
    if apart:
        raise DataError(
            f"{key}: {name} splits {len(apart)} of {len(texts)} texts of the data into other tokens than the base "
            f"model, first {apart[0][:40]!r}; {fix}"
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
    """Raises DataError where tokenizer, vocabulary or positions of an imported model do not fit the run's.

    Args:
        parent: the `model/` whose tokenizer it gets.
        ours: that tokenizer.
    """
    theirs = load_own_tokenizer(stage.name, source.path or source.repo or "", source.revision)
    check_tokenizer(stage.name, source.name, theirs, ours, own_texts(stage))
    if (rows := model.get_input_embeddings().num_embeddings) < len(ours):
        raise DataError(
            f"{stage.name}: {source.name} has {rows} embeddings for {len(ours)} tokens; import the model that belongs "
            "to its tokenizer"
        )
    reads, most = positions(model.config), positions(AutoConfig.from_pretrained(parent, trust_remote_code=False))
    if reads is not None and (most is None or reads < most):
        raise DataError(
            f"{stage.name}: {source.name} reads {reads} tokens, the base model {most or 'any number'}; import one that "
            "reads as many"
        )


def read_source(stage: Stage, source: ImportedModel, auto_class: Any) -> PreTrainedModel:
    """The model that a stage imports, as it was planned, with its origin in the record."""
    if source.path is not None:
        check_unchanged(f"{stage.name}.path", source.path, stage.shared.get("sha256"))
    model = load_pretrained(stage.name, source.path or source.repo or "", source.revision, auto_class)
    if source.path is None:
        found = hub_model(stage.name, source.repo or "", source.revision or "", source.licence)
        stage.draft.dependencies.append(found)
    elif "model" not in stage.inputs:  # an artifact of another run is an input, and its record says the rest
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
    """Writes and checks `model/`; returns what metrics.json says of any import.

    Args:
        parent: the `model/` whose tokenizer it gets.
        rows: token ids on which it must answer as it was published.
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
