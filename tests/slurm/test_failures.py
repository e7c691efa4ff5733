"""What clusters do to a training job, each on a real one: it always ends with the bytes of a run that was left alone.

The stage is SFT of the tiny model, which saves after every step here.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tunetrail.contract.lease import holder
from tunetrail.files import read_jsonl
from tunetrail.launch.time_limit import parse_time_left

from .cluster import until


def attempts_follow_each_other(project) -> None:
    """No attempt began before the one before it had ended, by the times that the attempts themselves wrote."""
    attempts = project.record("sft").attempts
    for a, b in itertools.pairwise(attempts):
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
    project.preempt()
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


def test_slurms_own_time_limit(project, expected):
    """One minute, for most of which the trainer is stopped: it leaves before its end, by what squeue says is left."""
    project.resources("sft", runtime=1)
    project.edit_profile("    runtime: 720\n  completions", "  completions")
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    job = project.job()
    [trainer] = project.trainers(job["nodes"])
    os.kill(trainer, signal.SIGSTOP)
    until(lambda: (parse_time_left(project.cluster.command("squeue", "-h", "-j", job["id"], "-o",
        "%L").strip()) or 0) < 8 / 60, "nearly over")  # fmt: skip
    os.kill(trainer, signal.SIGCONT)
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0].startswith("stopped by time limit at step ")
    goes_on_from(project, step)
    [job] = project.jobs()
    assert (job["state"], job["restarts"], job["minutes"]) == ("COMPLETED", "1", "1:00")


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


def logs(project) -> str:
    return "".join(p.read_text() for p in (project.folder / "logs/tiny").glob("sft*.log"))


def test_a_node_cut_off_whose_trainer_is_silent_loses_its_lease(project, expected):
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


def test_a_drained_node_finishes_what_it_has(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    job = project.job()
    project.cluster.command("scontrol", "update", f"NodeName={job['nodes']}", "State=DRAIN", "Reason=test")
    ends_well(project, head, expected, attempts=1)
    assert [j["id"] for j in project.jobs()] == [job["id"]]
    assert project.cluster.node_states()[job["nodes"]] == "drain"


def test_the_controller_restarted(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    project.cluster.power_off("slurmctld")
    time.sleep(3)
    project.cluster.start_controller()
    ends_well(project, head, expected, attempts=1)


def kill(head: subprocess.Popen) -> None:
    """The head alone, as a login node that is switched off does: its jobs go on."""
    head.kill()
    head.wait()


def test_the_head_killed_and_started_again(project, expected):
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
    if len(ends) > 1:  # the first was still at work, and made way
        assert ends[0].startswith("stopped for another attempt of this stage")
        goes_on_from(project, step)
    assert {j["id"] for j in project.jobs()} >= {first["id"]}


def test_what_a_job_finished_after_its_head_was_killed_is_not_made_again(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    kill(head)
    until(lambda: not project.jobs("sft", "RUNNING,COMPLETING"), "the job ends")
    assert project.manifest("sft") == expected
    ends_well(project, project.start("--until", "sft"), expected, attempts=1)


def test_a_trainer_killed_while_it_saves(project, expected):
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    [trainer] = project.trainers(project.job()["nodes"])

    def saving() -> bool:
        newest = max((project.folder / "state/tiny/sft").glob("*/checkpoint-*"), key=lambda p: int(p.name[11:]))
        return not (newest / "complete.json").exists()

    def stopped_while_saving() -> bool:
        os.kill(trainer, signal.SIGSTOP)
        if saving():
            return True
        os.kill(trainer, signal.SIGCONT)
        time.sleep(0.01)
        return False

    until(stopped_while_saving, "it saves")
    os.kill(trainer, signal.SIGKILL)
    ends_well(project, head, expected, attempts=2)
    assert project.ends("sft")[0] == "killed"
    goes_on_from(project, step)


def test_a_stage_that_never_gets_as_far_as_a_save_is_tried_three_times_in_all(project):
    """`retries: 2`, and not more: neither the Snakemake inside the job nor Slurm adds its own."""
    killed: list[int] = []
    head = project.start("--until", "sft", TUNETRAIL_CHECKPOINT_MINUTES="60")
    while head.poll() is None:
        files = list((project.folder / "state/tiny/sft").glob("*/attempts.jsonl"))
        if files and len(read_jsonl(files[0])) > len(killed):
            [trainer] = [pid for node in project.cluster.kinds["gpu"] for pid in project.trainers(node)]
            os.kill(trainer, signal.SIGKILL)
            killed.append(trainer)
        time.sleep(0.1)
    assert head.returncode != 0
    assert len(read_jsonl(files[0])) == len(killed) == 3
    assert [j["state"] for j in project.jobs()] == ["FAILED"] * 3


def test_out_of_memory_it_gets_more(project, expected):
    project.edit_profile('mem_mb: ?f"min(attempt * 32000, {memory})"', "mem_mb: attempt * attempt * 330")
    head = project.start("--until", "sft")
    ends_well(project, head, expected)
    memory = [int(re.sub(r"\D", "", j["memory"])) for j in sorted(project.jobs(), key=lambda j: int(j["id"]))]
    assert len(memory) in (2, 3)
    assert memory == [330 * n * n for n in range(1, len(memory) + 1)]


def test_a_full_disk_keeps_the_save_before_and_room_lets_it_go_on(project, expected):
    small = project.cluster.folder / "small"
    subprocess.run(["mount", "-o", "remount,size=1300k", str(small)], check=True)
    state = project.folder / "state"
    shutil.copytree(state, small, dirs_exist_ok=True)
    shutil.rmtree(state)
    state.symlink_to(small)
    head = project.start("--until", "sft")
    assert project.wait(head) != 0
    assert re.search(r"sft: error: .*: No space left on device", project.said() + logs(project))
    assert "Traceback" not in logs(project)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True)
    saved = project.saved()
    assert saved
    ends_well(project, project.start("--until", "sft"), expected)
    goes_on_from(project, int(saved[-1].name.rpartition("-")[2]))


def test_a_corrupted_checkpoint_is_left_out_for_the_one_before(project, expected):
    head = project.start("--until", "sft")
    project.wait_for_saves()
    [trainer] = project.trainers(project.job()["nodes"])
    os.kill(trainer, signal.SIGSTOP)
    *_, before, last = project.saved()
    weights = last / "optimizer.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.kill(trainer, signal.SIGKILL)
    ends_well(project, head, expected, attempts=2)
    assert project.record("sft").attempts[1]["state_in"]["name"] == before.name


def test_two_heads_at_once(project, expected):
    first = project.start("--until", "sft")
    until(lambda: holder(project.folder / "state/tiny/head"), "the first has begun")
    second = project.start("--until", "sft")
    assert project.wait(second) == 75
    assert re.search(
        r"^another snakemake works on this run: state/tiny/head: in use by process", project.said(), re.MULTILINE
    )
    ends_well(project, first, expected, attempts=1)
    assert len(project.jobs()) == 1
