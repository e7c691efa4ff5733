"""Stages killed at chosen moments, each attempt in its own process.

Moments are Python calls, counted by a trace hook from the start of a phase, so they are the same in every run of the
tests. SIGKILL leaves what was written to files and nothing else.
"""

import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tunetrail.contract.runner import main

PHASES = {
    # phases of transformers' Trainer: sft, reward and all policies but ppo
    ("trainer.py", "training_step"): "step",
    ("trainer.py", "_save_checkpoint"): "save",
    ("trainer.py", "_load_optimizer_and_scheduler"): "load",
    ("training.py", "history"): "evaluate",
    # phases of PPOTrainer
    ("trainer.py", "rollout"): "step",
    ("trainer.py", "update"): "update",
    ("trainer.py", "save"): "save",
    ("trainer.py", "load"): "load",
    ("sharding.py", "whole_state"): "evaluate",
    # phases of both
    ("checkpoints.py", "mark_complete"): "mark",
    ("checkpoints.py", "keep_newest"): "tidy",
    # phases of sampling
    ("sampling.py", "sample"): "sample",
    ("completions.py", "unique_completions"): "row",
    ("artifact.py", "publish"): "publish",
    ("artifact.py", "declare_finished"): "finish",
}
"""(file, function) -> the phase that a call of it starts; it lasts until the next one starts.

The last phase of publishing, "over", starts when no state is left that another attempt could resume.
"""
NAMES = {name for _, name in PHASES}


@dataclass(frozen=True)
class Work:
    """A stage whose config is `KIND.json` in `folder`; inputs: role -> folder."""

    folder: Path
    kind: str
    stage: str
    inputs: dict[str, str]

    def manifest(self, name: str) -> Path:
        return self.folder / name / "manifest.json"

    def report(self, name: str, rank: int = 0) -> dict:
        """About the last attempt: its exit code, None if it was killed; [phase, call at which it started]; calls."""
        return json.loads((self.folder / f"{name}.{rank}.report").read_text())

    def error(self, name: str, rank: int = 0) -> str:
        """What the last attempt wrote to standard error."""
        return (self.folder / f"{name}.{rank}.error").read_text()


@dataclass(frozen=True)
class Moment:
    """A number of calls after the start of the nth phase of that name (counting from 0)."""

    phase: str
    nth: int
    calls: int


def attempt(work: Work, name: str, moment: Moment | None, sent: int, environment: dict[str, str]) -> None:
    """Runs the stage in this process, saving after every step; at that moment the process sends itself a signal."""
    os.environ |= environment | {"TUNETRAIL_CHECKPOINT_MINUTES": "0"}
    os.chdir(work.folder)
    rank = os.environ.get("RANK", "0")
    with open(f"{name}.{rank}.error", "wb") as error:
        os.dup2(error.fileno(), 2)
    state = Path(f"{name}.state")
    count, at, phases = 0, None, []

    def begin(phase: str) -> None:
        nonlocal at
        if moment and (phase, sum(p == phase for p, _ in phases)) == (moment.phase, moment.nth):
            at = count + moment.calls
        phases.append((phase, count))

    def report(code: int | None) -> None:
        Path(f"{name}.{rank}.report").write_text(json.dumps({"code": code, "phases": phases, "calls": count}))

    def hook(frame: Any, *_: Any) -> None:
        nonlocal count
        count += 1
        code = frame.f_code
        if code.co_name in NAMES and (phase := PHASES.get((code.co_filename.rpartition("/")[2], code.co_name))):
            begin(phase)
        if phases and phases[-1][0] == "finish" and not any(state.glob("*/attempts.jsonl")):
            begin("over")
        if count == at:
            report(None)
            os.kill(os.getpid(), sent)

    inputs = [f"--input={role}={source}/manifest.json" for role, source in work.inputs.items()]
    arguments = [f"--config={work.kind}.json", *inputs, f"--output={name}/manifest.json", f"--state={state}"]
    module = importlib.import_module(f"tunetrail.stages.{work.stage}")
    sys.settrace(hook)
    code = main(module.run, arguments, distributed=True)
    sys.settrace(None)
    report(code)


def together(target: Callable[..., None], arguments: list[tuple]) -> list[int | None]:
    """Runs a function in new processes over gloo that need no imports, and returns their exit codes.

    If one process fails, the others are killed, as launchers do; if none ends within ten minutes, all are killed.

    Args:
        arguments: of each process, which gets its environment variables as an additional one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(arguments))}
    children = []
    for i, own in enumerate(arguments):
        environment = group | {"RANK": str(i), "LOCAL_RANK": str(i)} if len(arguments) > 1 else {}
        children.append(context.Process(target=target, args=(*own, environment)))
        children[-1].start()
    running = {child.sentinel: child for child in children}
    while running:
        ended = wait(list(running), timeout=600)
        if not ended:
            for child in running.values():
                child.kill()
        for sentinel in ended:
            if running.pop(sentinel).exitcode:  # type: ignore[call-overload]
                for other in running.values():
                    other.kill()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def run(
    work: Work, name: str, moment: Moment | None = None, sent: int = signal.SIGKILL, processes: int = 1, rank: int = 0
) -> list[int | None]:
    """Runs an attempt and returns its exit codes; its process of this rank sends itself the signal at the moment."""
    return together(attempt, [(work, name, moment if i == rank else None, sent) for i in range(processes)])


def lengths(report: dict) -> dict[tuple[str, int], int]:
    """(phase, nth) -> the number of calls until the next one started."""
    seen: Counter[str] = Counter()
    found = {}
    for (phase, start), (_, end) in pairwise([*report["phases"], ("", report["calls"])]):
        found[phase, seen[phase]] = end - start
        seen[phase] += 1
    return found


def moment_in(report: dict, phase: str, nth: int, rng: random.Random) -> Moment:
    """A random moment in a phase that an undisturbed run went through."""
    return Moment(phase, nth, rng.randint(1, lengths(report)[phase, nth]))
