"""The contract of a stage: complete artifacts or none, verified inputs, state by fingerprint, one writer, clear
errors."""

import hashlib
import importlib.metadata
import json
import os
import pkgutil
import random
import resource
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tunetrail import stages
from tunetrail.contract import runner
from tunetrail.contract import stop as stop_module
from tunetrail.contract.artifact import publish, verify
from tunetrail.contract.progress import read_progress
from tunetrail.contract.runner import main
from tunetrail.contract.stage import Attempt, Request, Stage
from tunetrail.contract.stop import Stop
from tunetrail.errors import ConfigError, DataError, Interrupted
from tunetrail.files import read_finished_rows, read_jsonl, write_json, write_jsonl
from tunetrail.launch import time_limit
from tunetrail.launch.time_limit import stage_environment
from tunetrail.models.checkpoints import keep, latest_checkpoint, mark_complete
from tunetrail.provenance.manifest import list_files, sha256_file
from tunetrail.provenance.record import Record, dependency, read_record

# A stage of n steps that keeps its progress in its state. Its result depends only on config and input.
SCRIPT = """
import sys, time
from tunetrail.contract.runner import main

def run(stage):
    text = (stage.inputs["parent"].folder / "text.txt").read_text()
    steps, done = stage.config["n"], stage.state / "done"
    for i in range(len(done.read_text()) if done.exists() else 0, steps):
        time.sleep(stage.config.get("pause", 0))
        with done.open("a") as f:
            f.write(".")
        if stage.config.get("deaf") is None:
            stage.stop.leave_if_requested(f"after {i + 1} of {steps}")
    for i in range(steps):
        (stage.work / "parts").mkdir(exist_ok=True)
        (stage.work / "parts" / f"{i}.txt").write_text(text * stage.config.get("repeat", 1000))
    return {"n": steps, "value": stage.config.get("value")}

if __name__ == "__main__":
    sys.exit(main(run))
"""


