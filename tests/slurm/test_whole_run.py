"""The whole pipeline on a real cluster: where its jobs run, over several nodes, as arrays."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tunetrail.contract.artifact import verify

from .checks import gives_what_one_process_gives, interrupt, kill_all
from .cluster import until
from .conftest import OnSlurm

# The partition of each rule in the profile, as its first lines name them.
PARTITIONS = {
    "base": "cpu", "data": "cpu", "comparisons": "cpu", "best_of_n": "cpu", "head_to_head": "cpu", "report": "cpu",
    "retention": "gpu", "sft": "gpu",
    "completions": "gpu", "reward": "gpu", "dpo": "gpu", "evaluation": "gpu", "ppo": "gpu-large",
}  # fmt: skip


def copy_of(whole, folder: Path) -> OnSlurm:
    """A copy of the finished run, in which a test can delete artifacts and make them again."""
    shutil.copytree(whole.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("head.log"))
    return OnSlurm(whole.cluster, folder)


def test_every_job_runs_where_the_profile_says(whole):
    """According to Slurm's records and those of the artifacts."""
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


def test_a_branch_that_fails_does_not_stop_others(whole, tmp_path):
    """The last lines say what failed, where its log is and how to run it again."""
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


@pytest.mark.parametrize(("rule", "artifact", "weights"), [
    ("reward", "reward", "model/model.safetensors"),
    ("dpo", "policies/dpo", "model/model.safetensors"),
    ("ppo", "policies/ppo", "model/model.safetensors"),
])  # fmt: skip
def test_two_nodes_give_the_same_result_as_one_process(whole, tmp_path, rule, artifact, weights):
    """For SFT see the test below."""
    run = copy_of(whole, tmp_path / "copy")
    shutil.rmtree(run.artifact(artifact))
    shutil.rmtree(run.folder / "state/tiny" / artifact)
    run.edit_profile("slurm_partition: ?large", "slurm_partition: ?gpu")  # there is only one large node
    run.resources(rule, launcher="submitit", nodes=2)
    run.run("--forcerun", rule, "--until", rule)
    job = max(run.jobs(f"{rule}-"), key=lambda j: int(j["id"]))
    first, last = run.cluster.kinds["gpu"]
    nodes = f"gpu[{first.removeprefix('gpu')}-{last.removeprefix('gpu')}]"  # as Slurm writes gpu1,gpu2
    assert (job["state"], job["partition"], job["nodes"]) == ("COMPLETED", "gpu", nodes)
    [attempt] = run.record(artifact).attempts
    assert (attempt["world_size"], attempt["nodes"], attempt["job_id"]) == (2, nodes, job["id"])
    assert attempt["variables"]["CUDA_VISIBLE_DEVICES"].isdigit()
    gives_what_one_process_gives(
        whole.artifact(artifact) / weights,
        run.artifact(artifact) / weights,
        whole.artifact("sft") / weights,
    )


@pytest.fixture
def sampling(whole, tmp_path) -> OnSlurm:
    """A finished run whose completions (two shards) are lost; one array must make them again."""
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
    """Starts a head and waits until both elements run."""
    head = run.start("--until", "completions", "--forcerun", "completions")
    until(lambda: len(elements(run, states="RUNNING")) == 2, "both run")
    return head


def have_the_same_bytes(run: OnSlurm, whole: OnSlurm) -> None:
    """Both shards have the same bytes, and each was made by an element of the newest array."""
    ids = {run.record(f"completions/{shard}").attempts[-1]["job_id"] for shard in SHARDS}
    assert ids == {j["id"] for j in elements(run)}
    for shard in SHARDS:
        assert run.manifest(f"completions/{shard}") == whole.manifest(f"completions/{shard}")
    assert not run.jobs("", "PENDING,RUNNING,SUSPENDED")


def test_ctrl_c_cancels_a_whole_array_and_a_killed_heads_array_is_found_again(sampling, whole):
    sampling.import_again()  # if forked, an element may end before the other is seen
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


def test_each_element_of_an_array_is_requeued_under_its_id(sampling, whole):
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


def test_evaluations_are_one_array_and_a_failure_does_not_stop_the_others(whole, tmp_path):
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
    assert len(run.jobs("evaluation")) == 4  # only the failed one
    assert run.manifest("evaluation/dpo") == whole.manifest("evaluation/dpo")
