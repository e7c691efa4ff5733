"""The sizes of a model that its memory depends on, counted without loading any weights.

Parameters are counted on the meta device. What a layer keeps for the backward pass is found by running its forward pass
on tensors without data and adding up what autograd saves, so that no formula has to know the architecture.
"""

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tunetrail.config.training import Lora
from tunetrail.models.cpu.attention import LONGEST, PLAIN
from tunetrail.models.loading import with_lora


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that its memory depends on."""

    parameters: int
    """All weights including the adapter; tied ones count once."""
    products: int
    """The weights among them in plain linear layers, which autocast casts to bf16."""
    trained: int
    trained_products: int
    layers: int
    hidden: int
    """Units of the residual stream."""
    widest: int
    """Units of the widest state within a layer."""
    key_values: int
    """Numbers that a token adds to the caches of all layers: 2 x layers x key heads x head size."""
    vocabulary: int
    has_own_head: bool
    """Whether the output head has its own matrix instead of the embedding's."""

    @property
    def frozen_products(self) -> int:
        return self.products - self.trained_products

    @property
    def frozen(self) -> "Sizes":
        """The model without trained weights."""
        return replace(self, trained=0, trained_products=0)

    @property
    def classifier(self) -> "Sizes":
        """A sequence classifier on this trunk."""
        head = self.hidden * self.vocabulary
        own, trained = (head if self.has_own_head else 0), self.trained == self.parameters
        return replace(
            self,
            parameters=self.parameters - own,
            products=self.products - head,
            trained=self.trained - (own if trained else 0),
            trained_products=self.trained_products - (head if trained else 0),
        )


@dataclass(frozen=True)
class Saved:
    """Bytes per sequence that a forward pass keeps for the backward pass."""

    layer: float
    """Per layer."""
    rest: float
    """Outside the layers, without the head."""


def sizes(config: Any, lora: Lora | None = None) -> Sizes:
    """Counts a causal language model of this config, with an adapter or without."""
    model, text = _on_meta(config), config.get_text_config()
    head = model.get_output_embeddings()
    # Tied weights are one parameter, but autocast casts them for the head only.
    linear = {name: m.weight for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    parameters, products = sum(p.numel() for p in model.parameters()), sum(w.numel() for w in linear.values())
    adaptable = linear | {name: m.weight for name, m in model.named_modules() if isinstance(m, Conv1D)}
    adapted = [] if lora is None else _adapted(adaptable, lora, head)
    adapter = sum(lora.r * sum(adaptable[name].shape) for name in adapted) if lora else 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        parameters=parameters + adapter,
        products=products + adapter,
        trained=adapter if lora else parameters,
        trained_products=adapter if lora else products,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        widest=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        key_values=2 * text.num_hidden_layers * heads * size,
        vocabulary=text.vocab_size,
        has_own_head=head is not None and head.weight is not model.get_input_embeddings().weight,
    )


def _adapted(linear: Mapping[str, torch.Tensor], lora: Lora, head: Any) -> list[str]:
    """The linear layers that get an adapter, as PEFT reads `target_modules`."""
    if lora.target_modules == "all-linear":
        return [name for name, weight in linear.items() if head is None or weight is not head.weight]
    return [name for name in linear if any(f".{name}".endswith(f".{target}") for target in lora.target_modules)]


def _on_meta(config: Any, **options: Any) -> Any:
    """The model with weights that have no data."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **options)


def saved(config: Any, length: int, bf16: bool, lora: Lora | None = None, on_gpu: bool = False) -> Saved:
    """What a model's trunk keeps of a sequence of `length` tokens for the backward pass.

    The first layer stands for all of them. Weights that autocast has cast are left out: see `memory.casts`.

    Args:
        bf16: whether autocast to bf16 is on.
        on_gpu: use the attention of a GPU; on a CPU short sequences use plain products (`models.cpu`).
    """
    options = None if lora is None else lora.model_dump_json()
    return _saved(json.dumps(config.to_dict(), default=str), type(config), length, bf16, options, on_gpu)  # type: ignore[arg-type]


@functools.cache
def _saved(config: str, kind: type, length: int, bf16: bool, lora: str | None, on_gpu: bool) -> Saved:
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported here since it is slow to import

    first = _first_layer(kind.from_dict(json.loads(config)))  # type: ignore[attr-defined]
    model = _on_meta(first, attn_implementation="sdpa" if on_gpu or length > LONGEST else PLAIN)
    if lora:
        with torch.random.fork_rng():  # planning must not change later random numbers
            model = with_lora(model, Lora.model_validate_json(lora), 0)
    trunk = (model.get_base_model() if lora else model).base_model
    kept: dict[bool, dict[int, torch.UntypedStorage]] = {True: {}, False: {}}
    inside = False

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not _is_cast(x):
            kept[inside].setdefault(x.untyped_storage()._cdata, x.untyped_storage())
        return x

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    layer = next(m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer))
    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    with FakeTensorMode():
        _fill(model, narrow=bool(lora) and bf16)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        ids, mask = torch.zeros(1, length, dtype=torch.long), torch.ones(1, 1, length, length, dtype=torch.bool)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            trunk(input_ids=ids, attention_mask=mask, use_cache=False)
    of = {where: {k: v.nbytes() for k, v in found.items() if k not in own} for where, found in kept.items()}
    return Saved(layer=sum(of[True].values()), rest=sum(v for k, v in of[False].items() if k not in of[True]))


def _first_layer(config: Any) -> Any:
    """The config with only its first layer."""
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers and name.endswith("_types"):
            setattr(text, name, value[:1])
    text.num_hidden_layers = 1
    return config


def _fill(model: Any, narrow: bool) -> None:
    """Gives a model on the meta device tensors of the active mode; with `narrow`, frozen products are bf16."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            is_narrow = narrow and not p.requires_grad and type(module) is torch.nn.Linear
            filled = torch.empty(p.shape, dtype=torch.bfloat16 if is_narrow else p.dtype)
            setattr(module, name, torch.nn.Parameter(filled, p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _is_cast(x: torch.Tensor) -> bool:
    """Whether this is a weight that autocast has cast, transposed or not."""
    node = x.grad_fn
    while node is not None and node.name() in ("TBackward0", "ToCopyBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name().endswith("AccumulateGrad")
