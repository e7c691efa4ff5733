"""The numerical environment of a stage that runs a model: seeds, determinism, precision, quiet libraries."""

import os
import random
import warnings
from contextlib import AbstractContextManager

import numpy as np
import torch

from tunetrail.models.cpu.memory import keep_freed_memory
from tunetrail.seeds import derive_seed


def seed_everything(*parts: object) -> None:
    """Seeds Python, NumPy and torch and makes torch refuse nondeterministic kernels."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would also fill every new tensor with NaN, which only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False


def prepare(*seed_parts: object) -> None:
    """Prepares the process of a stage that runs a model; call it first."""
    keep_freed_memory()
    quiet_libraries()
    torch.serialization.set_crc32_options(False)  # checkpoints have digests instead; see `make bench`
    seed_everything(*seed_parts)


def quiet_libraries() -> None:
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def use_bf16(precision: str) -> bool:
    """Whether `precision` (auto, fp32, bf16) means bf16 autocast here: auto means so if the hardware supports bf16."""
    if precision == "auto":
        return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def autocast(precision: str) -> AbstractContextManager:
    """bf16 autocast over fp32 weights if `use_bf16(precision)`, else a context that does nothing."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=use_bf16(precision))
