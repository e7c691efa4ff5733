"""The contract of a stage: whole artifacts or none, verified inputs, state by fingerprint, one writer, clear errors."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunetrail.contract import (
    Stage,
    list_files,
    main,
    parse_time_left,
    read_finished_rows,
    sha256_json,
    verify,
    write_json,
)
from tunetrail.errors import DataError, Interrupted

# A stage that copies its input a hundred times, keeping in its state how far it is.
SCRIPT = """
import sys, time
from tunetrail.contract import main

def run(stage):
    text = (stage.inputs["parent"] / "text.txt").read_text() if "parent" in stage.inputs else "x"
    done = stage.state / "done"
    count = len(done.read_text()) if done.exists() else 0
    for i in range(count, stage.config["n"]):
        (stage.work / "part.txt").write_text(text * i)
        with done.open("a") as f:
            f.write(".")
        time.sleep(stage.config.get("pause", 0))
        stage.stop.leave_if_requested(f"after {i + 1} of {stage.config['n']}")
    for i in range(stage.config["n"]):
        (stage.work / f"{i}.txt").write_text(text * 1000)
    return {"n": stage.config["n"], "value": stage.config.get("value")}

sys.exit(main(run))
"""


class Workspace:
    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "stage.py").write_text(SCRIPT)
        parent = folder / "parent"
        parent.mkdir()
        (parent / "text.txt").write_text("hello")
        write_json(
            parent / "manifest.json", {"schema": 1, "stage": "parent", "tokenizer": "t", "files": list_files(parent)}
        )

    def command(self, **config) -> list[str]:
        (self.folder / "copy.json").write_text(json.dumps({"stage": "copy", "seed": 1, "config": {"n": 20} | config}))
        return [
            sys.executable,
            "stage.py",
            "--config=copy.json",
            "--input=parent=parent/manifest.json",
            "--output=out/manifest.json",
            "--state=state",
        ]

    def start(
        self, *options: str, environment: dict | None = None, limit: int | None = None, **config
    ) -> subprocess.Popen:
        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [*self.command(**config), *options], cwd=self.folder, stderr=subprocess.PIPE, text=True,
            env=os.environ | (environment or {}), preexec_fn=limited,
        )  # fmt: skip

    def run(self, *options: str, **settings) -> tuple[int, str]:
        process = self.start(*options, **settings)
        error = process.communicate(timeout=60)[1]
        return process.returncode, error

    @property
    def manifest(self) -> Path:
        return self.folder / "out/manifest.json"


@pytest.fixture
def space(tmp_path):
    return Workspace(tmp_path)


def test_an_artifact_lists_its_files_and_records_its_origin(space):
    assert space.run() == (0, "")
    manifest = verify(space.manifest)
    assert [f["path"] for f in manifest["files"]][-1] == "part.txt"
    assert {f["path"] for f in manifest["files"]} >= {"metrics.json", "0.txt", "19.txt"}
    assert manifest["tokenizer"] == "t"
    provenance = json.loads((space.folder / "out/provenance.json").read_text())
    assert provenance["subject"]["manifest"] == sha256_json(manifest)
    assert provenance["parents"]["parent"]["manifest"] == sha256_json(
        json.loads((space.folder / "parent/manifest.json").read_text())
    )
    assert provenance["config"]["resolved"]["config"] == {"n": 20}
    for key in ("code", "packages", "seed", "start", "end", "host", "job_id", "attempts", "python"):
        assert key in provenance
    assert provenance["code"].keys() >= {"commit", "dirty"}
    assert provenance["attempts"][0]["ended"] == "done"


def test_equal_runs_give_equal_manifests(space):
    space.run()
    first = space.manifest.read_bytes()
    time.sleep(1.1)
    space.run()
    assert space.manifest.read_bytes() == first
    space.run(value=2)
    assert space.manifest.read_bytes() != first


def test_killed_at_any_moment_leaves_nothing_that_looks_finished(space):
    space.run()
    expected = space.manifest.read_bytes()
    rng = random.Random(0)
    for _ in range(8):
        subprocess.run(["rm", "-rf", "out", "state"], cwd=space.folder, check=True)
        process = space.start(pause=0.02)
        time.sleep(rng.uniform(0.05, 1.2))
        process.kill()
        process.communicate()
        if space.manifest.exists():
            verify(space.manifest)  # it ended before the kill, and then it is whole
        assert space.run(pause=0.02)[0] == 0
        assert json.loads(space.manifest.read_text()) == json.loads(expected)


def test_killed_while_publishing_keeps_state_for_the_next(space, monkeypatch, tmp_path):
    """Killed between the renames: no manifest, and running again completes."""
    space.run()
    expected = space.manifest.read_bytes()
    space.manifest.unlink()
    (space.folder / "out").rename(space.folder / ".out.old")
    assert space.run() == (0, "")
    assert space.manifest.read_bytes() == expected
    assert sorted(p.name for p in space.folder.iterdir() if p.name.startswith(".")) == []


def test_a_changed_input_stops_the_stage(space):
    (space.folder / "parent/text.txt").write_text("jello")
    code, error = space.run()
    assert code == 65
    assert (
        error
        == "copy: error: parent/text.txt: differs from its manifest; delete the folder and run its stage again, or restore the file\n"
    )
    (space.folder / "parent/text.txt").unlink()
    assert space.run()[1].startswith("copy: error: parent/text.txt: listed in the manifest but missing")
    (space.folder / "parent/manifest.json").write_text("{")
    assert "parent/manifest.json: not valid JSON" in space.run()[1]
    (space.folder / "parent/manifest.json").unlink()
    assert (
        space.run()[1] == "copy: error: parent/manifest.json: no manifest; run the stage that makes this folder first\n"
    )
    assert not space.manifest.exists()


def test_state_goes_by_config_inputs_and_part(space):
    for options, config in (((), {}), ((), {"value": 1}), (("--part=1/2",), {})):
        assert space.run(*options, **config)[0] == 0
    assert len(list((space.folder / "state").iterdir())) == 3
    space.run()
    assert len(list((space.folder / "state").iterdir())) == 3


def test_a_second_writer_is_kept_out(space):
    first = space.start(pause=0.3)
    time.sleep(1.0)
    code, error = space.run(pause=0.3)
    first.kill()
    first.communicate()
    assert code == 75
    assert f"in use by process {first.pid} on " in error
    assert "Traceback" not in error


def test_sigterm_saves_and_leaves_with_75(space):
    process = space.start(pause=0.05, n=100)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 75
    assert "interrupted: stopped by SIGTERM after" in error
    assert "progress is saved, run the same command again" in error
    done = len(next((space.folder / "state").glob("*/done")).read_text())
    assert 0 < done < 100
    assert space.run(pause=0.0, n=100)[0] == 0  # other pause, other fingerprint: starts anew
    assert space.run(pause=0.05, n=100)[0] == 0
    attempts = json.loads((space.folder / "out/provenance.json").read_text())["attempts"]
    assert [a["ended"].split(" ")[0] for a in attempts] == ["stopped", "done"]


def test_a_time_limit_is_kept(space):
    code, error = space.run(environment={"TUNETRAIL_TIME_LIMIT": "0"})
    assert code == 75
    assert "stopped by time limit after 1 of 20" in error
    code, error = space.run(environment={"TUNETRAIL_TIME_LIMIT": "soon"})
    assert (code, error) == (78, "copy: error: TUNETRAIL_TIME_LIMIT: must be a number of minutes, got 'soon'\n")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30:00", 30),
        ("1:30:00", 90),
        ("2-00:00:00", 2880),
        ("0:45", 0.75),
        ("UNLIMITED", None),
        ("", None),
        ("INVALID", None),
    ],
)
def test_slurm_time_left(text, minutes):
    assert parse_time_left(text) == minutes


def test_a_full_disk_is_one_line_and_the_old_artifact_stays(space):
    space.run()
    before = space.manifest.read_bytes()
    code, error = space.run(value=1, limit=2000)  # no file may grow past 2,000 bytes
    assert code in (74, -signal.SIGXFSZ)
    if code == 74:
        assert len(error.strip().splitlines()) == 1
    assert space.manifest.read_bytes() == before
    verify(space.manifest)


def test_inputs_of_different_tokenizers_are_refused(space):
    other = space.folder / "other"
    other.mkdir()
    write_json(other / "manifest.json", {"schema": 1, "stage": "other", "tokenizer": "u", "files": []})
    code, error = space.run("--input=other=other/manifest.json")
    assert code == 65
    assert (
        "were made with different tokenizers or chat templates (other: u, parent: t); rebuild them from one base model"
        in error
    )


def test_metrics_must_be_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(json.dumps({"stage": "c", "seed": 1, "config": {}}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        main(lambda stage: {"loss": float("nan")}, ["--config=c.json", "--output=out/manifest.json", "--state=state"])
    assert not Path("out/manifest.json").exists()


def test_errors_keep_their_exit_codes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(json.dumps({"stage": "c", "seed": 1, "config": {}}))

    def fails(error):
        def run(stage: Stage) -> dict:
            raise error

        return main(run, ["--config=c.json", "--output=out/manifest.json", "--state=state"])

    assert fails(DataError("row 3 is bad")) == 65
    assert capfd.readouterr().err == "c: error: row 3 is bad\n"
    assert fails(Interrupted("later")) == 75
    assert capfd.readouterr().err == "c: interrupted: later\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        fails(ZeroDivisionError())


def test_half_written_rows_are_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a":1}\n{"a":2}\n{"a":')
    assert read_finished_rows(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a":1}\n{"a":2}\n'
    assert read_finished_rows(tmp_path / "none.jsonl") == []
