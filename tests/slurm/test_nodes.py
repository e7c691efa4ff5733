"""Nodes, the controller and heads fail during a training job: it ends with the bytes of an undisturbed run."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tunetrail.contract.lease import holder

from .checks import ends_well, goes_on_from, logs
from .cluster import until


def test_a_node_without_power(project, expected):
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    job = project.job()
    project.cluster.power_off(job["nodes"])
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0] == "killed"
    goes_on_from(project, step)
    assert project.record("sft").attempts[1]["host"] != job["nodes"]


def test_the_trainer_on_a_cut_off_node_gives_way(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    job = project.job()
    [old] = project.trainers(job["nodes"])
    os.kill(old, signal.SIGSTOP)  # otherwise it would finish before Slurm notices
    project.cluster.cut_off(job["nodes"])
    project.cluster.declare_down(job["nodes"])
    until(lambda: runs_elsewhere(project, job), "it runs elsewhere")
    until(lambda: "was asked to save and leave" in project.said() + logs(project), "the new one asks")
    before = project.saved()[-1].name
    os.kill(old, signal.SIGCONT)
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0].startswith("stopped for another attempt of this stage (process ")
    assert f"job {job['id']}" in project.ends("sft")[0]
    goes_on_from(project, int(before.rpartition("-")[2]))


def runs_elsewhere(project, job: dict[str, str]) -> bool:
    project.cluster.start_now()
    return any(j["nodes"] not in ("", job["nodes"]) for j in project.jobs("sft", "RUNNING"))


def test_a_silent_trainer_on_a_cut_off_node_loses_its_lease(project, expected):
    head = project.start("--until", "sft", TUNETRAIL_LEASE_SECONDS="6")
    step = project.wait_for_saves()
    job = project.job()
    [old] = project.trainers(job["nodes"])
    os.kill(old, signal.SIGSTOP)
    project.cluster.cut_off(job["nodes"])
    project.cluster.declare_down(job["nodes"])
    until(lambda: runs_elsewhere(project, job), "it runs elsewhere")
    last = int(project.saved()[-1].name.rpartition("-")[2])
    until(lambda: project.saved() and int(project.saved()[-1].name.rpartition("-")[2]) > last + 5, "the new one trains")
    os.kill(old, signal.SIGCONT)  # in the middle of the other's training
    until(lambda: not Path(f"/proc/{old}").exists() or ") Z" in Path(f"/proc/{old}/stat").read_text(),
        "the old trainer ends")  # fmt: skip
    ends_well(project, head, expected, attempts=2)
    goes_on_from(project, step)
    assert not list((project.folder / "state/tiny/sft").glob("*/attempts.jsonl"))  # the old one wrote nothing more


def test_a_drained_node_finishes_its_jobs(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    job = project.job()
    project.cluster.command("scontrol", "update", f"NodeName={job['nodes']}", "State=DRAIN", "Reason=test")
    ends_well(project, head, expected, attempts=1)
    assert [j["id"] for j in project.jobs()] == [job["id"]]
    assert project.cluster.node_states()[job["nodes"]] == "drain"


def test_a_restart_of_the_controller(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    # It saves its state every few seconds, and forgets jobs that it had not saved.
    state = project.cluster.folder / "state/job_state"
    until(lambda: bytes(project.folder) in state.read_bytes(), "the controller has saved the job")
    project.cluster.power_off("slurmctld")
    time.sleep(3)
    project.cluster.start_controller()
    ends_well(project, head, expected, attempts=1)


def kill(head: subprocess.Popen) -> None:
    """Kills only the head, like a login node that is switched off: its jobs continue."""
    head.kill()
    head.wait()


def test_the_head_is_killed_and_started_again(project, expected):
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    first = project.job()
    [trainer] = project.trainers(first["nodes"])
    os.kill(trainer, signal.SIGSTOP)
    kill(head)
    sft = project.status()["sft"]
    assert (sft["state"], sft["slurm_job"]) == ("running", first["id"])
    assert re.match(r"\d+/\d+ steps, .* left|since .*, no progress reported yet", sft["detail"])
    os.kill(trainer, signal.SIGCONT)
    ends_well(project, project.start("--until", "sft"), expected)
    assert "unlock" not in project.said()
    ends = project.ends("sft")
    if len(ends) > 1:  # the first was still working, and gave way
        assert ends[0].startswith("stopped for another attempt of this stage")
        goes_on_from(project, step)
    assert {j["id"] for j in project.jobs()} >= {first["id"]}


def test_a_job_that_finished_after_its_head_was_killed_is_not_rerun(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    kill(head)
    until(lambda: not project.jobs("sft", "RUNNING,COMPLETING"), "the job ends")
    assert project.manifest("sft") == expected
    ends_well(project, project.start("--until", "sft"), expected, attempts=1)


def test_two_heads_at_once(project, expected):
    first = project.start("--until", "sft")
    until(lambda: holder(project.folder / "state/tiny/head"), "the first has begun")
    second = project.start("--until", "sft")
    assert project.wait(second) == 75
    assert re.search(
        r"^another snakemake is working on this run: state/tiny/head: in use by process", project.said(), re.MULTILINE
    )
    ends_well(project, first, expected, attempts=1)
    assert len(project.jobs()) == 1
