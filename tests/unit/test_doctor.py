"""The doctor's findings, each with its fix. Slurm's commands are stand-ins; tests/slurm uses the real ones."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from tunetrail.cli import main
from tunetrail.errors import ConfigError
from tunetrail.monitor import doctor, node_probe, site, site_checks
from tunetrail.monitor.dag import Job
from tunetrail.monitor.doctor import FINDING, SOUND, UNKNOWN, Check

SINFO = """cpu|up|1-00:00:00|64000|16|(null)|idle|2
cpu|up|1-00:00:00|64000|16|(null)|drained|1
gpu|up|12:00:00|128000|32|gpu:a100:4(S:0-1)|mixed|3
large|down|infinite|512000|64|gpu:h100:8|idle|1
broken|up|infinite|512000|64|gpu:h100:8|down*|2
"""
NODES = site.read_sinfo(SINFO)


def wish(rule: str = "sft", **resources) -> site.ResourceRequest:
    given = {"slurm_partition": "gpu", "runtime": 60, "mem_mb": 1000, "tmpdir": "/tmp", "disk_mb": "<TBD>"} | resources
    job = Job(rule, rule, Path("m"), None, None, None, threads=2, resources=given, needed=True)
    (found,) = site.requests([job, job])
    return found


def findings(asked: site.ResourceRequest) -> list[str]:
    found = site_checks.misfits(asked, NODES)
    assert all(check.level == FINDING and check.fix for check in found)
    return [check.text for check in found]


def test_sinfo_is_read():
    gpu = next(n for n in NODES if n.partition == "gpu")
    assert (gpu.up, gpu.minutes, gpu.mem_mb, gpu.cpus, gpu.gpus, gpu.count) == (True, 720, 128000, 32, {"a100": 4}, 3)
    assert next(n for n in NODES if n.partition == "large").minutes == float("inf")


def test_a_request_that_fits_is_no_finding():
    assert findings(wish(gres="gpu:a100:4", cpus_per_gpu=8, mem_mb=128000, runtime=720)) == []
    assert findings(wish(gres="gpu:2")) == []  # of any type


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        ({"runtime": 721}, "asks for 721 minutes, gpu gives at most 720"),
        ({"mem_mb": 128001}, "asks for 128001 MB per node, those of gpu have at most 128000"),
        ({"gres": "gpu:4", "cpus_per_gpu": 9}, "asks for 36 CPUs per node, those of gpu have at most 32"),
        ({"cpus_per_task": 33}, "asks for 33 CPUs per node, those of gpu have at most 32"),
        ({"gres": "gpu:5"}, "asks for 5 GPUs per node, those of gpu have a100:4"),
        ({"gres": "gpu:h100:1"}, "asks for 1 GPUs of type h100 per node, those of gpu have a100:4"),
        ({"gpu": 16, "nodes": 2}, "asks for 8 GPUs per node, those of gpu have a100:4"),
        ({"gres": "gpu:1", "slurm_partition": "cpu"}, "asks for 1 GPUs per node, those of cpu have none"),
    ],
)
def test_a_request_that_no_node_can_serve_is_a_finding(resources, text):
    assert findings(wish(**resources)) == [text]


def test_partitions_that_cannot_be_used():
    names = ("cpu", "nowhere", "large", "broken", "")
    asked = [dataclasses.replace(wish(f"r{n}"), partition=name) for n, name in enumerate(names)]
    found = {check.name: check for check in site_checks.check_partitions(asked, NODES)}
    assert found["partition cpu"] == Check("partition cpu", SOUND, "up, 2 of 3 nodes work (r0)")
    texts = {name: check.text for name, check in found.items() if check.level == FINDING}
    assert texts == {
        "partition nowhere": "there is none (r1 go there)",
        "partition large": "is not up (r2 go there)",
        "partition broken": "no node of it works: down*",
        "partition (none)": "r4: no partition is named, and the site's default may have no GPU",
    }
    assert found["partition nowhere"].fix == "name one of broken, cpu, gpu, large at the top of the profile"


def test_a_profile_without_partitions_is_not_for_slurm():
    with pytest.raises(ConfigError, match="no rule has a slurm_partition"):
        wish(slurm_partition=None)


PARTITIONS = """PartitionName=cpu Nodes=c1,c2 PreemptMode=CANCEL PriorityTier=1
PartitionName=gpu Nodes=g1 PreemptMode=CANCEL PriorityTier=2
PartitionName=scavenger Nodes=g1 PreemptMode=CANCEL PriorityTier=1
PartitionName=again Nodes=g1 PreemptMode=REQUEUE PriorityTier=1
"""


def test_only_a_lower_partition_on_shared_nodes_loses_jobs_and_only_without_submitit():
    on = "cpu|c1\ncpu|c2\ngpu|g1\nscavenger|g1\nagain|g1\n"
    asked = [wish(f"of_{name}", slurm_partition=name) for name in ("cpu", "gpu", "scavenger", "again")]
    [found] = site_checks.check_preemption(asked, PARTITIONS, on)
    assert found.name == "partition scavenger"
    assert found.text.startswith("jobs of gpu cancel those of it (PreemptMode=CANCEL)")
    assert "(of_scavenger go there)" in found.text
    launched = [wish("sft", slurm_partition="scavenger", launcher="submitit")]
    assert site_checks.check_preemption(launched, PARTITIONS, on) == []


@pytest.mark.parametrize(("age", "sacct", "n"), [("60 sec", True, 0), ("59 sec", True, 1), ("59 sec", False, 0)])
def test_a_controller_that_forgets_jobs_too_soon(monkeypatch, age, sacct, n):
    monkeypatch.setattr(site_checks.shutil, "which", lambda name: "/usr/bin/sacct" if sacct else None)
    found = site_checks.check_job_age(f"Configuration data\nMinJobAge               = {age}\n")
    assert [check.level for check in found] == [FINDING] * n


# ----------------------------------------------------------------------------- what a node told


TOLD = {
    "host": "n1",
    "python": "3.11",
    "missing": [],
    "visible": "0",
    "torch_gpus": 1,
    "cuda": "12.8",
    "head": "7",
    "lock": "held",
}


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / ".doctor-x/gpu/report"
    path.parent.mkdir(parents=True)
    path.write_text("7")
    return path


def read(written: Path, with_gpu: bool = True, **told) -> list[str]:
    checks = node_probe.read_report("node of gpu", TOLD | told, written, "7", with_gpu)
    assert all(check.fix for check in checks if check.level)
    return [check.text for check in checks if check.level]


def test_a_node_that_has_everything(written):
    assert read(written) == []
    assert read(written, with_gpu=False, visible="", torch_gpus=0) == []


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"disk": "[Errno 2] No such file"}, "n1 cannot read and write"),
        ({"head": "6"}, "is not seen here within"),
        ({"lock": "free"}, "n1 does not see a lock that is held here"),
        ({"lock": "[Errno 38] Function not implemented"}, "has no locks on n1 ([Errno 38] Function not implemented)"),
        ({"missing": ["torch (ModuleNotFoundError: No module named 'torch')"]}, "n1 cannot import torch "
            "(ModuleNotFoundError"),
        ({"visible": ""}, "Slurm gave no GPU to a job on n1"),
        ({"torch_gpus": 0}, "torch, built for CUDA 12.8, sees no GPU on n1 although Slurm gave 0"),
        ({"torch_gpus": 0, "cuda": None}, "torch, built without CUDA, sees no GPU"),
    ],
)  # fmt: skip
def test_a_node_that_lacks_something(written, told, text):
    (found,) = read(written, **told)
    assert text in found


def test_a_file_that_does_not_show_up(written, monkeypatch):
    monkeypatch.setattr(node_probe, "SEEN_SECONDS", 0.1)
    written.unlink()
    (found,) = read(written)
    assert "is not seen here within 0.1 s" in found


# ----------------------------------------------------------------------------- with stand-in commands


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A site whose commands do what the test says; srun runs its command locally."""
    monkeypatch.chdir(tmp_path)
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}/bin{os.pathsep}/usr/bin")
    monkeypatch.setattr(
        site_checks.shutil, "which", lambda name: str(commands / name) if (commands / name).exists() else None
    )

    def put(name: str, script: str) -> None:
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)

    for name in site_checks.COMMANDS:
        put(name, "exit 0")
    put("sinfo", f"[[ $* == *-N* ]] || cat <<'END'\n{SINFO}END")
    put("srun", 'while [ "$1" != "' + sys.executable + '" ]; do shift; done; exec "$@"')
    monkeypatch.setattr(
        node_probe, "PROBE", node_probe.PROBE.replace('"torch", "transformers", "trl", "snakemake"', "")
    )
    return put


