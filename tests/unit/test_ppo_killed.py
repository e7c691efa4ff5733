"""PPO killed with SIGKILL at random moments and run again ends with the bytes of a run that was left alone.

Moments are Python calls, counted by a profile hook while the trainer rolls out, updates or saves: the same ones
in every run of the tests.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from tunetrail.contract import main
from tunetrail.models.loading import tokenizer_digest
from tunetrail.models.tiny import tiny_model, tiny_tokenizer

from .test_distributed import two_processes
from .test_training import write_artifact

STEPS = 3
PHASES = {("trainer.py", "rollout"), ("trainer.py", "update"), ("ppo.py", "save")}
CONFIG = {
    "method": "ppo", "steps": STEPS, "batch_size": 8, "minibatch_size": 4, "epochs": 2, "max_new_tokens": 4,
    "learning_rate": 1e-3, "kl_target": 0.1,
}  # fmt: skip
POINTS = {"rollout": 8, "update": 7, "save": 5}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny policy, its reward model and prompts."""
    from tunetrail.stages.reward import initialise

    folder = tmp_path_factory.mktemp("killed")
    tokenizer = tiny_tokenizer()
    for name in ("base", "reward"):
        model = tiny_model(16, 1, 2, len(tokenizer), seed=0)
        model = initialise(model, seed=1) if name == "reward" else model
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
    digest = tokenizer_digest(folder / "base/model")
    prompts = [{"id": str(i), "group": str(i), "prompt": f"n{i}:", "completion": "x" * i} for i in range(9)]
    for name, files in (("base", {}), ("reward", {}), ("data", {"rl.jsonl": prompts})):
        write_artifact(folder / name, files, digest)
    for precision in ("fp32", "bf16"):  # here, since two processes would write over each other
        path = folder / f"{precision}.config.json"
        path.write_text(json.dumps({"stage": "ppo", "seed": 5, "precision": precision, "config": CONFIG}))
    return folder


def run_ppo(folder: Path, name: str, precision: str, kill_at: int | None = None) -> None:
    """The stage, in a child of its own, which leaves its exit code and the phases it went through in `NAME.json`."""
    from tunetrail.stages import ppo

    os.chdir(folder)
    os.environ["TUNETRAIL_CHECKPOINT_MINUTES"] = "0"
    path = folder / f"{precision}.config.json"
    inputs = [f"--input={role}={source}/manifest.json" for role, source in (("policy", "base"), ("reward", "reward"), ("data", "data"))]  # fmt: skip
    count, current, phases = 0, None, []

    def hook(frame, event, _) -> None:
        nonlocal count, current
        if event == "call" and current is None:
            code = frame.f_code
            if (os.path.basename(code.co_filename), code.co_name) in PHASES:
                current = frame
                phases.append((code.co_name, count))
        if current is not None:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "return" and frame is current:
                current = None

    sys.setprofile(hook)
    code = main(ppo.run, ["--config", str(path), *inputs, f"--output={name}/manifest.json", f"--state={name}.state"])
    sys.setprofile(None)
    rank = os.environ.get("RANK", "0")
    (folder / f"{name}.{rank}.json").write_text(json.dumps({"code": code, "phases": phases, "count": count}))


def child(*arguments) -> int:
    """Exit code of `run_ppo` in a fresh process, which does not pay for imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tunetrail.stages.ppo", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=run_ppo, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def ended(space: Path, name: str, rank: int = 0) -> dict:
    found = json.loads((space / f"{name}.{rank}.json").read_text())
    assert found["code"] == 0
    return found


def moments(straight: dict, points: dict[str, int], seed: int) -> list[tuple[str, int, int]]:
    """(phase, call, saves made before it) of so many random moments in each phase."""
    rng, found = random.Random(seed), []
    starts = [start for _, start in straight["phases"]] + [straight["count"]]
    spans = [(name, a, b) for (name, _), (a, b) in zip(straight["phases"], itertools.pairwise(starts), strict=True)]
    for phase, n in points.items():
        for _ in range(n):
            name, first, last = rng.choice([span for span in spans if span[0] == phase])
            found.append((name, rng.randint(first + 1, last), sum(s[0] == "save" and s[2] <= first for s in spans)))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_at_twenty_random_moments_ppo_ends_with_the_same_bytes(space, precision):
    straight = f"{precision}-straight"
    assert child(space, straight, precision) == 0
    expected = (space / straight / "manifest.json").read_bytes()
    chosen = moments(ended(space, straight), POINTS, seed=1)
    assert len(chosen) == 20
    for n, (phase, call, saves) in enumerate(chosen):
        name = f"{precision}-{n}"
        assert child(space, name, precision, call) == -signal.SIGKILL
        assert not (space / name).exists()
        assert child(space, name, precision) == 0
        assert (space / name / "manifest.json").read_bytes() == expected, (phase, call)
        # It went on from the last save: one that was being written may count or not.
        rolled_out = sum(p == "rollout" for p, _ in ended(space, name)["phases"])
        assert rolled_out in {STEPS - saves, STEPS - saves - (phase == "save")}


SCRIPT = """
import os
import sys
from pathlib import Path
from tests.unit.test_ppo_killed import run_ppo

folder, name, kill_at, rank = sys.argv[1:]
run_ppo(Path(folder), name, "fp32", int(kill_at) if os.environ["RANK"] == rank else None)
"""


def ppo_in_two(space: Path, name: str, kill_at: int = 0, rank: int = 0) -> tuple[int, str]:
    """(exit code of the launcher, what it wrote to standard error)."""
    script = space / "two.py"
    script.write_text(SCRIPT)
    reply = two_processes(script, str(space), name, str(kill_at), str(rank))
    return reply.returncode, reply.stderr


def test_two_processes_of_which_one_is_killed_end_with_the_same_bytes(space):
    code, error = ppo_in_two(space, "two")
    assert code == ended(space, "two")["code"] == 0, error[-3000:]
    expected = (space / "two/manifest.json").read_bytes()
    for seed, (rank, phase) in enumerate(((1, "rollout"), (0, "update"), (0, "save"))):
        [(_, call, _)] = moments(ended(space, "two", rank), {phase: 1}, seed)
        name = f"two-{phase}"
        assert ppo_in_two(space, name, call, rank)[0] != 0
        assert not (space / name).exists()
        code, error = ppo_in_two(space, name)
        assert code == 0, error[-3000:]
        assert (space / name / "manifest.json").read_bytes() == expected, phase
