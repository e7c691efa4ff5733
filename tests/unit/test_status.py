"""The status of stages, from what a run leaves on disk. The runs are made up; the lease is real."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tunetrail.launch.supervise import EXIT_CODE
from tunetrail.monitor import failure, status
from tunetrail.monitor.dag import Job, _natural, config_changes, listed

RERUN = "snakemake --profile p"
START = "2026-01-02T03:04:05+00:00"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a Job in its own folder, with the given parents and output."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "reward", made: bool = False, needed: bool = True, **changes) -> Job:
        manifest = Path("results/r", name, "manifest.json")
        if made:
            manifest.parent.mkdir(parents=True)
            manifest.write_text("{}")
        given = {
            "name": name, "rule": name.partition("/")[0], "manifest": manifest, "state": Path("state/r", name),
            "log": Path("logs/r", f"{name}.log"), "benchmark": None, "threads": 2,
            "resources": {}, "needed": needed,
        }  # fmt: skip
        return Job(**given | changes)

    return make


def ended(outcome: str, message: str | None = None) -> dict:
    return {"outcome": outcome, "message": message}


def progress(done: int, written: datetime, note: str = "") -> dict:
    """A row of progress.jsonl for 100 steps of two seconds each."""
    return {
        "time": written.astimezone().isoformat(timespec="seconds"), "label": "ppo", "done": done, "total": 100,
        "unit": "steps", "rate": 0.5, "left": (100 - done) * 2.0, "values": {}, "note": note,
    }  # fmt: skip


def attempt(job: Job, folder: str = "f" * 16, rows: tuple[dict, ...] = (), **row) -> Path:
    place = job.state / folder
    place.mkdir(parents=True, exist_ok=True)
    with (place / "attempts.jsonl").open("a") as f:
        f.write(json.dumps({"start": START, "job_id": None} | row) + "\n")
    (place / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def say(job: Job, text: str, seconds_ago: float = 0) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_text(text)
    os.utime(job.log, (time.time() - seconds_ago,) * 2)


def look(job: Job, queue: dict[str, str] | None = None) -> status.StageStatus:
    return status.stage_status(job, queue or {}, RERUN)


@pytest.fixture
def hold():
    """Holds leases from other processes: a process does not see its own locks."""
    holders = []

    def start(job: Job) -> None:
        code = (
            "import sys; from pathlib import Path; from tunetrail.contract.lease import hold\nwith "
            "hold(Path(sys.argv[1]), lambda: True, print): print('held', flush=True); sys.stdin.read()"
        )
        path = job.state / f"{job.manifest.parent.name}.lock"
        holders.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        assert holders[-1].stdout.readline() == "held\n"

    yield start
    for holder in holders:
        holder.communicate()


def test_a_current_artifact_is_done(job):
    assert look(job(made=True, needed=False)).state == "done"


def test_an_outdated_artifact_is_stale_and_says_why(job):
    found = look(job(made=True, why="config: beta: 0.1 -> 0.7"))
    assert (found.state, found.detail) == ("stale", "config: beta: 0.1 -> 0.7")


def test_a_stage_waits_for_its_parents(job):
    assert look(job(after=("sft", "data"))).detail == "for data, sft"
    assert look(job()) == status.StageStatus("reward", "reward", "waiting", "ready to run")


def test_a_missing_artifact_that_nothing_needs_is_reported(job):
    found = look(job(needed=False))
    assert found.state == "stale"
    assert found.rerun == f"{RERUN} -- results/r/reward/manifest.json"


def test_a_failed_stage_has_its_error_its_log_and_how_to_run_it_again(job):
    j = job()
    attempt(j, ended=ended("killed"))
    attempt(j, ended=ended("failed", "ValueError"), job_id="77")
    say(
        j,
        "loading\nTraceback (most recent call last):\n  File x\nValueError: no such thing\nsrun: error: gpu1: task "
        "0: Exited\nbye\n",
    )
    found = look(j)
    assert (found.state, found.attempts, found.slurm_job) == ("failed", 2, "77")
    assert found.detail == "ValueError: no such thing"
    assert status.failure_lines([found]) == [
        "reward failed (attempt 2, Slurm job 77): ValueError: no such thing",
        "    log    logs/r/reward.log",
        f"    again  {RERUN} -- results/r/reward/manifest.json",
    ]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nreward: error: x.jsonl:2: is empty\nb\n\n", "reward: error: x.jsonl:2: is empty"),
        ("a\nslurmstepd: error: Detected 1 oom_kill event\nb\n", "slurmstepd: error: Detected 1 oom_kill event"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", "torch.OutOfMemoryError: CUDA out of memory"),
        ("Killed\n", "Killed"),
        (
            "x\nd: error: a.jsonl:2: is empty\nd: error: a.jsonl:3: is a list\nd: error: 2 of 9\n",
            "d: error: a.jsonl:2: is empty · 2 more in the log",
        ),
        ("sft: error: old\ndata: error: new\n", "data: error: new"),
        ("", None),
    ],
)
def test_the_last_error_of_a_log(tmp_path, log, line):
    (tmp_path / "log").write_text(log)
    assert status.error_line(tmp_path / "log") == line


def code(j: Job, number: int) -> None:
    """Writes the exit code as the launcher does."""
    j.state.mkdir(parents=True, exist_ok=True)
    (j.state / EXIT_CODE).write_text(str(number))


def test_after_bad_data_or_config_the_next_step_is_to_fix_it(job):
    j = job()
    attempt(j, ended=ended("failed", "DataError"))
    say(j, "reward: error: no pairs\n")
    code(j, 65)
    assert status.failure_lines([look(j)]) == [
        "reward failed (attempt 1, exit code 65): reward: error: no pairs",
        "    log    logs/r/reward.log",
        "    fix    the data is bad; change what is named above, then",
        f"    again  {RERUN} -- results/r/reward/manifest.json",
    ]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([65], 65), ([78, 78], 78), ([75], 75), ([65, 78], 1), ([65, None], 1), ([None], 1), ([75, "people"], 75)],
)
def test_a_run_exits_with_the_code_that_all_its_failures_share(job, codes, expected):
    found = []
    for i, number in enumerate(codes):
        j = job(f"evaluation/{i}")
        attempt(j, ended=ended("waiting" if number == "people" else "failed", "for people: 0 of 3 rankings"))
        if isinstance(number, int):
            code(j, number)
        found.append(look(j))
    assert failure.common_code(found) == expected
    last = failure.summary(found, ["--cores", "2"]).splitlines()
    assert last[-1] == "To go on with all that is left: snakemake --cores 2"
    assert ("evaluation/1 waits for people: 0 of 3 rankings" in last) == ("people" in codes)


def test_sealing_a_failed_run_gives_no_advice_about_tags(original, tmp_path, capsys):
    """Nothing is sealed if nothing was made yet, as when the first stage fails."""
    assert failure.seal(tmp_path / "none") is None
    (tmp_path / "empty").mkdir()
    assert failure.seal(tmp_path / "empty") is None
    assert not list(tmp_path.rglob("ledger.jsonl"))
    shutil.copytree(original, tmp_path / "run")
    lines = (tmp_path / "run/ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/ledger.jsonl").write_text("".join(lines[:-1]))
    assert failure.seal(tmp_path / "run") is None
    assert (tmp_path / "run/ledger.jsonl").read_text().splitlines(keepends=True)[:-1] == lines[:-1]
    assert capsys.readouterr() == ("", "")


def test_a_seal_that_fails_is_the_last_line_of_the_run(original, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(original, run)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[1:]))
    assert failure.after_success(run, {}) == 65
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"NOT SEALED: {run}/ledger.jsonl: line 1 does not follow the line before it; nothing is sealed"
    )
    assert last.endswith(f"; then: tunetrail audit seal {run}")
    monkeypatch.setattr(failure, "forget_failed", lambda workflow: None)
    monkeypatch.setattr(failure, "jobs_of", lambda workflow: [])
    monkeypatch.setattr(failure, "others_failed", lambda workflow: True)
    assert failure.after_failure(None, run, []) == 1
    assert capsys.readouterr().err.splitlines()[-1] == last
    (run / "ledger.jsonl").write_text("".join(lines) + "torn")
    (run / "reward/provenance.json").unlink()
    said = failure.seal(run)
    assert said.startswith(f"NOT SEALED: 1 of its artifacts, reward first: {run}/reward/provenance.json: no record; ")
    assert "its last line was cut off by a crash and is removed" in capsys.readouterr().err


def test_a_failure_before_the_first_attempt_is_one(job):
    j = job()
    say(j, "reward: error: results/r/sft/model: differs from its manifest; restore the file\n")
    assert look(j).state == "failed"
    assert "differs from its manifest" in look(j).detail


def test_the_log_of_a_successful_stage_reports_no_failure(job):
    """Its artifact was deleted since and must be made again."""
    j = job()
    say(j, "a warning\n")
    assert look(j).state == "waiting"
    say(j, "reward: error: no room\n")
    assert look(j).state == "failed"


def test_an_earlier_failure_does_not_matter_once_the_artifact_is_made(job):
    j = job(made=True, needed=False)
    attempt(j, ended=ended("failed", "ValueError"))
    assert look(j).state == "done"


def test_a_killed_stage_leaves_no_message(job):
    j = job()
    say(j, "")
    place = attempt(j)
    found = look(j)
    assert found.state == "failed"
    assert found.detail.startswith("killed without a word")
    (place / "attempts.jsonl").open("a").write('{"start": "20')  # its writer is running
    assert look(j) == found


@pytest.mark.parametrize("outcome", ["interrupted", "superseded"])
def test_an_interrupted_stage_has_not_failed(job, outcome):
    j = job()
    attempt(j, ended=ended(outcome, "stopped by SIGTERM after step 3; progress is saved, run the same command again"))
    found = look(j)
    assert found.state == "interrupted"
    assert found.detail.startswith("stopped by SIGTERM")


def test_a_stage_that_waits_for_people_has_not_failed_and_reports_their_progress(job):
    j = job(made=True, begun=True)
    attempt(j, ended=ended("waiting", "for people: 3 of 28 rankings are there; start …"))
    found = look(j)
    assert (found.state, found.detail) == ("waiting", "for people: 3 of 28 rankings are there; start …")
    assert status.failed([found]) == []
    upstream = look(job("other", after=("sft",)))
    assert upstream.detail == "for sft"


def test_a_running_stage_reports_its_progress(job, hold):
    j = job("policies/ppo", rule="ppo")
    rows = progress(90, datetime(2026, 1, 1)), progress(40, datetime.now(), "kl 0.1")
    attempt(j, rows=rows, job_id="77")
    assert look(j).state == "failed"
    hold(j)
    found = look(j)
    assert (found.state, found.slurm_job, found.progress["done"]) == ("running", "77", 40)
    assert 100 < found.left <= 120
    assert found.detail.startswith("40/100 steps, ")
    assert found.detail.endswith("left  kl 0.1")


def test_a_running_stage_whose_time_left_is_unknown_does_not_claim_to_be_nearly_done(job, hold):
    j = job()
    attempt(j, rows=(progress(0, datetime.now()) | {"left": None},))
    hold(j)
    assert look(j).left is None
    assert look(j).detail == "0/100 steps"


def test_a_truncated_progress_row_hides_nothing(job, hold):
    j = job()
    place = attempt(j, rows=(progress(40, datetime.now()),))
    with (place / "progress.jsonl").open("a") as f:
        f.write('{"time": "20\n')
    hold(j)
    assert look(j).progress["done"] == 40


def test_progress_of_an_earlier_attempt_does_not_count(job, hold):
    j = job()
    later = datetime.fromtimestamp(time.time() + 60, UTC).isoformat(timespec="seconds")
    attempt(j, rows=(progress(40, datetime.now()),), start=later)
    hold(j)
    assert look(j).progress is None
    assert look(j).state == "running"


def test_a_job_in_the_queue_is_running_and_says_what_it_waits_for(job):
    j = job(submitted=("81",))
    found = look(j, {"81": "PENDING (Resources)"})
    assert (found.state, found.detail, found.slurm_job) == ("running", "PENDING (Resources)", "81")
    assert look(j, {"82": "PENDING (Resources)"}).state == "waiting"


def test_an_attempt_whose_slurm_job_is_known_runs(job):
    j = job()
    attempt(j, job_id="77")
    assert look(j, {"77": "RUNNING"}).state == "running"
    attempt(j, job_id="77", ended=ended("failed", "ValueError"))
    assert look(j, {"77": "RUNNING"}).state == "failed"


def test_a_job_of_submitit_is_found_by_its_id(job):
    j = job("policies/ppo")
    Path("state/r/jobs").mkdir(parents=True)
    Path("state/r/jobs/policies.ppo.json").write_text('{"job": "90"}')
    assert look(j, {"90": "CONFIGURING"}).detail == "CONFIGURING"


def test_a_recent_job_is_starting_and_a_long_silent_one_failed(job):
    j = job(begun=True)
    say(j, "")
    assert (look(j).state, look(j).detail) == ("running", "starting")
    say(j, "", seconds_ago=2 * status.STARTING_SECONDS)
    assert look(j).state == "failed"


def test_shards_are_distinguished(job):
    one, two = (job(f"completions/{i}-of-2") for i in (0, 1))
    attempt(one, ended=ended("failed", "ValueError"))
    assert (look(one).state, look(two).state) == ("failed", "waiting")


def test_squeue_is_read_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status.slurm_queue() == {}
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '5|RUNNING|None'\necho '6_[1-3]|PENDING|Priority'\n")
    (tmp_path / "squeue").chmod(0o755)
    assert status.slurm_queue() == {"5": "RUNNING", "6_[1-3]": "PENDING (Priority)"}


def test_config_changes_are_reported_by_key(tmp_path):
    old = tmp_path / "c.json"
    old.write_text('{"config": {"beta": 0.1, "lora": {"r": 4}}, "seed": 3}')
    new = '{"config": {"beta": 0.7, "lora": {"r": 4}, "n": 2}, "seed": 4}'
    assert config_changes(old, new) == ["beta: 0.1 -> 0.7", "n: null -> 2", "seed: 3 -> 4"]
    assert config_changes(tmp_path / "none", new) == []


def test_many_changes_share_one_line():
    members = [status.StageStatus(f"completions/{i}-of-9", "completions", "done", "") for i in range(9)]
    few = [status.StageStatus("sft", "sft", "stale", "a"), status.StageStatus("dpo", "dpo", "stale", "b")]
    groups = status.grouped([*members, *few], lambda s: (s.rule, s.state))
    assert [status.group_name(group) for group in groups] == ["completions (9)", "sft", "dpo"]
    assert status.shared(["a", "a"]) == "a"
    assert status.shared(["a", "b", "c"]) == "a · 2 other reasons"
    assert listed([s.name for s in [*members, *few]]) == "completions (9), dpo, sft"
    assert sorted(["s/10", "s/9", "b"], key=_natural) == ["b", "s/9", "s/10"]


def test_the_screen_has_every_stage_and_the_next_command(job, capsys):
    failing = job()
    attempt(failing, ended=ended("failed", "ValueError"))
    status.print_status(
        [look(failing), look(job("sft", made=True, needed=False)), look(job("report", after=("reward",)))], RERUN
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["reward", "failed"], ["sft", "done"], ["report", "waiting"]]
    assert "1 done, 1 failed, 1 waiting" in lines
    assert f"    again  {RERUN} -- results/r/reward/manifest.json" in lines
    assert "\x1b" not in "".join(lines)  # colours are for terminals