def look(asked: list[Job], jobs: bool = False) -> tuple[int, list[Check]]:
    told: list[Check] = []
    found = doctor.diagnose(asked, jobs, 1, told.append)
    assert told == found
    return doctor.exit_code(found), [check for check in found if check.level]


def a_job(**resources) -> Job:
    given = {"slurm_partition": "cpu", "runtime": 60, "mem_mb": 1000} | resources
    return Job("data", "data", Path("m"), None, None, None, threads=2, resources=given, needed=False)


def test_a_sound_site(cluster, tmp_path):
    assert look([a_job()], jobs=True) == (0, [])
    assert {p.name for p in tmp_path.iterdir()} == {"bin"}  # nothing is left behind


def test_a_file_system_whose_locks_nodes_do_not_see(cluster, monkeypatch):
    monkeypatch.setattr(doctor.fcntl, "lockf", lambda *_: None)
    code, (check,) = look([a_job()], jobs=True)
    assert code == 1
    assert "does not see a lock that is held here" in check.text


def test_no_slurm_here(cluster, tmp_path):
    (tmp_path / "bin/srun").unlink()
    code, (check,) = look([a_job()])
    assert (code, check.level, check.text) == (2, UNKNOWN, "not found here: srun")


def test_a_silent_controller(cluster):
    cluster("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    code, (check,) = look([a_job()])
    assert (code, check.text) == (2, "slurm_load_partitions: Unable to contact slurm controller")


def test_slurm_has_the_last_word(cluster):
    cluster(
        "sbatch",
        'echo "$@" > asked; echo "allocation failure: Invalid account or account/partition combination specified" '
        ">&2; exit 1",
    )
    code, (check,) = look([a_job(slurm_account="nobody")])
    assert code == 1
    assert "(Invalid account or account/partition combination specified)" in check.text
    assert "--test-only" in Path("asked").read_text()
    assert "--account=nobody" in Path("asked").read_text()


def test_a_busy_partition_is_unknown_and_not_wrong(cluster):
    cluster("srun", "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1")
    code, (check,) = look([a_job()], jobs=True)
    assert (code, check.level) == (2, UNKNOWN)


def test_a_node_without_this_environment(cluster):
    cluster("srun", "echo 'slurmstepd: error: execve(): python: No such file or directory' >&2; exit 2")
    code, (check,) = look([a_job()], jobs=True)
    assert code == 1
    assert "does not run there" in check.text


def test_a_gpu_is_requested_if_a_rule_has_one(cluster):
    cluster(
        "srun", 'echo "$@" > asked; echo "TOLD {}"; exit 0'.format(json.dumps(TOLD | {"head": "x"}).replace('"', '\\"'))
    )
    look([a_job(), a_job(slurm_partition="gpu", gres="gpu:a100:4")][1:], jobs=True)
    assert "--gres=gpu:a100:1 " in Path("asked").read_text()


def test_the_command_reports_wrong_arguments(capsys):
    assert main(["doctor", "--profile", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("tunetrail: error: --profile nowhere: no such profile;")
