"""Where jobs land, and stages that are jobs of their own through submitit, on a real cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunetrail.contract.artifact import verify

from .cluster import until
from .conftest import CONFIG, OnSlurm
from .test_failures import ends_well, goes_on_from

# The profile's own partition of each rule, as its first lines name them.
PARTITIONS = {
    "base": "cpu", "data": "cpu", "comparisons": "cpu", "best_of_n": "cpu", "head_to_head": "cpu", "report": "cpu",
    "retention": "gpu", "sft": "gpu",
    "completions": "gpu", "reward": "gpu", "dpo": "gpu", "evaluation": "gpu", "ppo": "gpu-large",
}  # fmt: skip


def copy_of(whole, folder: Path) -> OnSlurm:
    """The finished run in another folder, to lose and make again what a test wants."""
    shutil.copytree(whole.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("head.log"))
    return OnSlurm(whole.cluster, folder)


def test_every_job_lands_where_the_profile_says(whole):
    """By Slurm's own records, and by those of the artifacts."""
    seen = {}
    for job in whole.jobs(""):
        rule = job["comment"].removeprefix("rule_").partition("_wildcards")[0]
        seen[rule] = job["partition"]
        assert job["state"] == "COMPLETED"
        assert job["requeue"] == "1"
        assert job["gres"] == ("N/A" if PARTITIONS[rule] == "cpu" else "gres:gpu:1")
    assert seen == PARTITIONS
    for name, partition in (("base", "cpu"), ("sft", "gpu"), ("reward", "gpu"), ("policies/ppo", "gpu-large")):
        [attempt] = whole.record(name).attempts
        assert attempt["partition"] == partition
        assert attempt["host"] in whole.cluster.kinds["big" if partition == "gpu-large" else partition]
        assert attempt["nodes"] == attempt["host"]
        visible = attempt["variables"].get("CUDA_VISIBLE_DEVICES")
        assert (visible is not None and visible.isdigit()) == (partition != "cpu")
        assert attempt["job_id"] in {job["id"] for job in whole.jobs("")}
        assert verify(whole.artifact(name) / "manifest.json")


def test_a_branch_that_fails_for_good_stops_no_other(whole, tmp_path):
    """What failed, where its log is and how to run it again are said at the end."""
    run = copy_of(whole, tmp_path / "copy")
    run.configure(policies__dpo={"method": "dpo", "batch_size": 8, "learning_rate": 1e30},
    **{"policies__best-of-2": {"method": "best_of_n", "n": 3}})  # fmt: skip
    assert run.wait(run.start("--retries", "0")) != 0
    assert json.loads((run.artifact("policies/best-of-2") / "policy.json").read_text())["n"] == 3
    assert verify(run.artifact("evaluation/best-of-2") / "manifest.json")
    summary = run.said()[run.said().rindex("policies/dpo failed") :]
    assert "the loss became infinite or NaN; lower dpo.learning_rate" in summary
    assert "log    logs/tiny/policies/dpo.log" in summary
    assert "again  snakemake --profile slurm" in summary
    assert "results/tiny/policies/dpo/manifest.json" in summary


# ----------------------------------------------------------------------------- submitit


def interrupt(head: subprocess.Popen) -> None:
    """Ctrl-C: a terminal sends it to the head and all that it has started."""
    os.killpg(head.pid, signal.SIGINT)
    head.wait(60)


def kill_all(head: subprocess.Popen) -> None:
    """The head and its launchers, as a login node that is switched off does."""
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def submitted(project, **more: object) -> None:
    project.resources("sft", launcher="submitit", **more)