class Workspace:
    """A folder with the stage, its input and its output."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "stage.py").write_text(SCRIPT)
        self.add_input("parent", tokenizer="t")

    def add_input(self, role: str, **fields) -> None:
        (self.folder / role).mkdir()
        (self.folder / role / "text.txt").write_text("hello")
        self.seal(role, **fields)

    def seal(self, role: str, **fields) -> None:
        folder = self.folder / role
        write_json(folder / "manifest.json", {"schema": 1, "stage": role, "files": list_files(folder)} | fields)

    def arguments(self, **config) -> list[str]:
        (self.folder / "copy.json").write_text(json.dumps({"stage": "copy", "seed": 7, "config": {"n": 5} | config}))
        return [
            "--config=copy.json",
            "--input=parent=parent/manifest.json",
            "--output=out/manifest.json",
            "--state=state",
        ]

    def start(
        self, *options: str, environment: dict | None = None, limit: int | None = None, **config
    ) -> subprocess.Popen:
        """Starts the stage as a process; `limit`: the most bytes that a file it writes may have."""
        surroundings = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TUNETRAIL_"))}
        return subprocess.Popen(
            [sys.executable, "stage.py", *self.arguments(**config), *options],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
            env=surroundings | (environment or {}),
            preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    def run(self, *options: str, **settings) -> tuple[int, str]:
        process = self.start(*options, **settings)
        error = process.communicate(timeout=60)[1]
        return process.returncode, error

    def started(self, **config) -> subprocess.Popen:
        """Starts the stage as a process and waits until it works."""
        before = self.steps_done()
        process = self.start(**config)
        deadline = time.monotonic() + 30
        while self.steps_done() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return process

    def steps_done(self) -> int:
        return sum(len(path.read_text()) for path in self.folder.glob("state/*/done"))

    def states(self) -> set[str]:
        return {path.name for path in (self.folder / "state").iterdir() if path.is_dir()}

    def record(self) -> Record:
        return read_record(self.folder / "out")

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name.startswith("."))

    @property
    def manifest(self) -> Path:
        return self.folder / "out/manifest.json"


@pytest.fixture
def space(tmp_path) -> Workspace:
    return Workspace(tmp_path)


# ----------------------------------------------------------------------------- artifacts


def test_an_artifact_lists_its_files_and_records_its_origin(space):
    assert space.run("--part=0/1") == (0, "")
    manifest = verify(space.manifest)
    assert [f["path"] for f in manifest["files"]] == ["metrics.json", *(f"parts/{i}.txt" for i in range(5))]
    assert [f["size"] for f in manifest["files"][1:]] == [5000] * 5
    assert manifest["files"][1]["sha256"] == hashlib.sha256(b"hello" * 1000).hexdigest()
    assert (manifest["stage"], manifest["tokenizer"]) == ("copy", "t")
    assert json.loads((space.folder / "out/metrics.json").read_text()) == {"n": 5, "value": None}


def test_the_record_says_how_the_artifact_was_made(space):
    start = int(time.time())
    assert space.run()[0] == 0
    record = space.record()
    assert record.manifest == sha256_file(space.manifest)
    parent = sha256_file(space.folder / "parent/manifest.json")
    assert record.parents == {"parent": {"name": "../parent", "manifest": parent, "record": None}}
    assert record.config_file == {"stage": "copy", "seed": 7, "config": {"n": 5}}
    assert record.packages["torch"] == importlib.metadata.version("torch")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert record.code["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert record.code["dirty"] in (True, False, None)
    (attempt,) = record.attempts
    assert attempt["host"] == os.uname().nodename
    assert attempt["job_id"] is None
    assert attempt["python"] == ".".join(map(str, sys.version_info[:3]))
    assert attempt["ended"] == {"outcome": "done", "message": None}
    assert (attempt["start"], attempt["end"]) == (record.started, record.finished)
    assert start <= datetime.fromisoformat(record.started).timestamp() <= time.time()


def test_equal_runs_give_equal_manifests(space):
    space.run()
    first, started = space.manifest.read_bytes(), space.record().started
    shutil.rmtree(space.folder / "state")
    time.sleep(1.1)  # another second on the clock
    space.run()
    assert space.manifest.read_bytes() == first
    assert space.record().started != started
    space.run(value=2)
    assert space.manifest.read_bytes() != first


def test_files_have_the_permissions_of_the_umask(space):
    old = os.umask(0o027)
    try:
        space.run()
    finally:
        os.umask(old)
    for path in (space.folder / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# ----------------------------------------------------------------------------- killed


def test_killed_at_random_moments_leaves_nothing_that_looks_finished(space):
    assert space.run()[0] == 0
    expected = space.manifest.read_bytes()
    rng = random.Random(0)
    for _ in range(4):
        shutil.rmtree(space.folder / "out")
        shutil.rmtree(space.folder / "state")
        process = space.started(pause=0.05)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        if space.manifest.exists():
            verify(space.manifest)  # it ended before the kill, so it is complete
        assert space.run(pause=0.05)[0] == 0
        assert space.manifest.read_bytes() == expected


TOUCHING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")


def forked(space: Workspace, run: Callable[[Stage], dict], value: int, kill_at: int | None = None) -> int:
    """Runs a stage in a child and returns its exit code; SIGKILL hits it just before it changes the disk for the
    kill_at-th time. A child that got to the end tells how often that was in `changes`."""
    arguments = space.arguments(value=value)
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(space.folder)
    count = 0

    def hook(event: str, details: tuple) -> None:
        nonlocal count
        if event in TOUCHING or (event == "open" and isinstance(details[1], str) and set(details[1]) & set("wax+")):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = 99
    try:
        code = main(run, arguments)
    finally:
        if kill_at is None:
            Path("changes").write_text(str(count))
        os._exit(code)


def test_killed_before_any_change_of_the_disk_the_artifact_is_whole_or_absent(space):
    """At every moment that matters: while working, while publishing, between the renames."""

    def run(stage: Stage) -> dict:
        for name in ("a", "b"):
            (stage.work / name).write_text(name * stage.config["value"])
        return {"value": stage.config["value"]}

    assert forked(space, run, value=2) == 0
    new = space.manifest.read_bytes()
    assert forked(space, run, value=1) == 0
    old, changes = space.manifest.read_bytes(), int((space.folder / "changes").read_text())
    assert changes > 15
    shutil.copytree(space.folder, space.folder.with_name("before"))
    killed = whole = 0
    for moment in range(1, changes + 3):
        shutil.rmtree(space.folder)
        shutil.copytree(space.folder.with_name("before"), space.folder)
        code = forked(space, run, value=2, kill_at=moment)
        killed += code == -signal.SIGKILL
        if space.manifest.exists():
            verify(space.manifest)
            assert space.manifest.read_bytes() in (old, new)
            whole += 1
        assert forked(space, run, value=2) == 0
        assert space.manifest.read_bytes() == new
        verify(space.manifest)
        assert space.leftovers() == []
    assert killed >= changes
    assert whole < killed  # some moments were between the old artifact and the new one


def test_sigterm_saves_and_exits_with_75(space):
    process = space.started(pause=0.05, n=100)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 75
    done = space.steps_done()
    assert 0 < done < 100
    assert (
        error
        == f"copy: interrupted: stopped by SIGTERM after {done} of 100; progress is saved, run the same command again\n"
    )
    assert not space.manifest.exists()
    assert space.leftovers() == []


def test_the_next_attempt_continues_where_the_last_one_stopped(space):
    environment = {"TUNETRAIL_TIME_LIMIT": "0"}
    for step in (1, 2, 3):
        assert space.run(environment=environment)[0] == 75
        assert space.steps_done() == step
    assert space.run()[0] == 0
    attempts = space.record().attempts
    stopped = "stopped by time limit after {} of 5; progress is saved, run the same command again"
    assert [attempt["ended"] for attempt in attempts] == [
        *({"outcome": "interrupted", "message": stopped.format(step)} for step in (1, 2, 3)),
        {"outcome": "done", "message": None},
    ]
    assert space.record().started == attempts[0]["start"]


def test_a_killed_attempt_is_in_the_record(space):
    process = space.started(pause=0.2, n=4)
    process.kill()
    process.communicate()
    assert space.run(pause=0.2, n=4)[0] == 0
    assert [(attempt["ended"]["outcome"], attempt["end"] is None) for attempt in space.record().attempts] == [
        ("killed", True),
        ("done", False),
    ]


def test_a_stage_that_ignores_sigterm_still_completes(space):
    process = space.started(pause=0.05, n=10, deaf=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    verify(space.manifest)


# ----------------------------------------------------------------------------- time


@pytest.fixture
def clock(monkeypatch) -> Iterator[list[float]]:
    """A clock that advances only when told to; restores SIGTERM's handler."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 + now[0])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield now
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(("limit", "leaves_after"), [("100", 95), ("50", 45), ("20", 18), ("1", 0.9)])
def test_it_leaves_before_the_time_limit(clock, monkeypatch, limit, leaves_after):
    """Five minutes before it, or a tenth of a short limit."""
    monkeypatch.setenv("TUNETRAIL_TIME_LIMIT", limit)
    stop = Stop()
    clock[0] += 60 * leaves_after - 1
    assert not stop.requested()
    stop.leave_if_requested("nowhere")
    clock[0] += 2
    assert stop.requested()
    with pytest.raises(Interrupted, match="stopped by time limit after step 3; progress is saved"):
        stop.leave_if_requested("after step 3")


