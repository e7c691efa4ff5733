"""The live screen of a run, from what a run leaves on disk."""

import json
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from tunetrail.monitor import watch
from tunetrail.monitor.dag import Job
from tunetrail.monitor.status import STATES


def job(name: str, needed: bool = True, after: tuple[str, ...] = ()) -> Job:
    rule, manifest = name.partition("/")[0], Path("results/r", name, "manifest.json")
    return Job(name, rule, manifest, Path("state/r", name), None, None, 2, {}, needed, after=after)


def publish(stage: Job, history: list[dict]) -> None:
    stage.manifest.parent.mkdir(parents=True)
    stage.manifest.with_name("history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    stage.manifest.write_text("{}")


def start(stage: Job, values: list[dict[str, float]]) -> None:
    """An attempt that has started and reported progress."""
    folder = stage.state / ("f" * 16)
    folder.mkdir(parents=True)
    (folder / "attempts.jsonl").write_text(json.dumps({"start": "2026-01-02T03:04:05+00:00", "job_id": "77"}) + "\n")
    shared = {
        "time": datetime.now().astimezone().isoformat(),
        "label": "ppo",
        "total": 40,
        "unit": "steps",
        "rate": 0.5,
    }
    rows = [shared | {"done": i + 1, "left": 60.0, "values": of, "note": ""} for i, of in enumerate(values)]
    (folder / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(seen: watch.Watch, width: int = 130, height: int = 40) -> str:
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(watch.screen(seen, seen.look(), datetime(2026, 1, 2, 3, 4, 5), height))
    return console.export_text()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "slurm_queue", lambda: {"77": "RUNNING"})


def test_a_running_stage_has_progress_rate_time_left_curves_and_its_slurm_job():
    ppo = job("policies/ppo")
    start(ppo, [{"score": 0.1 * i, "kl": float(i)} for i in range(8)])  # its Slurm job is in the queue
    text = shown(watch.Watch([ppo], "again"))
    line = next(line for line in text.splitlines() if line.startswith("policies/ppo"))
    for part in ("running", "8/40", "0.5 steps/s", "reward ▁▂▃▄▅▆▇█ 0.7", "KL ▁▂▃▄▅▆▇█ 7", "77 running"):
        assert part in line
    assert "0:59" in line or "1:00" in line


def test_an_unknown_time_left_is_a_question_mark():
    ppo = job("policies/ppo")
    start(ppo, [{"score": 0.1}])
    path = ppo.state / ("f" * 16) / "progress.jsonl"
    path.write_text(path.read_text().replace('"left": 60.0', '"left": null'))
    line = next(line for line in shown(watch.Watch([ppo], "again")).splitlines() if line.startswith("policies/ppo"))
    assert "?" in line
    assert "0:00" not in line


def test_a_stage_that_was_made_since_is_done_and_no_longer_awaited():
    sft, dpo = job("sft"), job("policies/dpo", after=("sft",))
    seen = watch.Watch([sft, dpo], "again")
    assert "for sft" in shown(seen)
    publish(sft, [{"step": i, "loss": 4.0 - i} for i in range(4)])
    text = shown(seen)
    assert text.startswith("1 done, 1 waiting")
    assert "loss █▆▃▁ 1" in text
    assert "for sft" not in text
    assert "ready to run" in text


def test_a_stale_stage_stays_stale_until_it_is_rerun():
    sft = job("sft")
    publish(sft, [])
    seen = watch.Watch([replace(sft, why="config: seed: 0 -> 1")], "again")
    assert "seed: 0 -> 1" in shown(seen)
    time.sleep(0.01)
    sft.manifest.write_text("{ }")
    assert shown(seen).startswith("1 done")


def test_failures_are_reported_with_their_logs():
    sft = job("sft")
    folder = sft.state / ("f" * 16)
    folder.mkdir(parents=True)
    (folder / "attempts.jsonl").write_text(
        json.dumps({"start": "2026-01-02T03:04:05+00:00", "ended": {"outcome": "failed", "message": "boom"}}) + "\n"
    )
    text = shown(watch.Watch([sft], "snakemake"))
    assert "1 failed" in text
    assert "sft failed (attempt 1): boom" in text
    assert "again  snakemake -- results/r/sft/manifest.json" in text


def test_if_lines_are_scarce_finished_stages_share_one():
    jobs = [job(f"stage{i}", needed=False) for i in range(30)]
    for stage in jobs:
        publish(stage, [])
    text = shown(watch.Watch(jobs, "again"), height=24)
    assert "done (30)" in text
    assert "stage7" not in text


def test_slurm_is_queried_rarely(monkeypatch):
    asked = []
    monkeypatch.setattr(watch, "slurm_queue", lambda: asked.append(1) or {})
    seen = watch.Watch([job("sft")], "again")
    for _ in range(20):
        seen.look()
    assert len(asked) == 1


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0], [1.0, float("inf"), 3.0], list(range(1000))])
def test_a_sparkline_is_never_wider_than_asked_and_takes_any_numbers(values):
    line = watch.sparkline(values, width=12)
    assert len(line) <= 12
    assert set(line) <= set(watch.BLOCKS)
    assert (line == "") == (not [v for v in values if v == v])


def test_every_state_has_its_colour():
    assert set(STATES) == {"done", "running", "stale", "interrupted", "failed", "waiting"}
