"""PPO across two processes over gloo gives what one process gives, up to the order of additions."""

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

trainer = make_trainer(**json.loads(sys.argv[2]))
trainer.iterate()
trainer.iterate()
if trainer.accelerator.is_main_process:
    weights = {name: p.detach().clone() for name, p in trainer.actor_critic.named_parameters()}
    torch.save({"weights": weights, "history": trainer.history}, sys.argv[1])
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
])  # fmt: skip
def test_two_processes_equal_one(tmp_path, changes):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    reply = two_processes(script, str(tmp_path / "two.pt"), json.dumps(changes))
    assert reply.returncode == 0, reply.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)

    one = make_trainer(**changes)
    one.iterate()
    one.iterate()
    for a, b in zip(one.history, two["history"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
    for name, parameter in one.actor_critic.named_parameters():
        torch.testing.assert_close(parameter, two["weights"][name], atol=1e-4, rtol=0)
