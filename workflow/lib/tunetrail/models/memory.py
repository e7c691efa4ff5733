"""How many bytes a stage needs on each device: the parts in use at a few moments, of which the largest counts.

Weights, gradients and optimizer state are counted as in Rajbhandari et al. 2020, section 3, activations by
`models.sizes`. Unused memory that an allocator holds and the buffers of communication libraries are left out.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunetrail.config.ppo import PpoConfig
from tunetrail.config.training import Epochs, Lora
from tunetrail.models.head import SCORED_AT_ONCE
from tunetrail.models.sizes import Saved, Sizes, saved, sizes

Parts = Mapping[str, float]
"""Bytes of each of `PARTS` at one moment."""
Moments = Mapping[str, Parts]
"""Moment -> its parts; a stage needs as much as the largest of them."""
PARTS = ("weights", "gradients", "optimizer", "activations", "kv cache", "logits")

FP32, BF16, ADAMW = 4, 2, 8
"""Bytes per number, and per weight for AdamW's two fp32 moments (Loshchilov and Hutter 2019)."""
NF4 = 0.5 + 4 / 64
"""Bytes per weight in 4 bits, with an fp32 scale for every 64 weights (Dettmers et al. 2023, section 2)."""

LIBRARIES, GPU_CONTEXT = 0.7e9, 0.6e9
"""The resident set of a stage without its model: 0.60 GB measured with a tiny one (torch 2.13, transformers 5.23, trl
1.16), plus 0.1 GB fitted to three true peaks. The GPU memory that CUDA takes per process; we have not measured it."""

# ----------------------------------------------------------------------------- the parts


def weights(model: Sizes, bf16: bool, narrow: float | None = None) -> float:
    """fp32, but bf16 for frozen plain linear layers that autocast would cast (`models.head`, `models.frozen`).

    Args:
        narrow: bytes per weight of these layers, if they are held in fewer.
    """
    if narrow is None:
        narrow = BF16 if bf16 else FP32
    return FP32 * (model.parameters - model.frozen_products) + narrow * model.frozen_products


def scoring_weights(model: Sizes, bf16: bool) -> float:
    """The weights of a model that only scores: all of it is frozen."""
    return weights(model.frozen, bf16)


def decoding_weights(model: Sizes, bf16: bool, has_adapter: bool) -> float:
    """The copy that `sampling.decoding_weights` makes, in bf16 or with its adapter merged; 0 if it makes none."""
    return (BF16 if bf16 else FP32 if has_adapter else 0) * model.parameters


def casts(model: Sizes, bf16: bool) -> float:
    """The bf16 copies of trained weights that autocast makes in each forward pass for the backward pass."""
    return BF16 * model.trained_products if bf16 else 0


def gradients(model: Sizes, processes: int) -> float:
    """fp32 for all trained weights; DistributedDataParallel holds them again, in the buckets that it reduces."""
    return FP32 * model.trained * (2 if processes > 1 else 1)


def activations(model: Sizes, kept: Saved, rows: int, length: int, checkpointing: bool) -> float:
    """What all layers keep of these sequences; under checkpointing only their inputs, plus one layer while it is
    recomputed (Chen et al. 2016, section 4.1)."""
    if not checkpointing:
        return rows * (model.layers * kept.layer + kept.rest)
    return rows * (model.layers * length * model.hidden * FP32 + kept.layer + kept.rest)


def working(model: Sizes, rows: int, length: int, bf16: bool) -> float:
    """Gradients in flight within a layer: two of its residual stream, three of its widest states."""
    narrow = BF16 if bf16 else FP32
    return rows * length * (2 * FP32 * model.hidden + 3 * narrow * model.widest)


def kv_cache(model: Sizes, rows: int, length: int, bf16: bool) -> float:
    """Keys and values in all layers (Pope et al. 2023, section 2.1)."""
    return rows * length * model.key_values * (BF16 if bf16 else FP32)


def label_logits(model: Sizes, columns: int, bf16: bool) -> float:
    """The logits that a head keeps for these columns: as computed and in fp32, with the gradient of each
    (`models.cpu.label_head`)."""
    return columns * model.vocabulary * 2 * ((BF16 + FP32) if bf16 else FP32)


def chunked_logits(model: Sizes, at_once: int = SCORED_AT_ONCE) -> float:
    """For a head that works in chunks: the logits of one chunk, their softmax and its gradient in fp32."""
    return 3 * FP32 * at_once * model.vocabulary


def sampled_logits(model: Sizes, rows: int) -> float:
    """For a decoding step: the logits, their fp32 copy and the weights of the distribution (`sampling.pick`)."""
    return 3 * FP32 * rows * model.vocabulary