@pytest.mark.parametrize(("rule", "artifact", "weights"), [
    ("reward", "reward", "model/model.safetensors"),
    ("dpo", "policies/dpo", "model/model.safetensors"),
    ("ppo", "policies/ppo", "model/model.safetensors"),
])  # fmt: skip
def test_over_two_nodes_it_gives_what_one_process_gives(whole, tmp_path, rule, artifact, weights):
    """For SFT see the test below."""
    run = copy_of(whole, tmp_path / "copy")
    shutil.rmtree(run.artifact(artifact))
    shutil.rmtree(run.folder / "state/tiny" / artifact)
    run.edit_profile("slurm_partition: ?large", "slurm_partition: ?gpu")  # of large nodes there is one
    run.resources(rule, launcher="submitit", nodes=2)
    run.run("--forcerun", rule, "--until", rule)
    job = max(run.jobs(f"{rule}-"), key=lambda j: int(j["id"]))
    assert (job["state"], job["partition"], job["nodes"]) == ("COMPLETED", "gpu", "gpu[1-2]")
    [attempt] = run.record(artifact).attempts
    assert (attempt["world_size"], attempt["nodes"], attempt["job_id"]) == (2, "gpu[1-2]", job["id"])
    assert attempt["variables"]["CUDA_VISIBLE_DEVICES"].isdigit()
    gives_what_one_process_gives(
        whole.artifact(artifact) / weights,
        run.artifact(artifact) / weights,
        whole.artifact("sft") / weights,
    )


def gives_what_one_process_gives(one: Path, two: Path, before: Path) -> None:
    """Up to a tenth of how far training moved the weights: the sums of floating-point numbers are in another order, and
    Adam's first steps on a gradient of nearly 0 take its sign for it."""
    ours, theirs, start = map(load_file, (one, two, before))
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in ours.keys() & start.keys()])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert moved.norm() > 0
    assert apart.norm() < 0.1 * moved.norm()


def over_two_gpus(project: OnSlurm) -> None:
    """SFT as a step of two processes on a node, whose GPUs have a type."""
    project.edit_profile("training: gpu", "training: gpu-large")
    project.edit_profile('type: ""', 'type: ":a100"')
    gres = '  sft:\n    slurm_partition: ?training\n    gres: ?f"gpu{type}:'
    project.edit_profile(f"{gres}1", f"{gres}2")


def test_two_inline_processes_leave_together_and_are_requeued_under_their_id(project, prepared):
    """Both are stopped until the time is over, which is long enough for an attempt that is not."""
    over_two_gpus(project)
    head = project.start("--until", "sft", TUNETRAIL_TIME_LIMIT="0.5")
    project.wait_for_saves()
    both = project.trainers(*project.cluster.kinds["big"])
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
def test_where_one_of_two_processes_dies_the_other_does_not_wait_for_it(project, prepared, launcher):
    """Inline: two on one node, with two GPUs of a type. Submitit: one on each of two nodes.

    The first is stopped, as if it waited in a collective for the second, which is killed. Both go on in another job,
    and give what one process gives.
    """
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


def test_a_job_that_is_preempted_for_good_is_submitted_again(project, expected):
    """Where a partition's preempted jobs are cancelled. An inline one Snakemake would wait for: see the doctor."""
    project.edit_profile("training: gpu", "training: spot")
    submitted(project)
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    project.preempt()
    ends_well(project, head, expected, attempts=2)
    goes_on_from(project, step)
    assert sorted(j["state"] for j in project.jobs()) == ["COMPLETED", "PREEMPTED"]


# ----------------------------------------------------------------------------- arrays


@pytest.fixture
def sampling(whole, tmp_path) -> OnSlurm:
    """A finished run whose completions, two shards, are lost. They are to be made again by one array."""
    run = copy_of(whole, tmp_path / "copy")
    shutil.rmtree(run.artifact("completions"))
    shutil.rmtree(run.folder / "state/tiny/completions")
    run.resources("completions", launcher="submitit", array=1)
    return run


SHARDS = ("0-of-2", "1-of-2")


def elements(run: OnSlurm, stage: str = "completions", states: str = "all") -> list[dict[str, str]]:
    """The jobs of the stage's newest array in this folder."""
    jobs = run.jobs(stage, states)
    newest = max((j["array"] for j in jobs), key=int, default="")
    return [j for j in jobs if j["array"] == newest]


def sample(run: OnSlurm) -> subprocess.Popen:
    """Starts a head, and waits until both elements run."""
    head = run.start("--until", "completions", "--forcerun", "completions")
    until(lambda: len(elements(run, states="RUNNING")) == 2, "both run")
    return head


