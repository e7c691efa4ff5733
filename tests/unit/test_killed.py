"""Every stage that saves progress ends with the same bytes after SIGKILL and a rerun as an undisturbed run."""

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.killed import Moment, Work, moment_in, run
from tunetrail.files import read_jsonl
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.provenance.verify import Verifier

from .test_training import write_artifact, write_workspace

pytestmark = pytest.mark.slow

EPOCHS = {"learning_rate": 1e-3, "batch_size": 4}
PPO = {
    "method": "ppo", "steps": 10, "batch_size": 8, "minibatch_size": 4, "epochs": 2, "max_new_tokens": 4,
    "learning_rate": 1e-3, "kl_target": 0.1,
}  # fmt: skip
LORA = {"lora": {"r": 2}}
PROBED = {"head_learning_rate": 1e-2, "warm_start": "probe", "pooling": "mean"}
SAMPLING = {"per_prompt": 2, "batch_size": 4, "max_new_tokens": 6}
OF_BASE = {"policy": "base", "comparisons": "comparisons"}
OF_DATA = {"policy": "base", "data": "data"}
# kind: (stage, its config, its inputs)
KINDS: dict[str, tuple[str, dict, dict[str, str]]] = {
    "sft": ("sft", EPOCHS | {"epochs": 2}, {"base": "base", "data": "data"}),
    "sft-lora": ("sft", EPOCHS | LORA | {"epochs": 2}, {"base": "base", "data": "data"}),
    "reward": ("reward", EPOCHS | PROBED | {"epochs": 3}, OF_BASE | {"data": "data"}),
    "reward-lora": ("reward", EPOCHS | LORA | {"epochs": 3}, OF_BASE | {"data": "data"}),
    "dpo": ("dpo", EPOCHS | {"method": "dpo", "checkpoints": 2}, OF_BASE),
    "dpo-lora": ("dpo", EPOCHS | LORA | {"method": "dpo", "checkpoints": 2}, OF_BASE),
    "dpo-early": ("dpo", EPOCHS | {"method": "dpo", "evaluate_every": 3, "patience": 2}, OF_BASE),
    "orpo": ("orpo", EPOCHS | {"method": "orpo", "checkpoints": 2}, OF_BASE),
    "simpo-lora": ("simpo", EPOCHS | LORA | {"method": "simpo"}, OF_BASE),
    "kto": ("kto", EPOCHS | {"method": "kto", "epochs": 2, "checkpoints": 2}, OF_DATA),
    "kto-lora": ("kto", EPOCHS | LORA | {"method": "kto", "epochs": 2}, OF_DATA),
    "completions": ("completions", SAMPLING, {"model": "base", "data": "data"}),
    "ppo": ("ppo", PPO, {"policy": "base", "reward": "reward", "data": "data"}),
    "ppo-bf16": ("ppo", PPO | {"checkpoints": 3}, {"policy": "base", "reward": "reward", "data": "data"}),
    "ppo-sharded": (
        "ppo",
        PPO | {"sharded": True, "checkpoints": 3},
        {"policy": "base", "reward": "reward", "data": "data"},
    ),
    "ppo-sharded-lora": (
        "ppo",
        PPO | LORA | {"sharded": True, "steps": 2, "checkpoints": 1},
        {"policy": "base", "reward": "reward", "data": "data"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny base model, its reward model, data, and the configs."""
    from tunetrail.reward.kwise import initialise

    folder = tmp_path_factory.mktemp("killed")
    digest = write_workspace(folder)
    model = initialise(tiny_model(16, 1, 2, len(tiny_tokenizer()), seed=0), seed=1)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    model.save_pretrained(folder / "reward/model")
    tiny_tokenizer().save_pretrained(folder / "reward/model")
    write_artifact(folder / "reward", {}, digest)
    for kind, (stage, config, _) in KINDS.items():
        precision = "bf16" if kind.endswith("bf16") else "fp32"
        content = {"stage": stage, "seed": 5, "precision": precision, "config": config}
        (folder / f"{kind}.json").write_text(json.dumps(content))
    return folder


def work_of(folder: Path, kind: str) -> Work:
    stage, _, inputs = KINDS[kind]
    return Work(folder, kind, stage, inputs)


def finish(work: Work, name: str, processes: int = 1) -> bytes:
    """Runs it undisturbed to its end; returns its manifest."""
    assert run(work, name, processes=processes) == [0] * processes, work.error(name)
    assert work.report(name)["code"] == 0, work.error(name)
    return work.manifest(name).read_bytes()


def undisturbed(work: Work, processes: int = 1) -> bytes:
    """The manifest of an undisturbed run, `KIND-straight` or `KIND-two`; made once."""
    name = f"{work.kind}-{'two' if processes > 1 else 'straight'}"
    manifest = work.manifest(name)
    return manifest.read_bytes() if manifest.exists() else finish(work, name, processes)


# ----------------------------------------------------------------------------- one process

AT_WORK = 14
# In this order, so that no work is repeated.
AFTER_WORK = ("evaluate", "evaluate", "publish", "publish")


def saved(phases: list[str]) -> int:
    """The steps, or sampled batches, that an attempt saved for the next one."""
    if "row" in phases:
        return phases.count("sample") - (phases[-1] in ("sample", "row"))
    return phases.count("tidy")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "sharded" not in kind])
def test_a_stage_killed_at_twenty_random_moments_ends_with_the_same_bytes(folder, kind):
    """Fourteen attempts in a row are killed while they work, and six more while they publish."""
    work, rng = work_of(folder, kind), random.Random(1)
    straight, name = f"{kind}-straight", f"{kind}-killed"
    expected = undisturbed(work)
    report = work.report(straight)
    phases = {phase for phase, _ in report["phases"]}
    step = "step" if "step" in phases else "sample"
    steps = sum(phase == step for phase, _ in report["phases"])
    done = uncertain = 0
    for n in range(20):
        if n == 18:
            moment = Moment("finish", 0, 1)  # between the publishing rename and the manifest
        elif AT_WORK <= n < 18:
            phase = AFTER_WORK[n - AT_WORK]
            moment = moment_in(report, phase if phase in phases else "publish", 0, rng)
        elif n == 19:
            moment = Moment("finish", 0, rng.randint(2, 60))  # while it cleans up
        elif done and rng.random() < 0.1 and "tidy" in phases:
            moment = Moment("load", 0, rng.randint(1, 300))
        elif steps - done - uncertain > 2:  # the first or second of its kind, so that there is work left for all
            moment = moment_in(
                report, rng.choice(sorted(phases - {*AFTER_WORK, "finish", "over"})), rng.randrange(2), rng
            )
        else:
            moment = moment_in(report, step, 0, rng)
        assert run(work, name, moment) == [-signal.SIGKILL], moment
        assert not work.manifest(name).exists() or (n == 19 and work.manifest(name).read_bytes() == expected)
        seen = [phase for phase, _ in work.report(name)["phases"]]
        done += saved(seen)
        uncertain += seen[-1] in ("mark", "row")  # it was saved, or nearly
        assert done <= steps, moment
        assert done + uncertain >= steps or n < AT_WORK, moment
    assert finish(work, name) == expected
    assert step not in {phase for phase, _ in work.report(name)["phases"]}
    verdict = Verifier().run([work.folder / name])
    assert {finding.name for finding in verdict.findings} <= {"not-sealed", "dirty-tree"}


# ----------------------------------------------------------------------------- two processes

IN_TWO = (
    "sft", "sft-lora", "reward", "reward-lora", "dpo", "dpo-lora", "dpo-early", "orpo", "kto", "kto-lora", "ppo",
    "ppo-sharded",
)  # fmt: skip
TOLERANCE = 1e-4
"""For all logged numbers, metrics and weights, which are of the order of 1: sums have another order."""


def close(a: Any, b: Any) -> bool:
    """Whether two JSON values have the same structure and their numbers agree within the tolerance."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == (pytest.approx(b, abs=TOLERANCE) if isinstance(b, float) else b)


@pytest.mark.parametrize("kind", [kind for kind in IN_TWO if "ppo" not in kind])  # test_distributed.py has ppo
def test_two_processes_equal_one(folder, kind):
    work = work_of(folder, kind)
    undisturbed(work)
    undisturbed(work, processes=2)
    one, two = folder / f"{kind}-straight", folder / f"{kind}-two"
    rows = [read_jsonl(artifact / "history.jsonl") for artifact in (one, two)]
    assert close(*rows), rows
    metrics = [json.loads((artifact / "metrics.json").read_text()) for artifact in (one, two)]
    assert close(*metrics), metrics
    [path] = (one / "model").glob("*.safetensors")
    weights, others = load_file(path), load_file(two / "model" / path.name)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=TOLERANCE, rtol=0)


def test_a_sharded_policy_is_gathered_and_merged_before_publishing(folder):
    """No process holds all of it: the stage gathers it to compare it with what was written."""
    undisturbed(work_of(folder, "ppo-sharded-lora"), processes=2)
    artifact = folder / "ppo-sharded-lora-two"
    base = load_file(folder / "base/model/model.safetensors")
    merged, adapter = (
        load_file(artifact / f) for f in ("model/model.safetensors", "adapter/adapter_model.safetensors")
    )
    assert merged.keys() == base.keys()
    assert len(adapter) == 2 * sum(not torch.equal(merged[name], base[name]) for name in base)
    [kept] = (artifact / "checkpoints").iterdir()
    assert load_file(kept / "adapter/adapter_model.safetensors").keys() == adapter.keys()


@pytest.mark.parametrize("kind", IN_TWO)
def test_two_processes_end_with_the_same_bytes_after_one_is_stopped_or_killed(folder, kind):
    """SIGTERM to one of two: both save and exit with 75. Then one after the other is killed."""
    work = work_of(folder, kind)
    expected, rng, name = undisturbed(work, processes=2), random.Random(2), f"{kind}-two-killed"
    moment = moment_in(work.report(f"{kind}-two", 1), "step", 1, rng)
    assert run(work, name, moment, signal.SIGTERM, processes=2, rank=1) == [0, 0]
    assert [work.report(name, rank)["code"] for rank in (0, 1)] == [75, 75]
    # The signal comes in the second step; they stop at its end, or at the next one's if they had already agreed to go
    # on.
    assert re.search(r"stopped by SIGTERM at step [23] of", work.error(name))
    for rank, phase in ((1, "step"), (0, "mark"), (1, "save"), (0, "publish")):
        moment = moment_in(work.report(f"{kind}-two", rank), phase, 0, rng)
        assert run(work, name, moment, processes=2, rank=rank)[rank] == -signal.SIGKILL
        assert not work.manifest(name).exists()
    assert finish(work, name, processes=2) == expected
