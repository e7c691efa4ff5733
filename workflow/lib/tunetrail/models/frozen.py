"""Holds the frozen weights below an adapter in fewer bits while the adapter trains.

In bf16 the results are those of fp32 weights under autocast, which casts them for each product anyway. In 4 bits they
differ (QLoRA, Dettmers et al. 2023): the adapter learns on top of rounded weights, and so does any reference. Either
way the adapter is merged into the fp32 weights of the model that training started from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunetrail.errors import ConfigError


def _frozen_layers(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yields the frozen plain linear layers below an adapter, in 4 bits or not, with their names in the model.

    Leaves out the output head, which is sometimes read in fp32.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    for name, module in list(base.named_modules()):
        is_plain = type(module) is torch.nn.Linear or type(module).__name__ == "Linear4bit"
        if is_plain and not module.weight.requires_grad and module is not head:
            yield name, module


def narrow_below_adapter(model: Any, bf16: bool, four_bit: bool = False) -> None:
    """Casts them in place to bf16 if the model runs under autocast to bf16, or to 4 bits. Does nothing without an
    adapter.

    Raises ConfigError if bitsandbytes is missing.
    """
    if not hasattr(model, "peft_config"):
        return
    for name, layer in _frozen_layers(model) if bf16 or four_bit else ():
        if four_bit:
            _replace(model, name, _in_four_bits(layer))
        else:
            layer.weight = torch.nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)


def _in_four_bits(layer: torch.nn.Linear) -> torch.nn.Linear:
    """The layer in NF4; it is quantised when it moves to its device."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ConfigError(
            f"four_bit: needs bitsandbytes, which cannot be imported ({error}); pip install bitsandbytes, or set it to "
            "false"
        ) from None
    weight, device = layer.weight.detach(), layer.weight.device
    small = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.bfloat16,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    small.weight = Params4bit(weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4", module=small)
    small.bias = layer.bias
    return small.to(device)


def widen_below_adapter(model: Any, parent: Path) -> None:
    """Puts the fp32 weights back, from the `model/` folder that training started from."""
    if not hasattr(model, "peft_config"):
        return
    narrow = {name: layer for name, layer in _frozen_layers(model) if layer.weight.dtype != torch.float32}
    if not narrow:
        return
    whole = dict(
        AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, trust_remote_code=False).named_parameters()
    )
    for name, layer in narrow.items():
        weight = whole.pop(f"{name.replace('.base_layer', '')}.weight").detach().to(layer.weight.device)
        wide = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        wide.weight, wide.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
        _replace(model, name, wide)


def _replace(model: Any, name: str, layer: torch.nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_base_model().get_submodule(owner), last, layer)