@pytest.mark.parametrize(("slow_start", "leaves_after"), [(0, 95), (20, 75), (110, 0)])
def test_a_slow_start_does_not_shorten_the_margin(clock, monkeypatch, slow_start, leaves_after):
    """The launcher says when the job ends: the stage leaves five minutes before, however long its start took."""
    monkeypatch.delenv("TUNETRAIL_TIME_LIMIT", raising=False)
    monkeypatch.setattr(time_limit, "minutes_left", lambda: 100)
    monkeypatch.setattr(os, "environ", stage_environment())
    clock[0] += 60 * slow_start
    stop = Stop()
    if leaves_after:
        clock[0] += 60 * leaves_after - 1
        assert not stop.requested()
        clock[0] += 2
    assert stop.requested()


@pytest.mark.parametrize(("limit", "end", "leaves_after"), [("20", 100, 18), ("200", 100, 95)])
def test_the_earlier_of_two_limits_holds(clock, monkeypatch, limit, end, leaves_after):
    monkeypatch.setenv("TUNETRAIL_TIME_LIMIT", limit)
    monkeypatch.setenv("TUNETRAIL_DEADLINE", str(time.time() + 60 * end))
    stop = Stop()
    clock[0] += 60 * leaves_after - 1
    assert not stop.requested()
    clock[0] += 2
    assert stop.requested()


def test_a_signal_during_an_agreement_takes_effect_at_the_next_one(monkeypatch):
    """In all processes alike: the others did not get the signal."""

    def agree(value):
        signal.raise_signal(signal.SIGTERM)
        return [value, None]

    stop = Stop()
    with monkeypatch.context() as patched:
        patched.setattr(stop_module, "of_all_processes", agree)
        assert not stop.requested()
    assert stop.requested()
    assert "stopped by SIGTERM at step 1" in str(stop.interruption("at step 1"))


def test_saves_are_spaced(clock, monkeypatch):
    monkeypatch.delenv("TUNETRAIL_CHECKPOINT_MINUTES", raising=False)
    assert Stop().interval == 600
    monkeypatch.setenv("TUNETRAIL_CHECKPOINT_MINUTES", "2")
    stop = Stop()
    clock[0] += 119
    assert not stop.save_due()
    clock[0] += 2
    assert stop.save_due()
    stop.saved()
    assert not stop.save_due()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.save_due()
    assert stop.reason == "SIGTERM"
    monkeypatch.setenv("TUNETRAIL_CHECKPOINT_MINUTES", "0")
    assert Stop().save_due()


# ----------------------------------------------------------------------------- inputs


