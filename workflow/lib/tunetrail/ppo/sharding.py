"""Models too large for one GPU: weights, gradients and optimizer state are sharded over the processes.

This uses torch's FSDP2 (Zhao et al. 2023, after ZeRO stage 3 of Rajbhandari et al. 2020): each decoder layer is
gathered just before it is needed and released afterwards. Tested across two processes on CPUs; never run on GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: Any, layers: Any, device: torch.device) -> Any:
    """Shards a model on the CPU over the devices of all processes, in place.

    Args:
        layers: class names of the modules to gather one at a time, `_no_split_modules` of a transformers model; the
            rest of the model stays gathered from its forward pass to its backward pass.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in (layers or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # The first module that runs would become the root, and `gathered` may call any part first.
    model._get_fsdp_state()._lazy_init()
    return model


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(*models: Any) -> Iterator[None]:
    """Inside this context every process holds all weights of the models and can run them independently.

    Without it each pass is a collective call, and processes with different numbers of batches would wait for each other
    forever. Call it in all processes. Models that are not sharded are left alone.
    """
    parts = [(m is model, m) for model in models if is_sharded(model) for m in model.modules() if is_sharded(m)]
    for _, part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for is_root, part in parts:
            part.set_reshard_after_forward(not is_root, recurse=False)
            part.reshard()


def whole_state(model: Any, part: str) -> dict[str, torch.Tensor] | None:
    """The whole state dict of a part of a sharded model, on the CPU of the first process; empty in the others.

    Tied weights appear once. None if the model is not sharded. Call it in all processes.
    """
    if not is_sharded(model):
        return None
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    distinct = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - distinct
    return {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.") and k not in tied}


def save_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes this process's shard. Call it in all processes."""
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)


def load_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Loads what `save_shards` wrote, even if the number of processes has changed. Call it in all processes."""
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