def have_the_same_bytes(run: OnSlurm, whole: OnSlurm) -> None:
    """Both shards, each by an element of the newest array."""
    ids = {run.record(f"completions/{shard}").attempts[-1]["job_id"] for shard in SHARDS}
    assert ids == {j["id"] for j in elements(run)}
    for shard in SHARDS:
        assert run.manifest(f"completions/{shard}") == whole.manifest(f"completions/{shard}")
    assert not run.jobs("", "PENDING,RUNNING,SUSPENDED")


def test_ctrl_c_cancels_all_of_an_array_and_a_killed_head_finds_all_of_it_again(sampling, whole):
    interrupt(sample(sampling))
    until(lambda: [j["state"] for j in elements(sampling)] == ["CANCELLED"] * 2, "both are cancelled")
    head = sample(sampling)

    def both() -> list[int] | None:
        pids = [pid for node in sampling.cluster.kinds["gpu"] for pid in sampling.trainers(node, "completions")]
        return pids if len(pids) == 2 else None

    trainers = until(both, "both work")
    for trainer in trainers:
        os.kill(trainer, signal.SIGSTOP)
    there = elements(sampling)
    kill_all(head)
    head = sampling.start("--until", "completions", "--forcerun", "completions")
    until(lambda: sampling.said().count("is there already; waiting for it") == 2, "both are found")
    for trainer in trainers:
        os.kill(trainer, signal.SIGCONT)
    assert sampling.wait(head) == 0, sampling.said()[-5000:]
    assert {j["id"] for j in elements(sampling)} == {j["id"] for j in there}
    assert len(sampling.jobs("completions")) == 4  # two of them cancelled
    have_the_same_bytes(sampling, whole)


def test_elements_of_an_array_are_requeued_each_under_its_id(sampling, whole):
    """Preempted, and then at their time limit after each batch."""
    sampling.edit_profile("training: gpu", "training: preempt")
    sampling.edit_profile("    array: 1\n    slurm_partition: ?gpu", "    array: 1\n    slurm_partition: ?training")
    sampling.environment |= {"TUNETRAIL_TIME_LIMIT": "0"}
    head = sample(sampling)
    there = elements(sampling)
    sampling.preempt()
    assert sampling.wait(head) == 0, sampling.said()[-5000:]
    assert {j["id"] for j in sampling.jobs("completions")} == {j["id"] for j in there}
    assert all(int(j["restarts"]) >= 2 and j["state"] == "COMPLETED" for j in elements(sampling))
    for shard in SHARDS:
        assert "stopped by time limit after 14 of 14 prompts" in str(sampling.ends(f"completions/{shard}"))
    have_the_same_bytes(sampling, whole)


def test_evaluations_go_out_as_one_array_and_one_that_fails_stops_no_other(whole, tmp_path):
    run = copy_of(whole, tmp_path / "copy")
    subjects = ("base", "dpo", "best-of-2")
    for subject in subjects:
        shutil.rmtree(run.artifact(f"evaluation/{subject}"))
    weights = run.artifact("policies/dpo") / "model/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run.resources("evaluation", launcher="submitit", array=1)
    lost = [f"results/tiny/evaluation/{subject}/manifest.json" for subject in subjects]
    assert run.wait(run.start("--retries", "0", "--", *lost)) != 0
    assert f"{weights.relative_to(run.folder)}: differs from its manifest" in run.said()
    assert "evaluation/dpo failed" in run.said()
    array = elements(run, "evaluation")
    assert sorted(j["state"] for j in array) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert len(run.jobs("evaluation")) == 3
    for subject in ("base", "best-of-2"):
        assert run.manifest(f"evaluation/{subject}") == whole.manifest(f"evaluation/{subject}")
    weights.write_bytes(content)
    run.run("--", *lost)
    assert len(run.jobs("evaluation")) == 4  # only what had failed
    assert run.manifest("evaluation/dpo") == whole.manifest("evaluation/dpo")


def test_without_slurm_submitit_runs_it_here(project, tmp_path):
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
