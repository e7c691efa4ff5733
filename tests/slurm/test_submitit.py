"""Stages with several processes, and stages as separate jobs through submitit, on a real cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunetrail.contract.artifact import verify

from .checks import ends_well, gives_what_one_process_gives, goes_on_from, interrupt, kill_all, submitted
from .cluster import until
from .conftest import CONFIG, OnSlurm


def over_two_gpus(project: OnSlurm) -> None:
    """SFT as a step with two processes on a node whose GPUs have a type."""
    project.edit_profile("training: gpu", "training: gpu-large")
    project.edit_profile('type: ""', 'type: ":a100"')
    gres = '  sft:\n    slurm_partition: ?training\n    gres: ?f"gpu{type}:'
    project.edit_profile(f"{gres}1", f"{gres}2")


def test_two_inline_processes_stop_together_and_are_requeued_under_their_id(project, prepared):
    """Both are stopped until the time limit, which is long enough for an attempt that is not stopped."""
    over_two_gpus(project)
    head = project.start("--until", "sft", TUNETRAIL_TIME_LIMIT="0.5")
    project.wait_for_saves()
    both = project.trainers(*project.cluster.kinds["big"])
    assert len(both) == 2
    for trainer in both:
        os.kill(trainer, signal.SIGSTOP)
    time.sleep(0.9 * 30)
    for trainer in both:
        os.kill(trainer, signal.SIGCONT)
    assert project.wait(head) == 0, project.said()[-5000:]
    *before, last = project.record("sft").attempts
    assert len(before) >= 1
    assert all(attempt["ended"]["message"].startswith("stopped by time limit at step ") for attempt in before)
    assert (last["ended"]["outcome"], last["world_size"]) == ("done", 2)
    [job] = project.jobs()
    assert (job["state"], int(job["restarts"])) == ("COMPLETED", len(before))
    sft_gives_what_one_process_gives(project, prepared)


def sft_gives_what_one_process_gives(project: OnSlurm, prepared: OnSlurm) -> None:
    name = "sft/model/model.safetensors"
    undisturbed = prepared.folder / "undisturbed/results/tiny" / name
    gives_what_one_process_gives(undisturbed, project.artifact(name), project.artifact("base/model/model.safetensors"))


@pytest.mark.parametrize("launcher", ["inline", "submitit"])
def test_if_one_of_two_processes_dies_the_other_does_not_wait_for_it(project, prepared, launcher):
    """Inline: two on one node, with two GPUs of a type. Submitit: one on each of two nodes.

    The first is stopped, as if it waited in a collective for the second, which is killed. Both go on in another job,
    and give what one process gives.
    """
    project.import_again()  # so that /proc shows the rank
    if launcher == "inline":
        nodes = set(project.cluster.kinds["big"])
        over_two_gpus(project)
    else:
        nodes = set(project.cluster.kinds["gpu"])
        submitted(project, nodes=2)
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    job = project.job()
    first, second = sorted(
        (pid for node in nodes for pid in project.trainers(node)),
        key=lambda pid: re.search(rb"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())[1],
    )
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    until(lambda: project.job("sft", "all")["state"] == "FAILED", "the other is ended")  # and not after --wait, 300 s
    assert project.wait(head) == 0, project.said()[-5000:]
    again = max(project.jobs(), key=lambda j: int(j["id"]))
    assert [(j["id"], j["state"]) for j in sorted(project.jobs(), key=lambda j: int(j["id"]))] == [(job["id"],
    "FAILED"), (again["id"], "COMPLETED")]  # fmt: skip
    if launcher == "submitit":
        assert f"process 1 of job {job['id']} ended with 137, and so the others were ended" in project.said()
    assert project.ends("sft") == ["killed", "done"]
    goes_on_from(project, step)
    attempt = project.record("sft").attempts[-1]
    assert (attempt["world_size"], attempt["job_id"]) == (2, again["id"])
    first, last = (node.removeprefix("gpu") for node in project.cluster.kinds["gpu"])
    assert again["nodes"] == (project.cluster.kinds["big"][0] if launcher == "inline" else f"gpu[{first}-{last}]")
    assert attempt["variables"]["CUDA_VISIBLE_DEVICES"] == ("0,1" if launcher == "inline" else "0")
    assert again["gres"] == ("gres:gpu:a100:2" if launcher == "inline" else "gres:gpu:1")
    sft_gives_what_one_process_gives(project, prepared)


def test_a_submitted_job_is_found_again_by_the_next_head(project, expected):
    submitted(project)
    head = project.start("--until", "sft")
    project.wait_for_saves()
    job = project.job()
    kill_all(head)
    ends_well(project, project.start("--until", "sft"), expected, attempts=1)
    assert [j["id"] for j in project.jobs()] == [job["id"]]
    assert f"sft: job {job['id']} is there already; waiting for it" in project.said()


def test_a_submitted_job_is_requeued_under_its_id(project, expected):
    project.edit_profile("training: gpu", "training: preempt")
    submitted(project)
    head = project.start("--until", "sft", TUNETRAIL_TIME_LIMIT="0.1")
    step = project.wait_for_saves()
    job = project.job()
    project.preempt()
    ends_well(project, head, expected)
    goes_on_from(project, step)
    assert [j["id"] for j in project.jobs()] == [job["id"]]
    assert int(project.jobs()[0]["restarts"]) == len(project.ends("sft")) - 1 >= 2
    assert any(end.startswith("stopped by time limit") for end in project.ends("sft"))


def test_ctrl_c_cancels_the_job_which_saves(project):
    submitted(project)
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    interrupt(head)
    until(lambda: [j["state"] for j in project.jobs()] == ["CANCELLED"], "the job is cancelled")
    assert int(project.saved()[-1].name.rpartition("-")[2]) >= step


def test_a_job_that_preemption_cancelled_is_submitted_again(project, expected):
    """In a partition whose preempted jobs are cancelled. Snakemake would wait forever for an inline job: see the
    doctor."""
    project.edit_profile("training: gpu", "training: spot")
    submitted(project)
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    project.preempt()
    ends_well(project, head, expected, attempts=2)
    goes_on_from(project, step)
    assert sorted(j["state"] for j in project.jobs()) == ["COMPLETED", "PREEMPTED"]


def test_without_slurm_submitit_runs_locally(project, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith(("srun", "sbatch", "squeue", "scontrol", "sinfo", "sacct")):
            (tools / program.name).symlink_to(program)
    profile = project.folder / "profiles/local/config.yaml"
    profile.write_text(
        profile.read_text().replace("default-resources:\n", "default-resources:\n  launcher: submitit\n")
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--profile",
        "profiles/local",
        "--configfile",
        CONFIG,
        "--until",
        "sft",
    ]
    reply = subprocess.run(
        command, cwd=project.folder, env=environment | {"PATH": f"{Path(sys.executable).parent}:{tools}"},
        capture_output=True, text=True, check=False
    )  # fmt: skip
    assert reply.returncode == 0, reply.stderr[-3000:]
    assert "sft: submitted as job" in reply.stderr
    assert verify(project.artifact("sft") / "manifest.json")
    assert project.ends("sft") == ["done"]
