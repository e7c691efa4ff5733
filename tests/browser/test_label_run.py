"""A run with labeler human: it waits, three people rank in a real browser, and the reward model's record names them."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.browser import test_label_page
from tests.browser.test_label_page import Desk
from tests.conftest import Project
from tests.labels import served_alone
from tunetrail.cli import main
from tunetrail.contract import read_jsonl
from tunetrail.labeling.app.store import Store
from tunetrail.provenance.record import read_record

browser, pytestmark = test_label_page.browser, test_label_page.pytestmark
TINY = Path("results/tiny")


def seen(text: str) -> int:
    """How many characters of a text HTML keeps: random models write any."""
    return len(text.replace("\0", "").replace("\r\n", "\n"))


def rank(desk: Desk) -> bool:
    """Ranks the task before this labeler by keys, the longer the better and a tie where two are of one length.

    False where there is none.
    """
    page = desk.open()
    outputs = page.locator(".output .raw")
    if not (texts := outputs.all_text_contents()):
        return False
    length = None
    for place in sorted(range(len(texts)), key=lambda i: -seen(texts[i])):
        desk.press("abcdefghi"[place], *(["t"] if seen(texts[place]) == length else []))
        length = seen(texts[place])
    desk.submitted()
    return True


def test_the_run_waits_for_three_people_and_its_reward_model_names_them(
    tiny_run, tmp_path, browser, monkeypatch, capsys
):
    project: Project = copy.copy(tiny_run)
    project.folder = tmp_path / "copy"
    shutil.copytree(tiny_run.folder, project.folder, symlinks=True)
    config = yaml.safe_load((project.folder / "config/examples/tiny.yaml").read_text())
    config["comparisons"] = {"labeler": "human", "repeat_every": 0}
    (project.folder / "human.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(project.folder / TINY / "retention")
    targets = [str(TINY / name / "manifest.json") for name in ("reward", "retention")]

    waited = project.snakemake("--retries", "2", "--", *targets, config="human.yaml")
    assert waited.returncode == 75, waited.stderr[-3000:]
    last = waited.stderr.strip().splitlines()[-2]
    assert last.startswith("comparisons waits for people: 0 of 28 rankings are there; start their page with `tunetrail label serve --store state/labels.db`")  # fmt: skip
    assert waited.stderr.count("\nError in rule comparisons") == 1  # one attempt, whatever the profile's retries
    assert (project.folder / TINY / "retention/manifest.json").exists()  # the other branch went on
    assert not (project.folder / TINY / "comparisons/manifest.json").exists()

    monkeypatch.chdir(project.folder)
    command = [sys.executable, "-m", "tunetrail", "status", "--json", "--configfile", "human.yaml"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)  # Snakemake wants the only event loop
    found = {standing["name"]: standing for standing in json.loads(told.stdout)}
    assert found["comparisons"]["state"] == "waiting"
    assert found["comparisons"]["detail"].startswith("for people: 0 of 28 rankings")
    assert not {standing["state"] for standing in found.values()} & {"failed", "interrupted"}

    store = Store("state/labels.db")
    with served_alone("state/labels.db") as (_, address):
        desks = [Desk(browser, store, address) for _ in range(3)]
        while [desk for desk in desks if rank(desk)]:
            pass
        assert [desk.said for desk in desks] == [[]] * 3
    assert store.progress()["settled"]

    project.run("--", *targets, config="human.yaml")
    for stage in ("comparisons", "reward"):
        about = read_record(TINY / stage).annotations("labels")
        assert about["labelers"] == ["human-1", "human-2", "human-3"]
        assert about["chain_head"] == store.head()
    rows = read_jsonl(TINY / "comparisons/comparisons.jsonl")
    for row in rows:
        (ranking,) = row["rankings"]
        lengths = [seen(text) for text in row["completions"]]
        assert ranking["ranks"] == [1 + len({other for other in lengths if other > length}) for length in lengths]
    assert main(["audit", "trace", "--reverse", "labeler:human-2", "--in", str(TINY)]) == 0
    assert "results/tiny/reward" in capsys.readouterr().out
    assert main(["audit", "verify", "--recursive", str(TINY / "reward")]) in (0, 3)