def test_a_changed_input_stops_the_stage(space):
    mend = "delete the folder and run its stage again, or restore the file"
    text = space.folder / "parent/text.txt"
    text.write_text("jello")  # the same length
    assert space.run() == (65, f"copy: error: parent/text.txt: differs from its manifest; {mend}\n")
    text.write_text("hello!")
    assert space.run() == (65, f"copy: error: parent/text.txt: differs from its manifest; {mend}\n")
    text.unlink()
    assert space.run() == (65, f"copy: error: parent/text.txt: listed in the manifest but missing; {mend}\n")
    assert not space.manifest.exists()
    text.write_text("hello")
    os.utime(text, (1, 1))  # touching a file does not change it
    assert space.run() == (0, "")


def test_an_input_without_manifest_stops_the_stage(space):
    manifest = space.folder / "parent/manifest.json"
    manifest.write_text("{")
    code, error = space.run()
    assert code == 65
    assert error.startswith("copy: error: parent/manifest.json: not valid JSON (Expecting property name")
    assert error.endswith("; delete the folder and run its stage again\n")
    manifest.unlink()
    assert space.run() == (
        65,
        "copy: error: parent/manifest.json: no manifest; run the stage that makes this folder first\n",
    )


def test_inputs_of_different_tokenizers_are_refused(space):
    space.add_input("other", tokenizer="u")
    space.add_input("silent", tokenizer=None)
    others = ("--input=other=other/manifest.json", "--input=silent=silent/manifest.json")
    assert space.run(*others) == (
        65,
        "copy: error: the inputs were made with different tokenizers or chat templates (other: u, parent: t); "
        "rebuild them from one base model\n",
    )
    space.seal("other", tokenizer="t")
    assert space.run(*others) == (0, "")
    assert verify(space.manifest)["tokenizer"] == "t"


def test_a_missing_or_broken_config_is_reported(space):
    arguments = space.arguments()
    command = [sys.executable, "stage.py", "--config=none.json", *arguments[1:]]
    reply = subprocess.run(command, cwd=space.folder, capture_output=True, text=True, check=False)
    assert (reply.returncode, reply.stderr) == (78, "none: error: none.json: no such file\n")
    (space.folder / "copy.json").write_text("{'a': 1}")
    command[2] = arguments[0]
    reply = subprocess.run(command, cwd=space.folder, capture_output=True, text=True, check=False)
    assert reply.returncode == 78
    assert reply.stderr.startswith("copy: error: copy.json: not valid JSON: Expecting property name")


# ----------------------------------------------------------------------------- state


def test_state_depends_on_config_inputs_and_part(space):
    space.run()
    assert len(first := space.states()) == 1
    space.run()
    assert space.states() == first
    space.run(value=1)
    space.run("--part=1/2")
    assert len(space.states()) == 3
    (space.folder / "parent/text.txt").write_text("jello")
    space.seal("parent", tokenizer="t")
    space.run()
    assert len(space.states()) == 4


def test_a_second_writer_is_kept_out(space):
    first = space.started(pause=3)  # it must still work when the second one has imported all it needs
    state = next(iter(space.states()))
    code, error = space.run(pause=3)
    first.kill()
    first.communicate()
    assert code == 75
    assert error == (
        f"copy: interrupted: state/{state}/lock: in use by process {first.pid} on {os.uname().nodename}; "
        "wait for it to end, then run again\n"
    )
    assert space.run(pause=0.0)[0] == 0  # a killed process holds no lock


