"""A cluster, and the tiny pipeline on it, each made once for all tests."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tunetrail.provenance.record import Record, read_record

from ..conftest import ROOT, Project
from .cluster import Cluster, hindrance, until

CONFIG = "slurm.yaml"
RUN = "tiny"
HEADS: list[subprocess.Popen] = []
"""All heads that were started, so that a failing test leaves none running."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """If no cluster can be started, skips these tests and says why in one line; in CI they fail."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    if ours and not os.environ.get("CI") and (reason := hindrance()):
        ours[0].add_marker(pytest.mark.skip(reason=f"and with it all of tests/slurm: {reason}"))
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]


@pytest.fixture(scope="session")
def cluster(stage_server, tmp_path_factory) -> Iterator[Cluster]:
    assert not (reason := hindrance()), reason
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")  # each process has its own cluster
    with Cluster(tmp_path_factory.mktemp("slurm") / "c", int(worker.removeprefix("gw"))) as up:
        up.environment["PATH"] = f"{stage_server.path}{os.pathsep}{up.environment['PATH']}"
        yield up
        end_heads()  # of a fixture that failed


def end_heads() -> None:
    for head in HEADS:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
    HEADS.clear()


@pytest.fixture(autouse=True)
def nothing_left(cluster) -> Iterator[None]:
    """After each test, no head and no job is running, and all nodes are up."""
    yield
    end_heads()
    for job in cluster.jobs("PENDING,RUNNING,SUSPENDED"):
        cluster.command("scancel", job["id"], check=False)
    cluster.restore()


def python_of(environment: dict[str, str]) -> str:
    return shutil.which("python", path=environment["PATH"])


