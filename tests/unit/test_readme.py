"""What the READMEs name is there: commands, links, folders."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "config/README.md"]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_exist(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    for target in targets:
        assert (path.parent / target).exists(), target


def test_make_targets_exist():
    """Every `make x` of the README is a target; what demo and test do is tested by running them in CI."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|    )make ([a-z]+)", "".join(path.read_text() for path in DOCS)))
    assert {"demo", "test", "bench", "schema"} <= named
    assert named <= targets


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("\nCI=1 make test")


@pytest.mark.parametrize("command", ["check", "resolve"])
def test_config_commands_of_the_docs(command):
    reply = subprocess.run(
        [sys.executable, "-m", "tunetrail", "config", command, "config/config.yaml"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert reply.returncode == 0
    assert reply.stdout
    assert not reply.stderr


def test_every_folder_the_readme_names_exists_or_is_made():
    named = re.findall(r"^    ([a-z]+)/", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(named) - {"results", "state"} <= {p.name for p in ROOT.iterdir()}
