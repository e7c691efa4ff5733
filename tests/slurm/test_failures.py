"""Everything that clusters do to a training job, on a real one: it always ends with the bytes of an undisturbed run.

The stage is SFT of the tiny model, which saves after every step here.
"""

import os
import re
import shutil
import signal
import subprocess
import time

from tunetrail.files import read_jsonl
from tunetrail.launch.time_limit import parse_time_left

from .checks import ends_well, goes_on_from, logs
from .cluster import until


def test_scancel_reaches_the_trainer_and_the_job_is_submitted_again(project, expected):
    project.import_again()
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


def test_the_time_limit_may_be_reached_several_times(project, expected):
    head = project.start("--until", "sft", TUNETRAIL_TIME_LIMIT="0.08")
    ends_well(project, head, expected)
    ends = project.ends("sft")
    assert len(ends) >= 3
    assert all(end.startswith("stopped by time limit at step ") for end in ends[:-1])
    assert [int(j["restarts"]) for j in project.jobs()] == [len(ends) - 1]  # one job, and no retry of Snakemake's


def test_slurms_own_time_limit(project, expected):
    """One minute, for most of which the trainer is stopped: it leaves in time, by what squeue says is left."""
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
    ends_well(project, head, expected)
    *stopped, last = project.ends("sft")  # more than two attempts if the machine is slow
    assert stopped
    assert all(end.startswith("stopped by time limit at step ") for end in stopped)
    assert last == "done"
    goes_on_from(project, step)
    [job] = project.jobs()
    assert (job["state"], job["restarts"], job["minutes"]) == ("COMPLETED", str(len(stopped)), "1:00")


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


def test_a_stage_that_never_saves_is_tried_three_times_in_total(project):
    """`retries: 2` and no more: neither the Snakemake inside the job nor Slurm adds its own retries."""
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


def test_after_running_out_of_memory_it_gets_more(project, expected):
    project.import_again()
    project.edit_profile('mem_mb: ?f"min(attempt * 32000, {memory})"', "mem_mb: attempt * attempt * 330")
    head = project.start("--until", "sft")
    ends_well(project, head, expected)
    memory = [int(re.sub(r"\D", "", j["memory"])) for j in sorted(project.jobs(), key=lambda j: int(j["id"]))]
    assert len(memory) in (2, 3)
    assert memory == [330 * n * n for n in range(1, len(memory) + 1)]


def test_a_full_disk_keeps_the_previous_save_and_the_stage_continues_with_free_space(project, expected):
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


def test_a_corrupted_checkpoint_is_skipped_for_the_previous_one(project, expected):
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