@dataclasses.dataclass
class OnSlurm:
    """A project whose head runs against the cluster."""

    cluster: Cluster
    folder: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    # ------------------------------------------------------------------------- the head

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        """Starts snakemake --profile slurm in the background, as leader of a process group; it prints to head.log."""
        variables = self.variables(environment)
        command = [python_of(variables), "-m", "tests.slurm.head", "--profile", "slurm", "--configfile", CONFIG]
        with (self.folder / "head.log").open("ab") as log:
            head = subprocess.Popen(
                [*command, *options],
                cwd=self.folder,
                env=variables,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        HEADS.append(head)
        return head

    def variables(self, more: dict[str, str]) -> dict[str, str]:
        """The environment of a head."""
        ours = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/workflow/lib"}
        return self.cluster.environment | self.environment | more | ours

    def import_again(self) -> None:
        """From now on, starts everything with a new interpreter instead of forking the server."""
        path = self.cluster.environment["PATH"].partition(os.pathsep)[2]
        self.environment = self.environment | {"PATH": path}

    def wait(self, head: subprocess.Popen, seconds: float = 600) -> int:
        """Waits for the head and returns its exit code; requeued jobs need not wait Slurm's two minutes."""
        end = time.monotonic() + seconds
        while head.poll() is None:
            assert time.monotonic() < end, self.said()[-3000:]
            self.cluster.start_now()
            time.sleep(0.3)
        return head.returncode

    def run(self, *options: str, **environment: str) -> str:
        assert self.wait(self.start(*options, **environment)) == 0, self.said()[-6000:]
        return self.said()

    def said(self) -> str:
        return (self.folder / "head.log").read_text()

    def status(self) -> dict[str, dict]:
        """What `tunetrail status` reports for each stage."""
        variables = self.variables({})
        command = [python_of(variables), "-m", "tunetrail", "status", "--profile", "slurm", "--configfile", CONFIG]
        reply = subprocess.run([*command, "--json"], cwd=self.folder, env=variables, capture_output=True, text=True,
            check=True)  # fmt: skip
        return {standing["name"]: standing for standing in json.loads(reply.stdout)}

    # ------------------------------------------------------------------------- what is there

    def artifact(self, name: str) -> Path:
        return self.folder / "results" / RUN / name

    def manifest(self, name: str) -> bytes:
        return (self.artifact(name) / "manifest.json").read_bytes()

    def record(self, name: str) -> Record:
        return read_record(self.artifact(name))

    def ends(self, name: str) -> list[str]:
        """How each attempt ended: its message, or else the outcome."""
        return [attempt["ended"]["message"] or attempt["ended"]["outcome"] for attempt in self.record(name).attempts]

    def saved(self, stage: str = "sft") -> list[Path]:
        """The complete checkpoints in a stage's state, oldest first."""
        found = (self.folder / "state" / RUN / stage).glob("*/checkpoint-*/complete.json")
        return sorted((p.parent for p in found), key=lambda p: int(p.name.rpartition("-")[2]))

    def wait_for_saves(self, n: int = 5, stage: str = "sft") -> int:
        """Waits until the stage has saved after its n-th step or later; returns the step."""
        until(lambda: any(int(p.name[11:]) >= n for p in self.saved(stage)), f"{stage} saves\n{self.said()[-2000:]}")
        return int(self.saved(stage)[-1].name[11:])

    def job(self, stage: str = "sft", states: str = "RUNNING") -> dict[str, str]:
        """Slurm's record of the newest job of a stage in this folder."""
        return until(lambda: self.jobs(stage, states), f"a job of {stage} is {states}")[-1]  # type: ignore[index]

    def jobs(self, stage: str = "sft", states: str = "all") -> list[dict[str, str]]:
        return [
            j
            for j in self.cluster.jobs(states)
            if j["folder"] == str(self.folder) and stage in j["comment"] + j["name"]
        ]

    def preempt(self) -> None:
        """Submits a job that takes all GPUs of two nodes for three seconds, in a partition with higher priority."""
        urgent = self.cluster.command("sbatch", "--parsable", "-p", "gpu", "-N2", "--exclusive", "-o", "/dev/null",
            "--wrap", "sleep 3").strip()  # fmt: skip
        until(lambda: any(j["id"] == urgent and j["state"] == "COMPLETED" for j in self.cluster.jobs()), "it is done")

    def trainers(self, node: str, stage: str = "sft") -> list[int]:
        """Processes of a stage on a node: the command itself, not those that wait for it."""
        return self.cluster.pids(node, rf"\S*python -m tunetrail\.stages\.{stage} ")

    def edit_profile(self, old: str, new: str) -> None:
        path = self.folder / "profiles/slurm/config.yaml"
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    def resources(self, rule: str, **resources: object) -> None:
        """Gives a rule these resources in addition to its own."""
        lines = "".join(f"    {name}: {value}\n" for name, value in resources.items())
        self.edit_profile(f"  {rule}:\n    slurm_partition", f"  {rule}:\n{lines}    slurm_partition")

    def configure(self, **changes: object) -> None:
        """Replaces keys of the config (a__b=1 sets a.b)."""
        path = self.folder / CONFIG
        content = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            *blocks, last = key.split("__")
            place = content
            for block in blocks:
                place = place[block]
            place[last] = value
        path.write_text(yaml.safe_dump(content))


def on_slurm(cluster: Cluster, folder: Path) -> OnSlurm:
    Project(folder)
    shutil.copy(ROOT / "config/examples/tiny.yaml", folder / CONFIG)
    return OnSlurm(cluster, folder)


@pytest.fixture(scope="session")
def prepared(cluster, tmp_path_factory) -> OnSlurm:
    """Base model and data, and the SFT of an undisturbed run, which is kept in `undisturbed`.

    The first process of the tests that wants it makes it for all.
    """
    # Saves after every step, so that lost steps can be counted and training takes long enough.
    environment = {"TUNETRAIL_CHECKPOINT_MINUTES": "0", "TUNETRAIL_LEASE_SECONDS": "300"}
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prepared"
    with FileLock(f"{shared}.lock"):
        if not (shared / "undisturbed").exists():
            project = on_slurm(cluster, shared)
            project.environment = environment
            # Short rows: it should take many steps, but little work.
            project.configure(data__demonstrations=[{"source": "docstrings"}], sft__epochs=24)
            project.run("--until", "sft")
            for name in ("results", "state"):
                shutil.copytree(shared / name, shared / "undisturbed" / name)
                shutil.rmtree(shared / name / RUN / "sft")
    return OnSlurm(cluster, shared, environment)


@pytest.fixture
def project(prepared, tmp_path) -> OnSlurm:
    """A separate run whose SFT has not been made yet."""
    folder = tmp_path / "p"
    shutil.copytree(
        prepared.folder, folder, symlinks=True, ignore=shutil.ignore_patterns("undisturbed", "head.log", "sft.log")
    )
    return OnSlurm(prepared.cluster, folder, prepared.environment)


@pytest.fixture
def expected(prepared) -> bytes:
    """The manifest of the undisturbed SFT."""
    return (prepared.folder / "undisturbed/results" / RUN / "sft/manifest.json").read_bytes()


@pytest.fixture(scope="session")
def whole(cluster, tmp_path_factory) -> OnSlurm:
    """The tiny pipeline, every rule of it, by the very command."""
    project = on_slurm(cluster, tmp_path_factory.mktemp("whole"))
    policies = yaml.safe_load((project.folder / CONFIG).read_text())["policies"]
    project.configure(policies={name: policies[name] for name in ("dpo", "ppo", "best-of-2")})
    project.run()
    return project
