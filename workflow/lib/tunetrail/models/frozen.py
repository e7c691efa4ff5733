"""The frozen weights below an adapter, held in fewer bits for as long as it trains.

In bf16 the numbers are those of fp32 weights under autocast, which casts them at each product anyway. In 4 bits they
are others (QLoRA, Dettmers et al. 2023): the adapter learns on top of rounded weights, and a reference has them too.
Either way the adapter is merged into the fp32 weights of the model that training started from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunetrail.errors import ConfigError


def _frozen_layers(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Frozen plain linear layers of a model with an adapter, by their names in it, in 4 bits or not. The output head is
    left alone: some read it in fp32."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    for name, module in list(base.named_modules()):
        is_plain = type(module) is torch.nn.Linear or type(module).__name__ == "Linear4bit"
        if is_plain and not module.weight.requires_grad and module is not head:
            yield name, module


def narrow_below_adapter(model: Any, bf16: bool, four_bit: bool = False) -> None:
    """Holds them in bf16, in place, where the model runs under autocast to bf16, or in 4 bits; without an adapter
    nothing is done.

    Raises ConfigError where bitsandbytes is not there.
    """
    if not hasattr(model, "peft_config"):
        return
    for name, layer in _frozen_layers(model) if bf16 or four_bit else ():
        if four_bit:
            _replace(model, name, _in_four_bits(layer))
        else:
            layer.weight = torch.nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)


def _in_four_bits(layer: torch.nn.Linear) -> torch.nn.Linear:
    """The layer in NF4, quantised when it is moved to its device."""
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
