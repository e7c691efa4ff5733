"""What a head that was stopped for too long does to its successor: nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunetrail.contract.lease import hold
from tunetrail.monitor.head import end_if_superseded

ROOT = Path(__file__).parents[2]
SNAKEFILE = f"""
from pathlib import Path
from tunetrail.config.loading import load
from tunetrail.monitor import head, snakemake_adapter

CONFIG, RUN = load(Path("{ROOT}/config/examples/tiny.yaml")), "results"
snakemake_adapter.keep_what_is_published()

onstart:
    head.hold_run(Path("state"))

onerror:
    head.end_if_superseded()
    Path("handled").touch()

rule all:
    input: "results/second/manifest.json"

rule first:
    output: manifest="results/first/manifest.json"
    shell: "touch begun; while [ ! -e go ]; do sleep 0.05; done; cp -n published {{output}}; exit $(cat go)"

rule second:
    input: "results/first/manifest.json"
    output: manifest="results/second/manifest.json"
    shell: "echo ours > {{output}}"
"""


def until(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


@pytest.fixture
def head(tmp_path):
    """A head process whose first job waits for the file `go`, which says how it ends."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "published").write_text("another's")
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores=1", "--nolock"],
        cwd=tmp_path,
        env=os.environ | {"TUNETRAIL_LEASE_SECONDS": "0.5"},
        stderr=(tmp_path / "error").open("w"),
    )
    until(tmp_path / "begun")
    yield process
    process.kill()
    process.wait()
    (tmp_path / "go").touch()  # ends its job too


@pytest.mark.parametrize("code", ["0", "76"])
def test_a_head_that_was_stopped_ends_before_it_acts(head, tmp_path, monkeypatch, code):
    """However its job ended meanwhile."""
    head.send_signal(signal.SIGSTOP)
    monkeypatch.setenv("TUNETRAIL_LEASE_SECONDS", "0.5")
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # else it is refused at once, and would have to try again
    (tmp_path / "state/head").write_text("process 1 on elsewhere, job 1")
    for name in ("first", "second"):
        (tmp_path / "results" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name / "manifest.json").write_text("the successor's")
    with hold(tmp_path / "state/head", give_up=lambda: False, say=print) as lease:
        assert lease.generation == 2
        (tmp_path / "go").write_text(code)
        head.send_signal(signal.SIGCONT)
        head.wait(300)
    assert head.returncode == 76
    assert (tmp_path / "error").read_text().splitlines()[-1] == (
        "state: another snakemake took over this run while this one was stopped; it goes on, this one ends"
    )
    for name in ("first", "second"):
        assert (tmp_path / "results" / name / "manifest.json").read_text() == "the successor's"
    assert not (tmp_path / "handled").exists()


def test_a_failed_job_takes_nothing_away_that_another_attempt_published(head, tmp_path):
    (tmp_path / "go").write_text("76")
    head.wait(300)
    assert head.returncode == 1
    assert (tmp_path / "results/first/manifest.json").read_text() == "another's"
    assert (tmp_path / "handled").exists()


def test_a_head_that_cannot_look_at_its_lease_goes_on(monkeypatch):
    """A full disk or a hiccup of the file server must not leave its jobs without a head."""

    class Unreachable:
        def lost(self):
            raise OSError("Input/output error")

    monkeypatch.setattr("tunetrail.monitor.head._leases", [Unreachable()])
    end_if_superseded()


def test_an_old_result_is_not_current_because_the_job_for_the_new_config_failed(tmp_path):
    """On a cluster the job removes old outputs itself, on its node; this one fails before."""
    (tmp_path / "Snakefile").write_text(f"""
from pathlib import Path
from snakemake.jobs import Job
from tunetrail.config.loading import load
from tunetrail.monitor import snakemake_adapter

CONFIG, RUN = load(Path("{ROOT}/config/examples/tiny.yaml")), "results"
snakemake_adapter.keep_what_is_published()

async def nothing(job, *args, **kwargs):
    pass

Job.prepare = nothing

rule first:
    input: "config"
    output: manifest="results/first/manifest.json"
    shell: "grep -q old {{input}} && mkdir -p results/first && cp {{input}} {{output}}"
""")

    def snakemake(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", "--cores=1", "--nolock", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    (tmp_path / "config").write_text("old")
    assert snakemake().returncode == 0
    assert "Nothing to be done" in snakemake("--dry-run").stdout
    (tmp_path / "config").write_text("new")
    assert snakemake().returncode == 1
    assert (tmp_path / "results/first/manifest.json").read_text() == "old"
    reply = snakemake("--dry-run")
    assert "Nothing to be done" not in reply.stdout + reply.stderr
    assert "first" in reply.stdout + reply.stderr
