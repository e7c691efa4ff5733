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
KINDS = ("fp32", "bf16", "sharded")
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
    for kind in KINDS:  # here, since two processes would write over each other
        precision, config = ("fp32", CONFIG | {"sharded": True}) if kind == "sharded" else (kind, CONFIG)
        content = {"stage": "ppo", "seed": 5, "precision": precision, "config": config}
        (folder / f"{kind}.config.json").write_text(json.dumps(content))
    return folder


def run_ppo(folder: Path, name: str, kind: str, at: int | None = None, sent: int = signal.SIGKILL) -> None:
    """The stage, in a child of its own, which leaves its exit code and the phases it went through in `NAME.json`.

    Args:
        at: the call before which it sends itself the signal `sent`.
    """
    from tunetrail.stages import ppo

    os.chdir(folder)
    os.environ["TUNETRAIL_CHECKPOINT_MINUTES"] = "0"
    path = folder / f"{kind}.config.json"
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
            if count == at:
                os.kill(os.getpid(), sent)
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

folder, name, kind, at, rank, sent = sys.argv[1:]
run_ppo(Path(folder), name, kind, int(at) if os.environ["RANK"] == rank else None, int(sent))
"""


def ppo_in_two(
    space: Path, name: str, kind: str, at: int = 0, rank: int = 0, sent: int = signal.SIGKILL
) -> tuple[int, str]:
    """(exit code of the launcher, what it wrote to standard error)."""
    script = space / "two.py"
    script.write_text(SCRIPT)
    reply = two_processes(script, str(space), name, kind, str(at), str(rank), str(int(sent)))
    return reply.returncode, reply.stderr


@pytest.fixture(scope="module", params=["fp32", "sharded"])
def in_two(request, space) -> tuple[str, bytes]:
    """(kind, manifest of a run in two processes that was left alone)."""
    code, error = ppo_in_two(space, f"two-{request.param}", request.param)
    assert code == 0, error[-3000:]
    assert ended(space, f"two-{request.param}")["code"] == 0
    return request.param, (space / f"two-{request.param}/manifest.json").read_bytes()


def test_two_processes_of_which_one_is_killed_end_with_the_same_bytes(space, in_two):
    kind, expected = in_two
    moments_of = ((1, "rollout"), (0, "update"), (0, "save")) if kind == "fp32" else ((1, "update"), (0, "save"))
    for seed, (rank, phase) in enumerate(moments_of):
        [(_, call, _)] = moments(ended(space, f"two-{kind}", rank), {phase: 1}, seed)
        name = f"two-{kind}-{phase}"
        assert ppo_in_two(space, name, kind, call, rank)[0] != 0
        assert not (space / name).exists()
        code, error = ppo_in_two(space, name, kind)
        assert code == 0, error[-3000:]
        assert (space / name / "manifest.json").read_bytes() == expected, phase


def test_what_one_process_is_told_both_do(space, in_two):
    """SIGTERM to one of two: both save and leave with 75, and the next attempt ends with the same bytes."""
    kind, expected = in_two
    name = f"two-{kind}-told"
    [(_, call, _)] = moments(ended(space, f"two-{kind}", 1), {"update": 1}, seed=3)
    code, error = ppo_in_two(space, name, kind, call, 1, signal.SIGTERM)
    assert code == 0, error[-3000:]
    assert [json.loads((space / f"{name}.{rank}.json").read_text())["code"] for rank in (0, 1)] == [75, 75]
    assert "stopped by SIGTERM" in error
    code, error = ppo_in_two(space, name, kind)
    assert code == 0, error[-3000:]
    assert (space / name / "manifest.json").read_bytes() == expected
