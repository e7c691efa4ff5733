"""A copy of the project in its own folder, to run Snakemake in."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from .stage_server import StageServer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"


class Project:
    """A checkout with its own results, state and Snakemake metadata."""

    def __init__(self, folder: Path, path: str = str(Path(sys.executable).parent)):
        """
        Args:
            path: the PATH on which to find commands, such as the `python` that runs everything.
        """
        self.folder, self.path = folder, path
        self.python = shutil.which("python", path=path)
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            if os.path.lexists(ROOT / name) and not name.startswith("tests/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name, follow_symlinks=False)

    def snakemake(self, *options: str, config: str | None = "config/examples/tiny.yaml") -> subprocess.CompletedProcess:
        chosen = ["--configfile", config] if config else []
        path = {"PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}"}
        command = [self.python, "-m", "snakemake", "--profile", "profiles/local", *chosen, *options]
        return subprocess.run(
            command, cwd=self.folder, env=os.environ | path, capture_output=True, text=True, check=False
        )

    def run(self, *options: str, config: str | None = "config/examples/tiny.yaml") -> str:
        reply = self.snakemake(*options, config=config)
        assert reply.returncode == 0, reply.stdout[-3000:] + reply.stderr[-6000:]
        return reply.stdout + reply.stderr

    def pending(self, config: str | None = "config/examples/tiny.yaml") -> dict[str, int]:
        """Rule -> number of jobs that Snakemake would run."""
        output = self.run("--dry-run", config=config)
        table = output[output.index("Job stats") :] if "Job stats" in output else ""
        return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE) if rule != "total"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the slowest tests first."""
    items.sort(key=lambda item: "test_whole_run" not in item.nodeid)


class GroupedScheduling(LoadScopeScheduling):
    """Groups the tests that one of several processes runs: a file, or all that use the finished tiny run."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tiny" if file.split("/")[-2] in ("workflow", "browser") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> GroupedScheduling:
    return GroupedScheduling(config, log)


@pytest.fixture(scope="session")
def stage_server(tmp_path_factory) -> Iterator[StageServer]:
    server = StageServer(tmp_path_factory.mktemp("stages"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tiny_run(stage_server, tmp_path_factory) -> Project:
    """A finished run of the tiny random model through every rule."""
    project = Project(tmp_path_factory.mktemp("tiny"), stage_server.path)
    project.run()
    return project


@pytest.fixture
def project(stage_server, tmp_path) -> Project:
    return Project(tmp_path, stage_server.path)


@pytest.fixture
def edited_project(tmp_path) -> Project:
    """A project whose library a test changes; its stages import it afresh."""
    return Project(tmp_path)
