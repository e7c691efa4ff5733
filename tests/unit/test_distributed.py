"""PPO across two processes over gloo, with whole models (DDP) or sharded ones (FSDP), gives what one process gives, up
to the order of additions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .test_ppo import make_trainer

SCRIPT = """
import json
import sys
import torch
from tests.unit.test_ppo import make_trainer
from tunetrail.ppo.sharding import gathered

trainer = make_trainer(**json.loads(sys.argv[2]))
mine = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters())
share = mine / sum(p.numel() for p in trainer.model.parameters())
trainer.iterate()
trainer.iterate()
with gathered(trainer.model):
    if trainer.accelerator.is_main_process:
        weights = {name: p.detach().clone() for name, p in trainer.actor_critic.named_parameters()}
        torch.save({"weights": weights, "history": trainer.history, "share": share}, sys.argv[1])
torch.distributed.destroy_process_group()
"""


def two_processes(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes over gloo."""
    root = Path(__file__).parents[2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*launcher, str(script), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("changes", [
    {},
    {"critic": "shared"},
    {"advantage": "rloo", "completions_per_prompt": 2, "ptx_coef": 0.5, "normalize_scores": True},
    {"sharded": True, "micro_batch_size": 2},
    {"sharded": True, "critic": "shared", "lora": {"r": 2, "alpha": 4}},
    {"sharded": True, "advantage": "rloo", "completions_per_prompt": 2, "ptx_coef": 0.5},
])  # fmt: skip
def test_two_processes_equal_one(tmp_path, changes):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    reply = two_processes(script, str(tmp_path / "two.pt"), json.dumps(changes))
    assert reply.returncode == 0, reply.stderr[-3000:]
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
