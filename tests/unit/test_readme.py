"""Everything that the READMEs mention exists: commands, links, folders, configs, messages."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

from tunetrail.cli import app
from tunetrail.config.loading import parse
from tunetrail.evaluation.stats import minimum_detectable

ROOT = Path(__file__).parents[2]
OWN_DATA = ROOT / "config/examples/README.md"
DOCS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") and part != ".github" for part in path.parts)
    if "guidelines" not in path.parts
)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_exist(path):
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not t.startswith("https://")]
    for target in targets:
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


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


def test_every_folder_in_the_architecture_exists_or_is_made():
    page = ROOT / "workflow/lib/tunetrail/README.md"
    named = re.findall(r"(?<= )([a-z]+(?:/[a-z]+)*)/(?= )", page.read_text().partition("\n## ")[0])
    roots = (ROOT, page.parent)
    assert len(named) > 15
    assert [name for name in named if not any((root / name).is_dir() for root in roots)] == []


def commands(path: Path) -> list[list[str]]:
    """The lines of a page that call tunetrail, split into words."""
    lines = re.findall(r"^    (tunetrail .+)$", path.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize(
    "words", [words for path in DOCS for words in commands(path) if "|" not in words], ids=" ".join
)
def test_commands_in_the_documentation_are_valid(words):
    """The command exists and accepts these options and arguments; it is not run."""
    command, words = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("", list(words))


def test_the_readmes_config_is_valid():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 10
    parse(yaml.safe_load(text))


OWN_DATA_CONFIGS = re.findall(r"```yaml\n(.*?)```", OWN_DATA.read_text(), re.DOTALL)


@pytest.mark.parametrize("text", OWN_DATA_CONFIGS, ids=lambda text: text.split()[1])
def test_configs_of_the_tutorial_are_valid(text):
    assert len(OWN_DATA_CONFIGS) == 6
    parse(yaml.safe_load(text))


def test_messages_that_the_tutorial_explains_are_in_the_code():
    section = OWN_DATA.read_text().partition("## What a message means")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| (?:… )?(?:rows )?(.+?) \|", section, re.MULTILINE)[1:]
    code = [path.read_text() for path in (ROOT / "workflow").rglob("*") if path.suffix in (".py", ".smk")]
    joined = re.sub(r'"\s+f?"', "", "\n".join(code))  # a message may be split over several lines
    assert len(messages) == 10
    assert [message for message in messages if message not in joined] == []


def test_the_tutorial_lists_every_example():
    listed = re.findall(r"^\| `(\S+\.yaml)` \|", OWN_DATA.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in OWN_DATA.parent.glob("*.yaml"))


def test_the_documented_numbers_of_prompts_are_right():
    """For outcomes of 0 and 1, half each, on independent prompts."""
    stated = re.search(
        r"100 show .* about (\d+)\s+points,\s+400 by about (\d+), 1,600 by about (\d+) ", OWN_DATA.read_text()
    )
    assert stated
    for n, points in zip((100, 400, 1600), map(int, stated.groups()), strict=True):
        outcome = np.tile([0.0, 1.0], n // 2)
        least = minimum_detectable(outcome, list(range(n)))
        assert least is not None
        assert math.isclose(100 * least, points, abs_tol=0.6)