# ----------------------------------------------------------------------------- moments


@dataclass(frozen=True)
class Run:
    """Where and how a stage runs."""

    bf16: bool
    """Autocast to bf16."""
    on_gpu: bool
    processes: int = 1

    @property
    def overhead(self) -> float:
        """Bytes in use before there is a model: the libraries, or the GPU's context."""
        return GPU_CONTEXT if self.on_gpu else LIBRARIES


@dataclass(frozen=True)
class Training:
    """The optimizer steps of sft, reward or any policy but ppo, in one process."""

    config: Any
    """The model's config from transformers."""
    run: Run
    micro_batch: int
    """Rows per forward pass."""
    length: int
    """Tokens of each sequence, padding included."""
    accumulates: bool
    """Whether a step has several forward passes, so that gradients are held during the next one."""
    sequences: int = 1
    """Sequences per row: its K responses, or the two of a pair."""
    lora: Lora | None = None
    four_bit: bool = False
    """Whether the frozen weights are held in 4 bits."""
    label_columns: int = 0
    """Columns per row whose logits the head keeps; 0: the head works in chunks."""
    is_classifier: bool = False

    @property
    def rows(self) -> int:
        return self.micro_batch * self.sequences

    def moments(self, checkpointing: bool) -> Moments:
        model = sizes(self.config, self.lora)
        model = model.classifier if self.is_classifier else model
        kept = saved(self.config, self.length, self.run.bf16, self.lora, self.run.on_gpu)
        if self.is_classifier:
            logits = 0.0
        elif self.label_columns:
            logits = label_logits(model, self.rows * self.label_columns, self.run.bf16)
        else:
            logits = chunked_logits(model)
        usual = weights(model, self.run.bf16)
        beside = weights(model, self.run.bf16, NF4) - usual if self.four_bit else 0.0
        return training([(model, kept)], self, logits, checkpointing, beside)


@dataclass(frozen=True)
class Ppo:
    """An iteration of PPO in one process."""

    config: Any
    run: Run
    episodes: int
    """Episodes that are sampled together."""
    rows: int
    """Episodes that go through the models together in an update."""
    length: int
    """Tokens of prompt and response."""
    accumulates: bool
    lora: Lora | None = None
    has_critic: bool = True
    has_reward_model: bool = True
    shards: int = 1
    """Processes that share weights, gradients and optimizer; each model is gathered while it scores."""

    def moments(self, checkpointing: bool) -> Moments:
        bf16, has_adapter = self.run.bf16, self.lora is not None
        policy, whole = sizes(self.config, self.lora), sizes(self.config)
        kept = [saved(self.config, self.length, bf16, lora, self.run.on_gpu) for lora in (self.lora, None)]
        models = [(policy, kept[0])] + ([(whole.classifier, kept[1])] if self.has_critic else [])
        frozen = scoring_weights(whole.classifier, bf16) if self.has_reward_model else 0.0
        if not has_adapter:
            frozen += scoring_weights(whole, bf16)  # the reference
        # The sampling copy is merged in fp32 and cast afterwards, so the base stays in fp32.
        own = FP32 * sum(m.parameters for m, _ in models)
        beside = frozen + own - sum(weights(m, bf16) for m, _ in models)
        decoder = decoding_weights(whole, bf16, has_adapter) if self.shards == 1 else 0.0
        rollout = {
            "weights": own + frozen / self.shards + decoder,
            "optimizer": sum(ADAMW * m.trained for m, _ in models) / self.shards,
            "kv cache": kv_cache(policy, self.episodes, self.length, bf16),
            "logits": sampled_logits(policy, self.episodes),
        }
        if has_adapter and bf16 and not checkpointing:  # autocast's copies of the base, for the backward pass
            beside += BF16 * policy.frozen_products
        update = training(models, self, chunked_logits(policy), checkpointing, beside)
        spread = ("weights", "gradients", "optimizer")
        return {"rollout": rollout} | {
            name: {part: n / self.shards if part in spread else n for part, n in parts.items()}
            for name, parts in update.items()
        }


