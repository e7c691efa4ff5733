"""A run with labeler human: it waits, three people rank in a real browser, and the reward model's record names them.

Every `make test` runs it with the tiny model; for the demo, which takes ten minutes:

    TUNETRAIL_DEMO=1 python -m pytest tests/browser/test_label_run.py
"""

import copy
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import yaml

from tests.browser import test_label_page
from tests.browser.test_label_page import Desk
from tests.conftest import Project
from tests.labels import served_alone
from tunetrail.cli import main
from tunetrail.files import read_jsonl
from tunetrail.labeling.app.store import Store
from tunetrail.provenance.record import read_record
from tunetrail.scorers.chrf import chrf

browser, pytestmark = test_label_page.browser, test_label_page.pytestmark
SCRIPTED = ["human-1", "human-2", "human-3"]


@dataclass
class Case:
    """A run whose comparisons wait for people."""

    project: Project
    config: str
    results: Path
    """Relative to the project's folder."""
    store: str
    wanted: int
    """How many rankings are needed."""
    worth: Callable[[str, list[str]], list[float]]
    """A labeler's scores for the outputs of a task: higher is better, equal is a tie."""


def seen(text: str) -> str:
    """The characters of a text that survive HTML: random models write any."""
    return text.replace("\0", "").replace("\r\n", "\n")


@pytest.fixture
def tiny(tiny_run, tmp_path) -> Case:
    """The finished run of the other tests, without the artifacts to make. Its labelers prefer longer outputs."""
    project = copy.copy(tiny_run)
    project.folder = tmp_path / "copy"
    shutil.copytree(tiny_run.folder, project.folder, symlinks=True)
    config = yaml.safe_load((project.folder / "config/examples/tiny.yaml").read_text())
    config["comparisons"] = {"labeler": "human", "repeat_every": 0}
    (project.folder / "human.yaml").write_text(yaml.safe_dump(config))
    results = Path("results/tiny")
    shutil.rmtree(project.folder / results / "retention")
    return Case(project, "human.yaml", results, "state/labels.db", 28, lambda _, texts: [len(seen(t)) for t in texts])


@pytest.fixture
def demo(project) -> Case:
    """A real model. Its labelers know the author's text (chrF) and score it in points, each with their own errors."""
    results = Path("results/human-labels")

    @functools.cache  # once they exist, and not for each ranking
    def sampled() -> list[dict]:
        shards = (project.folder / results).glob("completions/*/completions.jsonl")
        return [row for shard in shards for row in read_jsonl(shard)]

    def worth(labeler: str, texts: list[str]) -> list[float]:
        [row] = [row for row in sampled() if sorted(row["completions"]) == sorted(texts)]
        error = Random(labeler + row["id"])
        errors = {text: error.gauss(0, 5) for text in sorted(set(texts))}
        return [round(chrf(text, row["reference"]) + errors[text]) for text in texts]

    return Case(project, "config/examples/human-labels.yaml", results, "state/human-labels.db", 272, worth)


DEMO = pytest.param("demo", marks=pytest.mark.skipif(not os.environ.get("TUNETRAIL_DEMO"),
    reason="the demo takes ten minutes; TUNETRAIL_DEMO=1 runs it"))  # fmt: skip


@pytest.fixture(params=["tiny", DEMO])
def case(request) -> Case:
    return request.getfixturevalue(request.param)


def rank(desk: Desk, case: Case) -> bool:
    """Ranks this labeler's current task with keys. False if there is none."""
    page = desk.open()
    outputs = page.locator(".output .raw")
    if not (texts := outputs.all_text_contents()):
        return False
    worth, last = case.worth(desk.pseudonym, texts), None
    for place in sorted(range(len(texts)), key=lambda i: -worth[i]):
        desk.press("abcdefghi"[place], *(["t"] if worth[place] == last else []))
        last = worth[place]
    desk.submitted()
    return True


def test_a_run_waits_for_three_people_and_its_reward_model_names_them(case, browser, monkeypatch, capsys):
    project, results = case.project, case.results
    targets = [str(results / name / "manifest.json") for name in ("reward", "retention")]

    waited = project.snakemake("--retries", "2", "--", *targets, config=case.config)
    assert waited.returncode == 75, waited.stderr[-3000:]
    last = waited.stderr.strip().splitlines()[-2]
    assert last.startswith(f"comparisons waits for people: 0 of {case.wanted} rankings collected; start their page "
                           f"with `tunetrail label serve --store {case.store}`")  # fmt: skip
    assert waited.stderr.count("\nError in rule comparisons") == 1  # one attempt, whatever the profile's retries
    assert (project.folder / results / "retention/manifest.json").exists()  # the other branch continued
    assert not (project.folder / results / "comparisons/manifest.json").exists()

    monkeypatch.chdir(project.folder)
    command = [project.python, "-m", "tunetrail", "status", "--json", "--configfile", case.config]
    told = subprocess.run(command, capture_output=True, text=True, check=True)  # Snakemake needs the only event loop
    found = {standing["name"]: standing for standing in json.loads(told.stdout)}
    assert found["comparisons"]["state"] == "waiting"
    assert found["comparisons"]["detail"].startswith(f"for people: 0 of {case.wanted} rankings")
    assert not {standing["state"] for standing in found.values()} & {"failed", "interrupted"}

    store = Store(case.store)
    with served_alone(case.store) as (_, address):
        desks = [Desk(browser, store, address) for _ in SCRIPTED]
        while [desk for desk in desks if rank(desk, case)]:
            pass
        assert [desk.said for desk in desks] == [[]] * 3
    assert store.progress()["settled"]

    project.run("--", *targets, config=case.config)
    for stage in ("comparisons", "reward"):
        about = read_record(results / stage).annotations("labels")
        assert about["labelers"] == SCRIPTED
        assert about["chain_head"] == store.head()
    rows = read_jsonl(results / "comparisons/comparisons.jsonl")
    assert sum(len(row["rankings"]) for row in rows) == case.wanted
    for row in rows:
        for ranking in row["rankings"]:
            worth = case.worth(ranking["labeler"], row["completions"])
            assert ranking["ranks"] == [1 + len({other for other in worth if other > value}) for value in worth]
    assert main(["audit", "trace", "--reverse", "labeler:human-2", "--in", str(results)]) == 0
    assert f"{results}/reward" in capsys.readouterr().out
    assert main(["audit", "verify", "--recursive", str(results / "reward")]) in (0, 3)
