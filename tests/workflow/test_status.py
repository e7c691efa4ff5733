"""tunetrail status and plan with a real Snakemake: before it runs, while it runs, and after it failed."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunetrail.cli import main
from tunetrail.monitor import dag, status

from ..conftest import Project
from .test_pipeline import ARTIFACTS, TINY, edited

CONFIG = "config/examples/tiny.yaml"


def tunetrail(project: Project, *arguments: str, config: str = CONFIG) -> subprocess.CompletedProcess:
    command = [project.python, "-m", "tunetrail", *arguments, "--configfile", config]
    return subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=False)


def told(project: Project, area: str, config: str = CONFIG):
    reply = tunetrail(project, area, "--json", config=config)
    assert reply.returncode == 0, reply.stderr
    assert reply.stderr == ""
    return json.loads(reply.stdout)


def states(project: Project, config: str = CONFIG) -> dict[str, dict]:
    return {s["name"]: s for s in told(project, "status", config)}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_is_done_and_status_changes_nothing(tiny_run):
    before = files(tiny_run.folder)
    found = states(tiny_run)
    assert {name: s["state"] for name, s in found.items()} == dict.fromkeys(ARTIFACTS, "done")
    assert told(tiny_run, "plan")["steps"] == []
    assert files(tiny_run.folder) == before


def test_a_changed_key_makes_its_readers_stale_and_says_so(tiny_run):
    config = edited(tiny_run, policies__dpo={"method": "dpo", "batch_size": 8, "beta": 0.7, "checkpoints": 1})
    stale = {name: s["detail"] for name, s in states(tiny_run, config).items() if s["state"] == "stale"}
    assert stale.keys() == {"policies/dpo", "evaluation/dpo", "head_to_head", "report"}
    assert stale["policies/dpo"] == "config: beta: 0.1 -> 0.7"
    assert stale["evaluation/dpo"] == "policies/dpo will be made again"
    found = told(tiny_run, "plan", config)
    assert [step["name"] for step in found["steps"]] == ["policies/dpo", "evaluation/dpo", "head_to_head", "report"]
    assert found["at_stake"]["unknown"] == 0
    seconds = sum(
        json.loads((tiny_run.folder / TINY / name / "provenance.json").read_text())["predicate"]["buildDefinition"][
            "internalParameters"
        ]["attempts"][0]["seconds"]
        * threads
        for name, threads in (("policies/dpo", 2), ("evaluation/dpo", 1), ("head_to_head", 1), ("report", 1))
    )
    assert found["at_stake"]["hours"]["core-hours"] == pytest.approx(seconds / 3600)


def test_each_shard_is_found_in_its_own_state_folder(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run.folder, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    for place in Path("state/tiny/completions").glob("*/*/attempts.published.jsonl"):
        place.rename(place.with_name("attempts.jsonl"))  # as if it had not been published
    shards = [job for job in dag.read_run("profiles/local", [Path(CONFIG)])[1] if job.rule == "completions"]
    assert len({status.state_folder(job) for job in shards} - {None}) == len(shards) == 2


def test_before_the_first_run_all_stages_wait_and_the_cost_is_unknown(project):
    found = states(project)
    assert {s["state"] for s in found.values()} == {"waiting"}
    assert found["base"]["detail"] == "ready to run"
    assert found["reward"]["detail"] == "for comparisons, data, sft"
    plan = told(project, "plan")
    assert plan["total"] == {"hours": {}, "stages": len(ARTIFACTS), "unknown": len(ARTIFACTS), "at_least": False}
    assert not (project.folder / "results").exists()


def test_a_bad_config_is_reported_as_by_snakemake(project):
    (project.folder / "bad.yaml").write_text("run: x\nbase: {source: random}\nsfd: {}\n")
    reply = tunetrail(project, "status", config="bad.yaml")
    assert reply.returncode == 78
    assert "bad.yaml: sfd: unknown key" in reply.stderr
    assert "Traceback" not in reply.stderr


@pytest.mark.parametrize("command", ["status", "plan", "doctor"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("run: x\nbase: {source: random\ndata: [\n", "bad.yaml:3: not valid YAML: expected ',' or '}', but got ':'"),
        (None, "bad.yaml: no such config file"),
    ],
)
def test_the_error_for_an_unreadable_config_file_is_one_line(tmp_path, monkeypatch, capsys, command, content, line):
    monkeypatch.chdir(tmp_path)
    if content:
        Path("bad.yaml").write_text(content)
    assert main([command, "--configfile", "bad.yaml"]) == 78
    assert capsys.readouterr() == ("", f"{line}\n")


def test_a_stage_is_seen_running_and_then_failed_while_another_branch_continues(tiny_run, tmp_path):
    """The reward model waits for a signal and then fails; DPO, which does not need it, is still made."""
    project = copy.copy(tiny_run)
    project.folder = tmp_path / "copy"
    shutil.copytree(tiny_run.folder, project.folder, symlinks=True)
    for name in ("reward", "policies/dpo"):
        shutil.rmtree(project.folder / TINY / name)
    shutil.rmtree(project.folder / TINY / "report")
    source = project.folder / "workflow/lib/tunetrail/stages/reward.py"
    wait = (
        '    import time\n    while not Path("go").exists():\n        time.sleep(0.05)\n    raise ValueError("no '
        'such thing")\n'
    )
    head, signature, body = re.split(r"(def run\(stage: Stage\).*:\n)", source.read_text())
    source.write_text("from pathlib import Path\n" + head + signature + wait + body)
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--configfile", CONFIG]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path / "log").open("w") as log:
        snakemake = subprocess.Popen(
            command, cwd=project.folder, env=os.environ | {"PATH": path}, stdout=log, stderr=log
        )
    attempts = project.folder / "state/tiny/reward"
    while not list(attempts.glob("*/attempts.jsonl")):
        assert snakemake.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    reward = states(project)["reward"]
    assert (reward["state"], reward["attempts"]) == ("running", 1)
    assert reward["detail"].startswith("since ")
    (project.folder / "go").touch()
    assert snakemake.wait() == 1
    found = states(project)
    assert [name for name, s in found.items() if s["state"] in ("failed", "running", "interrupted")] == ["reward"]
    assert found["policies/dpo"]["state"] == "done"
    assert found["report"]["state"] == "waiting"
    assert found["reward"]["detail"] == "ValueError: no such thing"
    assert "ValueError: no such thing" in (project.folder / found["reward"]["log"]).read_text()
    summary = (tmp_path / "log").read_text()
    assert (
        "reward failed (attempt 1, exit code 1): ValueError: no such thing\n    log    logs/tiny/reward.log\n"
        in summary
    )
    again = next(line.split(None, 1)[1] for line in summary.splitlines() if line.startswith("    again "))
    assert again == f"snakemake --profile profiles/local --configfile {CONFIG} -- {TINY}/reward/manifest.json"