def training_plan(
    config: Epochs,
    model: Any,
    run: Run,
    length: int,
    labelled: int = 0,
    sequences: int = 1,
    is_classifier: bool = False,
) -> Training:
    """The plan of a stage with a Hugging Face trainer.

    Args:
        model: the model's config from transformers.
        length: tokens of the longest row.
        labelled: tokens of its longest labelled part; 0 if there are no labels.
        sequences: how many sequences a row has.
    """
    share = max(config.batch_size // run.processes, 1)
    micro = config.rows_at_once(share)
    return Training(
        config=model,
        run=run,
        micro_batch=micro,
        sequences=sequences,
        length=length,
        accumulates=micro < share,
        lora=config.lora,
        four_bit=config.four_bit,
        # On a CPU: see `models.cpu.label_head`.
        label_columns=0 if run.on_gpu or labelled > length // 2 else labelled,
        is_classifier=is_classifier,
    )


def ppo_plan(config: PpoConfig, model: Any, run: Run, length: int) -> Ppo:
    """The plan of a PPO stage.

    Args:
        model: the policy's config from transformers.
        length: tokens of the longest prompt and response.
    """
    minibatch = (config.minibatch_size or config.batch_size) // run.processes
    rows = min(config.micro_batch_size or minibatch, minibatch)
    return Ppo(
        config=model,
        run=run,
        episodes=config.batch_size // run.processes,
        rows=rows,
        length=length,
        accumulates=rows < minibatch,
        lora=config.lora,
        has_critic=config.has_separate_critic,
        has_reward_model=config.uses_reward_model,
        shards=run.processes if config.sharded else 1,
    )


def training(
    models: Sequence[tuple[Sizes, Saved]],
    of: Training | Ppo,
    logits: float,
    checkpointing: bool,
    beside: float = 0,
) -> Moments:
    """The moments of a training from the second step on, when the optimizer has its state.

    On a CPU freed blocks are kept (`models.cpu.memory`) and are too small for activations. So gradients count all the
    time there, and the published model is loaded again for comparison on top of what training took. Both were measured.

    Args:
        models: the trained models, each with what it keeps of a row.
        logits: bytes that the loss adds to the activations.
        beside: bytes of frozen models.
    """
    run, shape = of.run, (of.rows, of.length)
    grads = sum(gradients(m, run.processes) for m, _ in models)
    own = {
        "weights": sum(weights(m, run.bf16) for m, _ in models) + beside,
        "optimizer": sum(ADAMW * m.trained for m, _ in models),
    }
    forward = own | {
        "weights": own["weights"] + sum(casts(m, run.bf16) for m, _ in models),
        "gradients": grads if of.accumulates or run.processes > 1 or not run.on_gpu else 0.0,
    }
    states = sum(activations(m, kept, *shape, checkpointing) for m, kept in models)
    moving = max(working(m, *shape, run.bf16) for m, _ in models)
    backward = forward | {"activations": states + moving}
    found = {
        "loss": forward | {"activations": states, "logits": logits},
        "backward": backward,
        "step": own | {"gradients": grads},
    }
    if not run.on_gpu:
        found["publishing"] = backward | {"weights": backward["weights"] + FP32 * models[0][0].parameters}
    return found


@dataclass(frozen=True)
class Inference:
    """Sampling from a model and scoring its responses: completions, retention and evaluation."""

    config: Any
    run: Run
    rows: int
    """Sequences decoded together."""
    length: int
    """Tokens of prompt and response."""
    keeps_model: bool = True
    """Whether the scoring model stays in memory while its decoding copy runs."""
    beside: int = 0
    """Further models that score at the same time: the reference or the reward model."""

    def moments(self, checkpointing: bool = False) -> Moments:
        bf16, model = self.run.bf16, sizes(self.config).frozen
        own = FP32 * model.parameters
        decoder = decoding_weights(model, bf16, has_adapter=False)
        cache = {
            "kv cache": kv_cache(model, self.rows, self.length, bf16),
            "logits": sampled_logits(model, self.rows),
        }
        return {
            # Weights arrive on the device in fp32.
            "loading": {"weights": float(own)},
            "sampling": {"weights": (own if self.keeps_model or not decoder else 0) + decoder} | cache,
            "scoring": {
                "weights": float(own * (1 + self.beside)),
                "logits": (1 + self.beside) * chunked_logits(model),
            },
        }


def total(parts: Parts) -> float:
    return sum(parts.values())


def most(moments: Moments) -> tuple[str, Parts]:
    """The moment with the most memory in use, and its parts."""
    return max(moments.items(), key=lambda moment: total(moment[1]))


def needed(run: Run, moments: Moments) -> float:
    """Bytes in use at the moment with the most, including what is in use before there is a model."""
    return run.overhead + total(most(moments)[1])


# ----------------------------------------------------------------------------- the device

USABLE = 0.92
"""Share of a device's memory that a plan may fill: allocators lose some of it between blocks."""


def device_bytes() -> int:
    """The memory of the GPU that this process uses, or of the machine if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
