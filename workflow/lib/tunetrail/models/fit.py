"""Decides whether a training fits its device, and turns on gradient checkpointing if it does not."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tunetrail.config.ppo import PpoConfig
from tunetrail.config.training import Epochs, Training
from tunetrail.contract.distributed import is_main_process, processes
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError
from tunetrail.models.frozen import narrow_below_adapter
from tunetrail.models.memory import USABLE, Moments, Run, device_bytes, needed, ppo_plan, training_plan
from tunetrail.models.runtime import use_bf16
from tunetrail.models.training import rows_at_once

log = logging.getLogger("tunetrail")

NEGLIGIBLE = 0.02
"""Share of the device's memory below which a training is not planned: planning would take longer than it is worth."""


class Plan(Protocol):
    """What `models.memory` knows of a training."""

    @property
    def run(self) -> Run: ...

    @property
    def length(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def moments(self, checkpointing: bool) -> Moments: ...


def this_run(precision: str) -> Run:
    """Where this process runs."""
    return Run(use_bf16(precision), torch.cuda.is_available(), processes())


def fit_training(
    stage: Stage,
    config: Epochs,
    model: Any,
    length: int,
    labelled: int = 0,
    sequences: int = 1,
    is_classifier: bool = False,
) -> None:
    """Saves all the memory that costs no time for a model that a Hugging Face trainer will train, then calls `fit`.

    Args:
        length: tokens of the longest row.
        labelled: tokens of its longest labelled part; 0 if there are no labels.
        sequences: how many sequences a row has.
    """
    run = this_run(stage.shared["precision"])
    rows_at_once(stage.name, config, run.processes)  # raises ConfigError if the processes cannot have equal shares
    narrow_below_adapter(model, run.bf16, config.four_bit)
    plan = training_plan(config, model.config, run, length, labelled, sequences, is_classifier)
    fit(stage, config, [model], plan)


def fit(stage: Stage, config: Training, models: Sequence[Any], plan: Plan) -> None:
    """Turns on gradient checkpointing if the config asks for it or, with `auto`, if it is needed.

    The plan goes into the record of this attempt, which will also hold the true peak. A training that is far smaller
    than the device is not planned.

    Args:
        models: the models to train, with their adapters.
    """
    available, supported = device_bytes(), all(model.supports_gradient_checkpointing for model in models)
    asked = config.gradient_checkpointing
    if asked is True and not supported:
        raise ConfigError(
            f"{stage.name}.gradient_checkpointing: transformers cannot checkpoint {type(models[0]).__name__}; set it "
            "to false"
        )
    checkpointing = asked is True
    need = _needs(plan) if sum(_upper_bound(model, plan) for model in models) > NEGLIGIBLE * available else None
    if need:
        if asked == "auto":
            checkpointing = supported and need[False] > USABLE * available
        if is_main_process():
            planned = {"bytes": int(need[checkpointing]), "gradient_checkpointing": checkpointing}
            stage.attempt.note("planned", planned)
            said = f"{need[checkpointing] / 1e9:.1f} of {available / 1e9:.1f} GB planned"
            log.info("%s: %s%s", stage.name, said, ", with gradient checkpointing" if checkpointing else "")
            if need[checkpointing] > available:
                log.warning("%s: more than there is; tunetrail plan --memory says what to change", stage.name)
    for model in models if checkpointing else ():
        model.activation_checkpointing_enable()


def _needs(plan: Plan) -> dict[bool, float] | None:
    """Bytes without and with checkpointing; None if the architecture cannot be analysed."""
    try:
        return {on: needed(plan.run, plan.moments(on)) for on in (False, True)}
    except (
        Exception
    ) as error:  # third-party model code on tensors without data: a failure here is no reason not to train
        log.info("memory: not planned, since %s: %s", type(error).__name__, error)
        return None


def _upper_bound(model: Any, plan: Plan) -> float:
    """Bytes that no training exceeds: a layer keeps fewer than 400 per token and unit of the residual stream."""
    text = model.config.get_text_config()
    activations = 400 * plan.rows * plan.length * text.num_hidden_layers * text.hidden_size
    return 4 * 16 * sum(p.numel() for p in model.parameters()) + activations


def checkpoint_layers(model: torch.nn.Module, on: bool) -> None:
    """Turns checkpointing of a model in evaluation mode on or off; transformers checkpoints only in training mode.

    Only the layers themselves enter that mode, not the modules in them, so that no dropout becomes active.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = on and module.gradient_checkpointing


def fit_ppo(stage: Stage, config: PpoConfig, trained: Sequence[Any], model_config: Any, longest_prompt: int) -> None:
    """`fit` for the models of a PPO stage.

    Args:
        longest_prompt: tokens.
    """
    run, length = this_run(stage.shared["precision"]), longest_prompt + config.max_new_tokens
    fit(stage, config, trained, ppo_plan(config, model_config, run, length))
