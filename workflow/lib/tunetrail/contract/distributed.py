"""The processes of one stage: how many there are, which one writes, and what they agree on."""

import gc
import os
import sys
from typing import Any


def processes() -> int:
    """How many processes were started for this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True in the one process that writes (rank 0 of a distributed stage)."""
    return int(os.environ.get("RANK", "0")) == 0


def process_group() -> Any:
    """torch.distributed if this stage has several processes, else None; stages without torch do not import it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def of_all_processes(value: Any) -> list[Any]:
    """Gathers the values with which the processes of the stage call this, by rank."""
    if not (group := process_group()):
        return [value]
    values = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


def end_process_group() -> None:
    """Destroys the stage's process group, if any: leaving that to the interpreter's exit may abort it.

    "terminate called without an active exception", https://github.com/pytorch/pytorch/issues/190489. Not called when a
    stage failed, since the other processes may be waiting in a collective, where this would wait with them. Nothing may
    hold the model any more, not even an exception: if its reducer is the last to hold the group, it destroys it with
    Python's lock, and waits forever for a thread of the group that wants this lock to let a tensor go.
    """
    if group := process_group():
        gc.collect()
        group.destroy_process_group()