def test_an_attempt_that_was_stopped_ends_with_76_and_its_successors_artifact_stays(space):
    """It finds the folder gone in which it worked."""
    (space.folder / "stage.py").write_text(
        "import sys, time\nfrom pathlib import Path\nfrom tunetrail.contract.runner import main\n\n"
        "def run(stage):\n    (stage.state / 'begun').touch()\n"
        "    while not Path('go').exists():\n        time.sleep(0.01)\n"
        "    (stage.work / 'text').write_text('x')\n    return {}\n\nsys.exit(main(run))\n"
    )
    job = {"TUNETRAIL_LEASE_SECONDS": "0.5", "SLURM_JOB_ID": "1"}
    first = space.start(environment=job)
    deadline = time.monotonic() + 120
    while not list(space.folder.glob("state/*/begun")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    (space.folder / "go").touch()
    assert space.run(environment=job)[0] == 0
    published = (space.folder / "out/manifest.json").read_bytes()
    first.send_signal(signal.SIGCONT)
    error = first.communicate(timeout=120)[1]
    assert (first.returncode, error.count("\n")) == (76, 1), error
    assert "another attempt has taken over while this one was silent" in error
    assert (space.folder / "out/manifest.json").read_bytes() == published


def test_checkpoints_are_removed_once_the_artifact_exists(space):
    (space.folder / "stage.py").write_text(
        "import sys\nfrom tunetrail.contract.runner import main\n\ndef run(stage):\n"
        "    for name in ('checkpoint-1', 'tensorboard'):\n        (stage.state / name).mkdir()\n"
        "    return {}\n\nsys.exit(main(run))\n"
    )
    assert space.run()[0] == 0
    state = space.folder / "state" / space.states().pop()
    assert sorted(path.name for path in state.iterdir()) == [
        "attempts.published.jsonl",
        "lock",
        "log.txt",
        "tensorboard",
    ]


def test_half_written_rows_are_discarded(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a":1}\n{"a":2}\n{"a":')
    assert read_finished_rows(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a":1}\n{"a":2}\n'
    assert read_finished_rows(tmp_path / "none.jsonl") == []
    write_jsonl(path, [{"b": "é\n"}, {}])
    assert path.read_text(encoding="utf-8") == '{"b":"é\\n"}\n{}\n'
    assert read_jsonl(path) == read_finished_rows(path) == [{"b": "é\n"}, {}]


# ----------------------------------------------------------------------------- errors


def test_a_file_too_large_is_one_line_and_the_old_artifact_stays(space):
    space.run()
    before = space.manifest.read_bytes()
    assert space.run(value=1, limit=2000) == (74, "copy: error: out: File too large\n")
    assert space.manifest.read_bytes() == before
    verify(space.manifest)
    assert space.leftovers() == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 256 kB. Only root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_the_old_artifact_stays(small_disk):
    space = Workspace(small_disk)
    assert space.run() == (0, "")
    before = space.manifest.read_bytes()
    assert space.run(repeat=20_000) == (74, "copy: error: out: No space left on device\n")
    assert space.manifest.read_bytes() == before
    verify(space.manifest)
    assert space.leftovers() == []
    assert space.run(value=2) == (0, "")  # with free space it works again


def test_metrics_must_be_numbers(space, monkeypatch):
    monkeypatch.chdir(space.folder)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            in_process(lambda stage, value=value: {"loss": value})
    assert not space.manifest.exists()


def in_process(run: Callable[[Stage], dict]) -> int:
    """Runs a stage in the current folder, without inputs. Restores SIGTERM's handler."""
    Path("c.json").write_text(json.dumps({"stage": "c", "seed": 1, "config": {}}))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return main(run, ["--config=c.json", "--output=out/manifest.json", "--state=state"])
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_errors_keep_their_exit_codes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def fails(error: BaseException) -> int:
        def run(stage: Stage) -> dict:
            raise error

        return in_process(run)

    for error, code, line in (
        (DataError("row 3 is bad"), 65, "c: error: row 3 is bad\n"),
        (ConfigError("a: is bad\nb: is bad"), 78, "c: error: a: is bad\nc: error: b: is bad\n"),
        (Interrupted("later"), 75, "c: interrupted: later\n"),
        (OSError(28, "No space left on device", "x/y"), 74, "c: error: x/y: No space left on device\n"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            74,
            "c: error: out: No space left on device\n",
        ),
    ):
        assert fails(error) == code
        assert capfd.readouterr().err == line
    for fault in (
        ZeroDivisionError(),
        FileNotFoundError(2, "No such file", "x"),
    ):  # a bug keeps its traceback
        with pytest.raises(type(fault)):
            fails(fault)
    ends = [
        "{outcome}: {message}".format(**attempt["ended"])
        for attempt in read_jsonl(next(Path("state").glob("*/attempts.jsonl")))
    ]
    assert ends == [
        "failed: DataError",
        "failed: ConfigError",
        "interrupted: later",
        "failed: OSError",
        "failed: RuntimeError",
        "failed: ZeroDivisionError",
        "failed: FileNotFoundError",
    ]
    assert not Path("out").exists()


def test_publish_alone_by_hand(tmp_path, monkeypatch):
    """The smallest artifact, with every byte of its manifest known."""
    monkeypatch.chdir(tmp_path)
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "a.txt").write_text("a")
    stage = Stage(Request("s", {}, {"seed": 1}, tmp_path / "out"), {}, Attempt(work, tmp_path / "state", stop=None))  # type: ignore[arg-type]
    attempt = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:00:01+00:00", "host": "h", "job_id": "5"}
    publish(stage, {}, [attempt])
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == {
        "schema": 1,
        "stage": "s",
        "tokenizer": None,
        "tensors": [],
        "files": [
            {"path": "a.txt", "size": 1, "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"},
            {
                "path": "metrics.json",
                "size": 3,
                "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
            },
        ],
    }
    record = read_record(tmp_path / "out")
    assert (record.attempts, record.started, record.finished) == ([attempt], attempt["start"], attempt["end"])


def test_a_second_writer_with_another_config_is_kept_out_of_the_same_output(space):
    first = space.started(pause=1)
    code, error = space.run(value=9)
    assert (code, "state/out.lock: in use by process" in error) == (75, True)
    assert first.wait(timeout=60) == 0
    assert json.loads((space.folder / "out/metrics.json").read_text())["value"] is None


def test_a_truncated_record_of_attempts_stops_nothing(space):
    space.run(environment={"TUNETRAIL_TIME_LIMIT": "0"})
    record = next(space.folder.glob("state/*/attempts.jsonl"))
    record.write_text(record.read_text() + '{"start": "20')
    assert space.run() == (0, "")
    assert [attempt["ended"]["outcome"] for attempt in space.record().attempts] == ["interrupted", "done"]


DAMAGE = [b"{", b"\0" * 9, b"\xff\xfe", b"5", b"{}", b"[" * 100_000]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_costs_what_comes_after_it_and_is_kept(tmp_path, caplog, damage):
    path = tmp_path / "rows.jsonl"
    before = b'{"id":1}\n' + damage + b'\n{"id":2}\n{"id'
    path.write_bytes(before)
    assert read_finished_rows(path, "id") == [{"id": 1}]
    assert path.read_bytes() == b'{"id":1}\n'
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == before
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: damaged in line 2; set aside as rows.jsonl.damaged, going on from the rows before"
    ]


@pytest.mark.parametrize("damage", [*DAMAGE, b'{"start": "x", "ended": null}', b'{"start": "x", "ended": {}}'])
def test_a_damaged_state_costs_the_state_and_no_more(tmp_path, monkeypatch, damage):
    """Attempts, a lock, the progress and the digests, all at once; the checkpoint before the damaged one is used."""
    monkeypatch.chdir(tmp_path)
    found = []

    def interrupted(stage: Stage) -> dict:
        for n in (1, 2):
            (stage.state / f"checkpoint-{n}").mkdir()
            (stage.state / f"checkpoint-{n}/model").write_text("x")
            mark_complete(stage, stage.state / f"checkpoint-{n}")
        raise Interrupted("stopped")

    def resumed(stage: Stage) -> dict:
        found.append((latest_checkpoint(stage) or Path("none")).name)
        return {}

    assert in_process(interrupted) == 75
    [state] = (path for path in Path("state").iterdir() if path.is_dir())
    for name in ("attempts.jsonl", "lock", "progress.jsonl", "checkpoint-2/complete.json"):
        (state / name).write_bytes(damage + b"\n")
    assert read_progress(state / "progress.jsonl") == []
    assert in_process(resumed) == 0
    assert found == ["checkpoint-1"]


def test_what_a_resume_needs_is_on_the_disk_before_and_after_its_rename(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order: list[tuple[str, str]] = []
    rename, fsync = Path.rename, os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda handle: order.append(("sync", os.readlink(f"/proc/self/fd/{handle}"))) or fsync(handle)
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: order.append(("rename", f"{a.resolve()}")) or rename(a, b))

    def run(stage: Stage) -> dict:
        (stage.state / "kept").mkdir()
        keep(stage, 1, lambda folder: [folder.mkdir(), (folder / "model").write_text("x")])
        raise Interrupted("stopped")

    assert in_process(run) == 75
    renames = [(n, name) for n, (what, name) in enumerate(order) if what == "rename"]
    assert {Path(name).name for _, name in renames} == {"attempts.new", "1.new"}
    for n, name in renames:
        assert order[n - 1] == ("sync", name)
        assert order[n + 1] == ("sync", str(Path(name).parent))


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_state_and_caches_follow_the_umask_too(tmp_path, monkeypatch, umask):
    """A group goes on with a run of one of its members; and what is private stays so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNETRAIL_DIGESTS", str(tmp_path / "digests"))
    tmp_path.chmod(0o2700)  # what is made in it belongs to its group, and so on downwards

    def run(stage: Stage) -> dict:
        for folder in (stage.state / "checkpoint-1", stage.state / "kept/1.new"):
            folder.mkdir(parents=True, mode=0o700)
            (folder / "model.safetensors").touch(0o600)
        mark_complete(stage, stage.state / "checkpoint-1")
        keep(stage, 2, lambda folder: [folder.mkdir(0o700), (folder / "model.safetensors").touch(0o600)])
        shutil.rmtree(stage.state / "kept/1.new")
        raise Interrupted("stopped")

    before = os.umask(umask)
    try:
        assert in_process(run) == 75
        paths = list(Path("state").rglob("*"))
        Path("state").rename("old")
        assert in_process(write_big) == 0
    finally:
        os.umask(before)
    Path("state").rename("new")
    Path("old").rename("state")
    assert {"model.safetensors", "lock", "log.txt", "attempts.jsonl"} <= {path.name for path in paths}
    for path in [*paths, *Path("out").rglob("*"), *Path("digests").rglob("*"), *Path("new").rglob("*")]:
        expected = 0o2000 | 0o777 & ~umask if path.is_dir() else 0o666 & ~umask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(expected), path


@pytest.mark.parametrize(
    ("variable", "unit"),
    [
        ("TUNETRAIL_TIME_LIMIT", "minutes"),
        ("TUNETRAIL_CHECKPOINT_MINUTES", "minutes"),
        ("TUNETRAIL_DEADLINE", "seconds since 1970"),
    ],
)
@pytest.mark.parametrize("value", ["soon", "nan", "-5", "inf"])
def test_metrics_that_are_no_numbers_are_refused(clock, monkeypatch, variable, unit, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        Stop()
    assert str(error.value) == f"{variable}: must be a number of {unit}, 0 or more, got {value!r}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "all of it: Input should be a valid dictionary"),
        ("{}", "files: Field required"),
        ('{"files": [{"path": "text.txt"}]}', "files.0.size: Field required"),
        ('{"files": 3}', "files: Input should be a valid list"),
    ],
)
def test_a_file_that_is_no_manifest_is_reported(space, content, reason):
    (space.folder / "parent/manifest.json").write_text(content)
    line = f"copy: error: parent/manifest.json: is no manifest ({reason}); delete the folder and run its stage again\n"
    assert space.run() == (65, line)


def test_a_signature_that_is_being_written_stops_no_stage(space):
    """`audit seal --key` may be at work while a stage reads the artifact."""
    (space.folder / "parent/.provenance.dsse.json.x1y2").write_text("{")
    assert space.run() == (0, "")


def test_an_extra_file_stops_the_stage(space):
    (space.folder / "parent/model").mkdir()
    (space.folder / "parent/model/chat_template.jinja").write_text("{{ messages }}")
    assert space.run() == (
        65,
        "copy: error: parent/model/chat_template.jinja: is not in the manifest; "
        "remove it, or delete the folder and run its stage again\n",
    )


def test_a_file_that_a_stage_did_not_write_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        in_process(lambda stage: {"a": len(Path("nowhere").read_text())})


@pytest.mark.parametrize(
    ("end", "code", "left"), [(None, 0, False), (Interrupted("later"), 75, False), (DataError("bad"), 65, True)]
)
def test_a_process_group_is_destroyed_unless_others_may_wait_in_it(tmp_path, monkeypatch, end, code, left):
    import torch.distributed as distributed

    def run(stage: Stage) -> dict:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        if end:
            raise end
        return {}

    monkeypatch.chdir(tmp_path)
    assert in_process(run) == code
    assert distributed.is_initialized() is left
    if left:
        distributed.destroy_process_group()


def with_input(run: Callable[[Stage], dict], output: str) -> int:
    """Like `in_process`, with the folder `first` as input."""
    Path("c.json").write_text(json.dumps({"stage": "c", "seed": 1, "config": {"output": output}}))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return main(
            run,
            [
                "--config=c.json",
                "--input=first=first/manifest.json",
                f"--output={output}/manifest.json",
                "--state=state",
            ],
        )
    finally:
        signal.signal(signal.SIGTERM, handler)


def write_big(stage: Stage) -> dict:
    (stage.work / "big").write_text("x" * 1000)
    return {}


def test_an_input_replaced_while_a_stage_runs_is_recorded_as_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_process(write_big) == 0
    Path("out").rename("first")
    before = sha256_file(Path("first/manifest.json"))

    def run(stage: Stage) -> dict:
        Path("first/manifest.json").write_text("{}")
        return {}

    assert with_input(run, "second") == 0
    assert read_record(Path("second")).parents["first"]["manifest"] == before


@pytest.mark.parametrize("at", ["save", "end"])
def test_an_input_that_changed_after_it_was_verified_is_not_learnt_from(tmp_path, monkeypatch, capfd, at):
    """Not even where the very size and times are restored: neither a save nor an artifact comes of it."""
    monkeypatch.chdir(tmp_path)
    assert in_process(write_big) == 0
    Path("out").rename("first")

    def run(stage: Stage) -> dict:
        path = stage.inputs["first"].folder / "big"
        before = path.stat()
        path.write_text("y" * 1000)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if at == "save":
            (stage.state / "checkpoint-1").mkdir()
            mark_complete(stage, stage.state / "checkpoint-1")
        return {}

    assert with_input(run, "second") == 65
    assert "first/big: differs from its manifest" in capfd.readouterr().err
    assert not Path("second").exists()
    assert not list(Path("state").glob("*/checkpoint-1/complete.json"))


def test_what_nfs_leaves_of_a_removed_file_is_no_part_of_an_artifact(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = f".nfs{'0' * 24}"

    def run(stage: Stage) -> dict:
        (stage.work / left).write_text("x")
        return {}

    assert in_process(run) == 0
    Path("out", left).unlink()
    verify(Path("out/manifest.json"))
    Path("out", left).write_text("x")
    verify(Path("out/manifest.json"))
    Path("out/.nfs.py").write_text("x")
    with pytest.raises(DataError, match=r"\.nfs\.py: is not in the manifest"):
        verify(Path("out/manifest.json"))


def test_unchanged_files_are_hashed_once_per_run(tmp_path, monkeypatch):
    import tunetrail.provenance.manifest as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNETRAIL_DIGESTS", "digests")
    hashed = []
    monkeypatch.setattr(module, "sha256_file", lambda path: hashed.append(Path(path).name) or sha256_file(path))
    assert in_process(write_big) == 0
    Path("out").rename("first")
    assert hashed.count("big") == 1  # when it was published
    assert with_input(lambda stage: {}, "second") == 0
    assert with_input(lambda stage: {}, "third") == 0
    assert hashed.count("big") == 1
    content = Path("first/big").read_text()
    Path("first/big").write_text("y" + content[1:])
    assert with_input(lambda stage: {}, "fourth") == 65


def test_an_artifact_published_before_the_kill_is_not_made_again(tmp_path, monkeypatch):
    """Killed while it cleaned up: Snakemake removes the manifest, the checkpoints are gone, the artifact is
    complete."""
    monkeypatch.chdir(tmp_path)
    runs = []

    def run(stage: Stage) -> dict:
        runs.append(stage.name)
        return write_big(stage)

    def killed() -> None:
        [state] = (path for path in Path("state").iterdir() if path.is_dir())
        Path("out/manifest.json").rename(state / "manifest.json")

    assert in_process(run) == 0
    manifest, record = Path("out/manifest.json").read_bytes(), Path("out/provenance.json").read_bytes()
    killed()
    assert in_process(run) == 0
    assert (len(runs), Path("out/manifest.json").read_bytes()) == (1, manifest)
    assert Path("out/provenance.json").read_bytes() == record
    assert in_process(run) == 0  # an explicit rerun without an interruption runs
    assert len(runs) == 2
    killed()
    Path("out/big").write_text("y" * 1000)
    assert in_process(run) == 0
    assert (len(runs), Path("out/manifest.json").read_bytes()) == (3, manifest)


def test_an_edited_user_file_is_read_again(tmp_path, monkeypatch):
    """Snakemake removes the manifest before it reruns a stage, as if the stage had been killed at the end."""
    monkeypatch.chdir(tmp_path)

    def run(stage: Stage) -> dict:
        digest = sha256_file(Path("rows.txt"))
        stage.draft.dependencies.append(dependency("source", "rows", digest, files={"rows.txt": digest}))
        shutil.copy("rows.txt", stage.work)
        return {}

    Path("rows.txt").write_text("one")
    assert in_process(run) == 0
    for content in ("one", "two"):
        Path("rows.txt").write_text(content)
        Path("out/manifest.json").unlink()
        assert in_process(run) == 0
        assert Path("out/rows.txt").read_text() == content


def test_a_stage_for_one_process_refuses_several(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert in_process(write_big) == 78
    line = "c: error: this stage runs in one process, and 2 were started (WORLD_SIZE); start one\n"
    assert capfd.readouterr().err == line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(stages.__path__) if module.name != "registry"]
)
def test_stages_that_train_run_in_several_processes(name, monkeypatch):
    told = []
    monkeypatch.setattr(runner, "main", lambda run, **options: told.append(options))
    with pytest.raises(SystemExit):
        runpy.run_module(f"tunetrail.stages.{name}", run_name="__main__")
    assert told == [{"distributed": name in ("sft", "reward", "dpo", "orpo", "simpo", "kto", "ppo")}]


def test_a_users_scorer_is_in_the_record_and_must_not_change_after_planning(space):
    mine = space.folder / "mine.py"
    mine.write_text("def score(*_): return 1\n")
    digest = sha256_file(mine)
    space.arguments()
    config = json.loads((space.folder / "copy.json").read_text())
    scorer = {"scorer": "python", "path": "mine.py", "sha256": digest}
    (space.folder / "scored.json").write_text(json.dumps(config | {"scorers": {"mine": scorer}}))
    command = ["--config=scored.json", *space.arguments()[1:]]

    def run() -> tuple[int, str]:
        reply = subprocess.run([sys.executable, "stage.py", *command], cwd=space.folder, capture_output=True, text=True,
            check=False)  # fmt: skip
        return reply.returncode, reply.stderr

    assert run()[0] == 0
    [found] = [d for d in read_record(space.folder / "out").dependencies if d["annotations"]["role"] == "scorer"]
    assert (found["name"], found["digest"]) == ("mine", {"sha256": digest})
    assert found["annotations"]["files"] == {"../mine.py": digest}
    (space.folder / "out/manifest.json").unlink()
    mine.write_text("def score(*_): return 2\n")
    assert run() == (65, "scored: error: scorers.mine: mine.py differs from what it was when this run was planned; run "
                         "snakemake again\n")  # fmt: skip
    mine.unlink()
    assert run()[1].endswith("scorers.mine: mine.py is missing; run snakemake again\n")
