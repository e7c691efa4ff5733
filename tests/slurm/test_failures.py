"""What clusters do to a training job, each on a real one: it always ends with the bytes of a run that was left alone.

The stage is SFT of the tiny model, which saves after every step here.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tunetrail.contract import read_jsonl

from .cluster import until


@pytest.fixture(autouse=True)
def nothing_left(request, cluster):
    """After each test: all nodes are there, and no job is."""
    yield
    for job in cluster.jobs("PENDING,RUNNING,SUSPENDED,COMPLETING"):
        cluster.command("scancel", job["id"], check=False)
    for node in cluster.processes.keys() ^ {"slurmctld", "cpu1", "cpu2", "gpu1", "gpu2", "big1"}:
        cluster.start_node(node)
    cluster.command("scontrol", "update", "NodeName=ALL", "State=RESUME", check=False)
    cluster.wait_for_nodes()


def attempts_follow_each_other(project) -> None:
    """No attempt began before the one before it had ended, by the times that the attempts themselves wrote."""
    attempts = project.record("sft").attempts
    for a, b in zip(attempts, attempts[1:], strict=False):
        assert a["end"] is None or a["end"] <= b["start"]


def goes_on_from(project, step: int) -> None:
    """The last attempt began from the state saved after this step, or a later one."""
    state = project.record("sft").attempts[-1]["state_in"]
    assert int(state["name"].rpartition("-")[2]) >= step


def ends_well(project, head: subprocess.Popen, expected: bytes, attempts: int | None = None) -> None:
    assert project.wait(head) == 0, project.said()[-5000:]
    assert project.manifest("sft") == expected
    attempts_follow_each_other(project)
    if attempts:
        assert len(project.record("sft").attempts) == attempts
    assert not project.jobs("", "PENDING,RUNNING,SUSPENDED")


def test_scancel_reaches_the_trainer_and_the_job_is_submitted_again(project, expected):
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    job = project.job()
    project.cluster.command("scancel", job["id"])
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0].startswith("stopped by SIGTERM at step ")
    goes_on_from(project, step)
    assert sorted(j["state"] for j in project.jobs()) == ["CANCELLED", "COMPLETED"], project.cluster.jobs()


def test_preempted_by_a_higher_partition_it_is_requeued_under_its_id(project, expected):
    project.edit_profile("training: gpu", "training: preempt")
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    job = project.job()
    assert job["partition"] == "preempt"
    urgent = project.cluster.command("sbatch", "--parsable", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3").strip()  # fmt: skip
    until(lambda: project.jobs("sft", "PENDING"), "it is back in the queue")
    until(
        lambda: any(j["id"] == urgent and j["state"] == "COMPLETED" for j in project.cluster.jobs()),
        "the other is done",
    )
    ends_well(project, head, expected, attempts=2)
    goes_on_from(project, step)
    assert [(j["id"], j["restarts"]) for j in project.jobs()] == [(job["id"], "1")]


def test_the_time_limit_may_come_several_times(project, expected):
    head = project.start("--until", "sft", TUNETRAIL_TIME_LIMIT="0.08")
    ends_well(project, head, expected)
    ends = project.ends("sft")
    assert len(ends) >= 3
    assert all(end.startswith("stopped by time limit at step ") for end in ends[:-1])
    assert [int(j["restarts"]) for j in project.jobs()] == [len(ends) - 1]  # one job, and no retry of Snakemake's


def test_a_node_without_power(project, expected):
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    job = project.job()
    project.cluster.power_off(job["nodes"])
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0] == "killed"
    goes_on_from(project, step)
    assert project.record("sft").attempts[1]["host"] != job["nodes"]


def test_a_node_cut_off_whose_trainer_works_on_makes_way(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    job = project.job()
    [old] = project.trainers(job["nodes"])
    os.kill(old, signal.SIGSTOP)  # or it would be done before Slurm notices
    project.cluster.cut_off(job["nodes"])
    until(lambda: project.cluster.start_now() or project.jobs("sft", "PENDING,RUNNING") and project.job()["nodes"] != job["nodes"], "it runs elsewhere", 120)  # fmt: skip
    until(lambda: "was asked to save and leave" in project.said() + logs(project), "the new one asks")
    before = project.saved()[-1].name
    os.kill(old, signal.SIGCONT)
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0].startswith("stopped for another attempt of this stage (process ")
    assert f"job {job['id']}" in project.ends("sft")[0]
    goes_on_from(project, int(before.rpartition("-")[2]))


def logs(project) -> str:
    return "".join(p.read_text() for p in (project.folder / "logs/tiny").glob("sft*.log"))


def test_a_node_cut_off_whose_trainer_is_silent_loses_its_lease(project, expected):
    head = project.start("--until", "sft", TUNETRAIL_LEASE_SECONDS="6")
    step = project.wait_for_saves()
    job = project.job()
    [old] = project.trainers(job["nodes"])
    os.kill(old, signal.SIGSTOP)
    project.cluster.cut_off(job["nodes"])
    assert project.wait(head) == 0, project.said()[-5000:]
    assert project.manifest("sft") == expected
    goes_on_from(project, step)
    os.kill(old, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{old}").exists() or ") Z" in Path(f"/proc/{old}/stat").read_text(), "the old trainer ends")  # fmt: skip
    assert project.manifest("sft") == expected
    assert project.run("--until", "sft", "--dry-run").count("Nothing to be done") == 1
