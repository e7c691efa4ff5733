"""Actions and checks that the tests on a cluster share."""

import itertools
import os
import signal
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file


def attempts_follow_each_other(project) -> None:
    """No attempt started before the previous one had ended, by the times that the attempts recorded."""
    attempts = project.record("sft").attempts
    for a, b in itertools.pairwise(attempts):
        assert a["end"] is None or a["end"] <= b["start"]


def goes_on_from(project, step: int) -> None:
    """The last attempt resumed from the state saved after this step, or a later one."""
    state = project.record("sft").attempts[-1]["state_in"]
    assert int(state["name"].rpartition("-")[2]) >= step


def ends_well(project, head: subprocess.Popen, expected: bytes, attempts: int | None = None) -> None:
    assert project.wait(head) == 0, project.said()[-5000:]
    assert project.manifest("sft") == expected
    attempts_follow_each_other(project)
    if attempts:
        assert len(project.record("sft").attempts) == attempts
    assert not project.jobs("", "PENDING,RUNNING,SUSPENDED")


def interrupt(head: subprocess.Popen) -> None:
    """Ctrl-C: a terminal sends it to the head and everything that it has started."""
    os.killpg(head.pid, signal.SIGINT)
    head.wait(60)


def kill_all(head: subprocess.Popen) -> None:
    """Kills the head and its launchers, like a login node that is switched off."""
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def submitted(project, **more: object) -> None:
    project.resources("sft", launcher="submitit", **more)


def gives_what_one_process_gives(one: Path, two: Path, before: Path) -> None:
    """Up to a tenth of how far training moved the weights: the sums of floating-point numbers are in another order, and
    Adam's first steps on a gradient of nearly 0 take its sign for it."""
    ours, theirs, start = map(load_file, (one, two, before))
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in ours.keys() & start.keys()])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert moved.norm() > 0
    assert apart.norm() < 0.1 * moved.norm()


def logs(project) -> str:
    return "".join(p.read_text() for p in (project.folder / "logs/tiny").glob("sft*.log"))
