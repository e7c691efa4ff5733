"""Where jobs land, and stages that are jobs of their own through submitit, on a real cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunetrail.contract import verify

from .cluster import until
from .conftest import CONFIG, OnSlurm
from .test_failures import ends_well, goes_on_from, kill

# The profile's own partition of each rule, as its first lines name them.
PARTITIONS = {
    "base": "cpu", "data": "cpu", "comparisons": "cpu", "best_of_n": "cpu", "tournament": "cpu", "report": "cpu", "retention": "gpu", "sft": "gpu",
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
        assert attempt["host"] in {"cpu": ("cpu1", "cpu2"), "gpu": ("gpu1", "gpu2"), "gpu-large": ("big1",)}[partition]
        assert attempt["nodes"] == attempt["host"]
        visible = attempt["variables"].get("CUDA_VISIBLE_DEVICES")
        assert (visible is not None and visible.isdigit()) == (partition != "cpu")
        assert attempt["job_id"] in {job["id"] for job in whole.jobs("")}
        assert verify(whole.artifact(name) / "manifest.json")


def test_a_branch_that_fails_for_good_stops_no_other(whole, tmp_path):
    """What failed, where its log is and how to run it again are said at the end."""
    run = copy_of(whole, tmp_path / "copy")
    run.configure(policies__dpo={"method": "dpo", "batch_size": 8, "learning_rate": 1e30}, **{"policies__best-of-2": {"method": "best_of_n", "n": 3}})  # fmt: skip
    assert run.wait(run.start("--retries", "0")) != 0
    assert json.loads((run.artifact("policies/best-of-2") / "policy.json").read_text())["n"] == 3
    assert verify(run.artifact("evaluation/best-of-2") / "manifest.json")
    summary = run.said()[run.said().rindex("policies/dpo failed") :]
    assert "the loss became infinite or NaN; lower dpo.learning_rate" in summary
    assert "log    logs/tiny/policies/dpo.log" in summary
    assert "again  snakemake --profile slurm" in summary
    assert "results/tiny/policies/dpo/manifest.json" in summary


# ----------------------------------------------------------------------------- submitit


def submitted(project, **more: object) -> None:
    project.resources("sft", launcher="submitit", **more)


@pytest.mark.parametrize(("rule", "artifact", "weights"), [
    ("sft", "sft", "model/model.safetensors"),
    ("reward", "reward", "model/model.safetensors"),
    ("dpo", "policies/dpo", "model/model.safetensors"),
    ("ppo", "policies/ppo", "model/model.safetensors"),
])  # fmt: skip
def test_over_two_nodes_it_gives_what_one_process_gives(whole, tmp_path, rule, artifact, weights):
    """Up to a tenth of how far training moved the weights: the sums of floating-point numbers are in another order, and
    Adam's first steps on a gradient of nearly 0 take its sign for it."""
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
    one, two = (load_file(r.artifact(artifact) / weights) for r in (whole, run))
    before = load_file(whole.artifact("base" if rule == "sft" else "sft") / weights)
    moved = torch.cat([(one[name] - before[name]).flatten() for name in one.keys() & before.keys()])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert moved.norm() > 0
    assert apart.norm() < 0.1 * moved.norm()


def test_a_submitted_job_is_found_again_by_the_next_head(project, expected):
    submitted(project)
    head = project.start("--until", "sft")
    project.wait_for_saves()
    job = project.job()
    subprocess.run(["pkill", "-KILL", "-P", str(head.pid)], check=False)
    kill(head)
    ends_well(project, project.start("--until", "sft"), expected, attempts=1)
    assert [j["id"] for j in project.jobs()] == [job["id"]]
    assert f"sft: job {job['id']} is there already; waiting for it" in project.said()


def test_a_submitted_job_is_requeued_under_its_id(project, expected):
    project.edit_profile("training: gpu", "training: preempt")
    submitted(project)
    head = project.start("--until", "sft", TUNETRAIL_TIME_LIMIT="0.1")
    step = project.wait_for_saves()
    job = project.job()
    urgent = project.cluster.command("sbatch", "--parsable", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3").strip()  # fmt: skip
    until(
        lambda: any(j["id"] == urgent and j["state"] == "COMPLETED" for j in project.cluster.jobs()),
        "the other is done",
    )
    ends_well(project, head, expected)
    goes_on_from(project, step)
    assert [j["id"] for j in project.jobs()] == [job["id"]]
    assert int(project.jobs()[0]["restarts"]) == len(project.ends("sft")) - 1 >= 2
    assert any(end.startswith("stopped by time limit") for end in project.ends("sft"))


def test_ctrl_c_cancels_the_job_which_saves(project):
    submitted(project)
    head = project.start("--until", "sft")
    step = project.wait_for_saves()
    head.send_signal(signal.SIGINT)
    for child in subprocess.run(["pgrep", "-f", "tunetrail.launch --stage sft"], capture_output=True, text=True, check=False).stdout.split():  # fmt: skip
        if os.readlink(f"/proc/{child}/cwd") == str(project.folder):
            os.kill(int(child), signal.SIGINT)  # as a terminal does to all
    head.wait(60)
    until(lambda: [j["state"] for j in project.jobs()] == ["CANCELLED"], "the job is cancelled")
    assert int(project.saved()[-1].name.rpartition("-")[2]) >= step


def test_shards_go_out_as_one_array(whole, tmp_path):
    """Of a finished run whose completions are lost: the same bytes, from one job with two tasks."""
    run = copy_of(whole, tmp_path / "copy")
    shutil.rmtree(run.artifact("completions"))
    shutil.rmtree(run.folder / "state/tiny/completions")
    run.resources("completions", launcher="submitit", array=1)
    run.run("--until", "completions", "--forcerun", "completions")
    jobs = run.jobs("completions")
    assert len(jobs) == 2
    assert {run.record(f"completions/{shard}").attempts[0]["job_id"] for shard in ("0-of-2", "1-of-2")} == {
        j["id"] for j in jobs
    }
    assert len({j["name"] for j in jobs}) == 1
    for shard in ("0-of-2", "1-of-2"):
        assert run.manifest(f"completions/{shard}") == whole.manifest(f"completions/{shard}")


def test_without_slurm_submitit_runs_it_here(project, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith(("srun", "sbatch", "squeue", "scontrol", "sinfo", "sacct")):
            (tools / program.name).symlink_to(program)
    profile = project.folder / "profiles/local/config.yaml"
    profile.write_text(
        profile.read_text().replace("  sft: {mem_mb: 5000}", "  sft: {mem_mb: 5000, launcher: submitit}")
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
        command, cwd=project.folder, env=environment | {"PATH": f"{Path(sys.executable).parent}:{tools}"}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert reply.returncode == 0, reply.stderr[-3000:]
    assert "sft: submitted as job" in reply.stderr
    assert verify(project.artifact("sft") / "manifest.json")
    assert project.ends("sft") == ["done"]
