"""tunetrail doctor on a real Slurm: no findings if all is well, and every problem by name."""

import subprocess

import pytest

from .conftest import CONFIG, OnSlurm, on_slurm, python_of


@pytest.fixture
def site(cluster, tmp_path) -> OnSlurm:
    return on_slurm(cluster, tmp_path)


def doctor(project: OnSlurm, *options: str) -> tuple[int, list[str]]:
    """(exit code, the lines that are not "ok")."""
    variables = project.cluster.environment
    command = [python_of(variables), "-m", "tunetrail", "doctor", "--profile", "slurm", "--configfile", CONFIG]
    reply = subprocess.run(
        [*command, *options], cwd=project.folder, env=variables, capture_output=True, text=True, check=False
    )
    assert not reply.stderr
    return reply.returncode, [line for line in reply.stdout.splitlines() if not line.startswith("ok ")]


def test_the_profile_fits_the_cluster(site):
    assert doctor(site, "--no-jobs") == (0, [])


def test_nodes_share_the_folder_and_the_software_and_have_no_real_gpus(site):
    code, lines = doctor(site)
    assert code == 1
    assert [line.partition(":")[0] for line in lines] == ["FINDING  node of gpu", "FINDING  node of gpu-large"]
    assert all("sees no GPU on" in line and "although Slurm gave 0" in line for line in lines)
    assert not list(site.folder.glob(".doctor-*"))


def test_a_profile_that_requests_what_the_cluster_lacks(site):
    site.edit_profile("large: gpu-large", "large: nowhere")
    site.edit_profile('mem_mb: ?f"min(attempt * 4000, {memory})"', "mem_mb: attempt * 140000")
    code, lines = doctor(site, "--no-jobs")
    assert code == 1
    assert lines == [
        "FINDING  partition nowhere: there is none (ppo go there); name one of cpu, gpu, gpu-large, preempt, spot at "
        "the top of the profile",
        "FINDING  rule best_of_n: asks for 140000 MB per node, those of cpu have at most 128000; lower mem_mb in "
        "set-resources: best_of_n of the profile, or name another partition",
    ]


def test_a_partition_whose_preempted_jobs_are_cancelled(site):
    site.edit_profile("training: gpu", "training: spot")
    code, lines = doctor(site, "--no-jobs")
    assert code == 1
    [line] = lines
    assert line.startswith("FINDING  partition spot: jobs of gpu cancel those of it (PreemptMode=CANCEL), and "
                           "snakemake would wait for them forever (")  # fmt: skip
    assert line.endswith("give these rules `launcher: submitit`, whose jobs are submitted again, or name a partition "
                         "that requeues")  # fmt: skip
    site.resources("sft", launcher="submitit")
    [line] = doctor(site, "--no-jobs")[1]
    rules = line.partition(" go there)")[0].rpartition("(")[2]
    assert set(rules.split(", ")) == {"dpo", "reward"}
