"""PPO across two processes over gloo, with whole models (DDP) or sharded ones (FSDP), gives what one process gives, up
to the order of additions."""

import os
from pathlib import Path

import pytest
import torch

from tests.killed import together
from tunetrail.contract.distributed import end_process_group as _end_process_group
from tunetrail.ppo.sharding import gathered

from .test_ppo import make_trainer

pytestmark = pytest.mark.slow


def two_iterations(path: Path, changes: dict, environment: dict[str, str]) -> None:
    """Runs as one of several processes; the first writes the result."""
    os.environ |= environment | {"ACCELERATE_USE_CPU": "true"}
    trainer = make_trainer(**changes)
    mine = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters())
    share = mine / sum(p.numel() for p in trainer.model.parameters())
    trainer.iterate()
    trainer.iterate()
    with gathered(trainer.model):
        if trainer.accelerator.is_main_process:
            weights = {name: p.detach().clone() for name, p in trainer.actor_critic.named_parameters()}
            torch.save({"weights": weights, "history": trainer.history, "share": share}, path)
    del trainer
    _end_process_group()


@pytest.mark.parametrize("changes", [
    {},
    {"critic": "shared"},
    {"advantage": "rloo", "completions_per_prompt": 2, "ptx_coef": 0.5, "normalize_scores": True},
    {"sharded": True, "micro_batch_size": 2},
    {"sharded": True, "critic": "shared", "lora": {"r": 2, "alpha": 4}},
    {"sharded": True, "advantage": "rloo", "completions_per_prompt": 2, "ptx_coef": 0.5},
])  # fmt: skip
def test_two_processes_equal_one(tmp_path, changes):
    assert together(two_iterations, [(tmp_path / "two.pt", changes)] * 2) == [0, 0]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert two["share"] == pytest.approx(0.5, abs=0.05) if changes.get("sharded") else two["share"] == 1

    one = make_trainer(**changes)
    one.iterate()
    one.iterate()
    for a, b in zip(one.history, two["history"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
    for name, parameter in one.actor_critic.named_parameters():
        torch.testing.assert_close(parameter, two["weights"][name], atol=1e-4, rtol=0)
