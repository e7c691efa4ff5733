"""The contract every stage keeps: verified inputs, resumable state, atomic publishing, a record.

A stage is a module with `run(stage) -> metrics`, called as

    python -m tunetrail.stages.<stage> --config C.json --input role=…/manifest.json … \
        --output OUT/manifest.json --state STATE

and `main(run)` does the rest:

1. every input folder is checked against its manifest; a byte that differs stops the stage. With $TUNETRAIL_DIGESTS
   files are not hashed again that have not changed, by size, inode and times, since they were hashed last;
2. the state folder is `STATE/<fingerprint>`, the digest of the config and the input manifests, so a
   changed hyperparameter never meets an old optimizer state; a lease keeps a second writer out;
3. `run` fills `stage.work`, a sibling of the output folder, with files;
4. `metrics.json`, `provenance.json` and, last, `manifest.json` are added, everything is fsynced and
   renamed into place: a killed stage leaves nothing that looks finished.

`metrics.json` holds results only (no times, no hosts), so equal runs give equal manifests. Times,
hosts and attempts are in `provenance.json`, which the manifest does not list. See `tunetrail.provenance`.

An artifact that is there but for its manifest (its job was killed at the very end, or Snakemake removed the manifest of
a job whose head had died) is not made again: `finished` compares it with what its record says.

Exit codes: 0 done; 75 interrupted with progress saved; 76 another attempt has taken over; 65 bad data; 78 bad config;
74 the disk failed; else a fault.
"""

import argparse
import errno
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunetrail.config import canonical_json
from tunetrail.errors import ConfigError, DataError, Displaced, Interrupted, TunetrailError, Waiting
from tunetrail.lease import Lease, hold, lease_seconds
from tunetrail.provenance.manifest import (
    BESIDE,
    MANIFEST,
    METRICS,
    PROVENANCE,
    DigestCache,
    build,
    canonical,
    is_inside,
    parallel,
    read_manifest,
    sha256_bytes,
    sha256_file,
    sha256_json,
    walk,
)
from tunetrail.provenance.record import build as build_record
from tunetrail.provenance.record import (
    code_state,
    dependency,
    energy_joules,
    environment,
    exact,
    parent_of,
    read_record,
)

# What a user can mend: no room, no right, a disk that failed. Any other OSError is a fault and keeps its traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

ANOTHER = "another attempt of this stage"
LOST = "lost"
ATTEMPTS = "attempts.jsonl"
KEPT = "kept"
"""Folder of the state for models of steps along the way, which the artifact gets too."""

log = logging.getLogger("tunetrail")


# ----------------------------------------------------------------------------- inputs


def verify(manifest_path: Path, cache: DigestCache | None = None) -> dict:
    """Checks a folder against its manifest and returns the manifest. Raises DataError naming what differs.

    Args:
        cache: digests of files that have not changed since they were hashed; None: every byte is read.
    """
    manifest, folder = read_manifest(manifest_path), manifest_path.parent
    mend = "delete the folder and run its stage again, or restore the file"
    listed = {entry["path"]: entry for entry in manifest["files"]}
    for name, entry in listed.items():
        path = folder / name
        if not is_inside(name):
            raise DataError(f"{manifest_path}: lists {name}, which is outside the folder; delete the folder and run its stage again")  # fmt: skip
        if not path.is_file():
            raise DataError(f"{path}: listed in the manifest but missing; {mend}")
        if path.stat().st_size != entry["size"]:
            raise DataError(f"{path}: differs from its manifest; {mend}")
    digests = parallel((cache or DigestCache(None)).sha256, [folder / name for name in listed])
    for (name, entry), digest in zip(listed.items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise DataError(f"{folder / name}: differs from its manifest; {mend}")
    for path in walk(folder):  # a file more can change what from_pretrained loads
        name = path.relative_to(folder).as_posix()
        if name not in listed and name not in BESIDE and not path.name.startswith(".nfs"):
            raise DataError(f"{path}: is not in the manifest; remove it, or delete the folder and run its stage again")
    return manifest


# ----------------------------------------------------------------------------- time and signals


def _minutes(variable: str) -> float | None:
    """An environment variable in minutes; None where it is not set. Raises ConfigError."""
    if not (text := os.environ.get(variable)):
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise ConfigError(f"{variable}: must be a number of minutes, 0 or more, got {text!r}")
    return minutes


def _minutes_left() -> float | None:
    """Minutes the allocation has left: $TUNETRAIL_TIME_LIMIT (minutes from now), or what Slurm says; None: no limit."""
    limit, job = _minutes("TUNETRAIL_TIME_LIMIT"), os.environ.get("SLURM_JOB_ID")
    if limit is not None or job is None:
        return limit
    try:
        reply = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):  # in a container there may be no squeue
        return None
    # An array's first id names all its tasks: the shortest time is safe.
    left = [parse_time_left(line.strip()) for line in reply.stdout.splitlines()] if reply.returncode == 0 else []
    return min((minutes for minutes in left if minutes is not None), default=None)


def parse_time_left(text: str) -> float | None:
    """Slurm's time left (`D-HH:MM:SS`, `HH:MM:SS`, `MM:SS`) in minutes; None where there is no limit.

    >>> parse_time_left("1-02:00:30")
    1560.5
    """
    if not text or not text[0].isdigit():
        return None
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 1440 + seconds / 60


def _process_group() -> Any:
    """torch.distributed where this stage runs in several processes, else None; stages without torch do not import it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def of_all_processes(value: Any) -> list[Any]:
    """What every process of the stage calls this with, by rank."""
    if not (group := _process_group()):
        return [value]
    values = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


class Stop:
    """Says when to save and when to leave: on SIGTERM, before the allocation's time is over, or for another attempt.

    `save_due()` is asked after each step; `$TUNETRAIL_CHECKPOINT_MINUTES` (default 10; 0: after every
    step) spaces the saves. Saving never changes a result, so neither does the spacing. The processes of a stage
    answer alike, since they save and leave together: what one was told holds for all. Where another attempt has taken
    over, asking raises Displaced in all of them, before anything is saved.
    """

    def __init__(self) -> None:
        left = _minutes_left()
        self.deadline = None if left is None else time.monotonic() + 60 * max(left * 0.9, left - 5)
        minutes = _minutes("TUNETRAIL_CHECKPOINT_MINUTES")
        self.interval = 60 * (10 if minutes is None else minutes)
        self.last_save = time.monotonic()
        self.reason: str | None = None
        self.leases: list[Lease] = []
        self.asked = self.looked = -math.inf
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.reason = signal.Signals(signum).name

    def requested(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "time limit"
        if self.reason is None and self.leases and time.monotonic() - self.asked >= 1:
            self.asked = time.monotonic()
            if who := next(filter(None, (lease.wanted_by() for lease in self.leases)), None):
                self.reason = f"{ANOTHER} ({who})"
        # As often as the lease is renewed: it costs the file server a new file.
        if self.leases and time.monotonic() - self.looked >= lease_seconds() / 6:
            self.looked = time.monotonic()
            if any(lease.lost() for lease in self.leases):
                self.reason = LOST
        self.reason = next((reason for reason in of_all_processes(self.reason) if reason), None)
        if self.reason == LOST:
            raise Displaced("another attempt has taken over while this one was silent; it goes on, this one ends")
        return self.reason is not None

    def interruption(self, progress: str) -> Interrupted:
        """What to raise once `requested`, where all progress is on disk."""
        if str(self.reason).startswith(ANOTHER):
            return Displaced(f"stopped for {self.reason} {progress}; progress is saved, and it goes on")
        return Interrupted(f"stopped by {self.reason} {progress}; progress is saved, run the same command again")

    def save_due(self) -> bool:
        due = time.monotonic() - self.last_save >= self.interval
        return self.requested() or any(of_all_processes(due))

    def saved(self) -> None:
        self.last_save = time.monotonic()

    def leave_if_requested(self, progress: str) -> None:
        """Raises Interrupted. Call it where all progress is on disk."""
        if self.requested():
            raise self.interruption(progress)


# ----------------------------------------------------------------------------- the stage


@dataclass
class Stage:
    """What a stage's `run` gets."""

    name: str
    config: dict[str, Any]
    """The stage's own block."""
    shared: dict[str, Any]
    """The other keys of its config file: seed, precision, …"""
    inputs: dict[str, Path]
    """Role -> input folder, verified."""
    output: Path
    """Where the artifact will be. Write nothing there: fill `work`."""
    work: Path
    """An empty folder that becomes the artifact."""
    state: Path
    """Survives failure; the place for checkpoints and finished parts."""
    stop: Stop
    parents: dict[str, dict] = field(default_factory=dict)
    """Role -> the input's manifest."""
    origins: dict[str, dict] = field(default_factory=dict)
    """Role -> what the record says of the input, as it was when the stage began: see `provenance.record.parent_of`."""
    dependencies: list[dict] = field(default_factory=list)
    """What only the stage knows of its origins (data sources, packages, labels), made by `provenance.record.dependency`."""
    about: tuple[str, ...] = ()
    """Roles of the inputs that the artifact is a statement about: the model of an evaluation."""
    training_flops: float | None = None
    """See `models.loading.training_flops`; None where nothing is trained."""
    cache: DigestCache = field(default_factory=lambda: DigestCache(None))
    saves: list[dict] = field(default_factory=list)
    """Name and digest of the last two states this attempt could be resumed from, newest last."""
    note: Callable[[str, Any], None] = lambda key, value: None
    """Writes something into the record of this attempt at once: a killed attempt cannot do so later."""
    tokenizer_digest: str | None = None
    part: tuple[int, int] = (0, 1)
    """(i, n): this is the i-th of n shards."""
    leases: list[Lease] = field(default_factory=list)
    """On state and output, in the process that writes."""

    def is_displaced(self) -> bool:
        """Whether another attempt has taken over: then nothing more is to be written."""
        return any(lease.lost() for lease in self.leases)

    def check_leases(self) -> None:
        """Before anything is written that others read. Raises Displaced where another attempt has taken over."""
        for lease in self.leases:
            lease.check()

    @property
    def seed(self) -> int:
        return self.shared["seed"]

    def rows(self, role: str, name: str) -> list[dict]:
        """The rows of a JSONL file in an input folder."""
        return read_jsonl(self.inputs[role] / name)


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def read_finished_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file that a killed stage was appending to; a half-written last line is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.writelines(canonical_json(row) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    path.write_text(
        json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def processes() -> int:
    """How many processes were started for this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True in the one process that writes (rank 0 of a distributed stage)."""
    return int(os.environ.get("RANK", "0")) == 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _settle(folder: Path) -> None:
    """Readable by whom the umask allows (safetensors writes 0600, which shuts a group out), and on disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(stage: Stage, metrics: dict, attempts: list[dict]) -> None:
    """Turns `stage.work` into the artifact at `stage.output`, whole or not at all."""
    write_json(stage.work / METRICS, metrics)
    content = build(stage.work)
    manifest = _manifest(stage, content)
    parents = stage.origins
    # What was learnt from labels names them, however far down they were collected.
    inherited = [d for parent in parents.values() if parent["labels"] for d in parent["labels"]]
    own = [d for d in stage.dependencies if d not in inherited]
    tokenizer = [dependency("tokenizer", "tokenizer and chat template", stage.tokenizer_digest)] if stage.tokenizer_digest else []  # fmt: skip
    log_file = stage.state / "log.txt"
    record = build_record(
        stage=stage.name,
        part=stage.part,
        config=stage.shared | {"config": stage.config},
        manifest=manifest,
        output=stage.output,
        parents=parents,
        dependencies=[*own, *_once(inherited), *tokenizer],
        attempts=attempts,
        metrics=sha256_file(stage.work / METRICS),
        training_flops=stage.training_flops,
        byproducts=[{"name": "log.txt", "digest": {"sha256": sha256_file(log_file)}}] if log_file.exists() else [],
        also_about=[
            {"name": f"{role} under evaluation", "digest": {"sha256": parents[role]["manifest"]}}
            for role in stage.about
        ],
    )
    (stage.work / PROVENANCE).write_bytes(record)
    _settle(stage.work)
    stage.check_leases()
    old = _old(stage.output)
    shutil.rmtree(old, ignore_errors=True)
    if stage.output.exists():
        stage.output.rename(old)
    stage.work.rename(stage.output)
    _declare_finished(stage.output, manifest)
    for entry in content["files"]:  # so that whoever reads it next need not hash it again
        stage.cache.remember(stage.output / entry["path"], entry["sha256"])


def _manifest(stage: Stage, content: dict) -> bytes:
    return canonical({"schema": 1, "stage": stage.name, "tokenizer": stage.tokenizer_digest} | content)


def _old(output: Path) -> Path:
    """Where the artifact that was there before is until the new one is whole."""
    return output.with_name(f".{output.name}.old")


def _declare_finished(output: Path, manifest: bytes) -> None:
    """The manifest is what says "finished": it comes last, by a rename of its own."""
    pending = output / f".{MANIFEST}"
    pending.write_bytes(manifest)
    sync(pending)
    pending.rename(output / MANIFEST)
    sync(output)
    sync(output.parent)
    shutil.rmtree(_old(output), ignore_errors=True)


def finished(stage: Stage, declare: bool = True) -> bool:
    """Whether the artifact is already there, made by this code from this config and these inputs.

    The record tells, and the files are hashed again.

    Args:
        declare: also write the manifest where it is missing.
    """
    try:
        record = read_record(stage.output)
        made_from = {role: parent["manifest"] for role, parent in record.parents.items()}
        if (
            (record.stage, record.part) != (stage.name, f"{stage.part[0]}/{stage.part[1]}")
            or record.config_file != exact(stage.shared | {"config": stage.config})
            or made_from != {role: parent["manifest"] for role, parent in stage.origins.items()}
            or record.code.get("library") != code_state()["library"]
        ):
            return False
        if declare:
            (stage.output / f".{MANIFEST}").unlink(missing_ok=True)
        manifest = _manifest(stage, build(stage.output))
    except DataError:
        return False
    if record.manifest != sha256_bytes(manifest):
        return False
    if declare:
        _declare_finished(stage.output, manifest)
    return True


def is_finished(argv: list[str], declare: bool) -> bool:
    """`finished` for the options of a stage's command: launchers ask it before they start several processes."""
    args = _parse_arguments(argv)
    return (args.output.parent / PROVENANCE).exists() and finished(_stage(args, None), declare)


def _once(dependencies: list[dict]) -> list[dict]:
    return [d for n, d in enumerate(dependencies) if d not in dependencies[:n]]


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tunetrail.stages.<stage>")
    parser.add_argument("--config", type=Path, required=True, help="the stage's resolved config, JSON")
    parser.add_argument(
        "--input", action="append", default=[], metavar="ROLE=MANIFEST", help="a parent's manifest.json"
    )
    parser.add_argument("--output", type=Path, required=True, help="manifest.json of the artifact to make")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="make the I-th of N shards")
    parser.add_argument("--state", type=Path, required=True, help="folder for what must survive a failure")
    return parser.parse_args(argv)


def _read_stage_config(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except ValueError as e:
        raise ConfigError(f"{path}: not valid JSON: {e}") from None


def _tokenizer_of(parents: dict[str, dict]) -> str | None:
    """The one tokenizer digest all parents share. Raises DataError when they differ."""
    digests = {role: m["tokenizer"] for role, m in parents.items() if m.get("tokenizer")}
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{role}: {digest[:12]}" for role, digest in sorted(digests.items()))
        raise DataError(
            f"the inputs were made with different tokenizers or chat templates ({listed}); rebuild them from one base model"
        )
    return next(iter(digests.values()), None)


def _record(path: Path, attempts: list[dict]) -> None:
    """Whole or not at all: a full disk or a kill must not cost the history."""
    pending = path.with_suffix(".new")
    write_jsonl(pending, attempts)
    pending.rename(path)


def _attempt(stage: Stage, run: Callable[[Stage], dict]) -> None:
    attempts_file = stage.state / ATTEMPTS
    # One that found people at work did nothing, and there may be one an hour.
    attempts = [a for a in read_finished_rows(attempts_file) if not str(a.get("ended")).startswith(Waiting.word)]
    for attempt in attempts:  # a killed attempt could not write its own end
        attempt.setdefault("ended", "killed")
        attempt.setdefault("end", None)
    this: dict[str, Any] = {"start": _now(), "pid": os.getpid()} | environment()
    attempts.append(this)
    _record(attempts_file, attempts)

    def note(key: str, value: Any) -> None:
        this[key] = value
        _record(attempts_file, attempts)

    stage.note = note
    joules = energy_joules()
    started = time.monotonic()
    try:
        metrics = run(stage)
        this["ended"] = "done"
    except Waiting as e:
        this["ended"] = f"{e.word} {e}"
        raise
    except Interrupted as e:
        this["ended"] = str(e)
        raise
    except BaseException as e:
        this["ended"] = f"failed: {type(e).__name__}"
        raise
    finally:
        now = energy_joules()
        this |= environment() | {"end": _now(), "seconds": round(time.monotonic() - started, 3)}
        # The counter wraps around, and then the difference says nothing.
        this["energy_joules"] = round(now - joules, 3) if now and joules and now > joules else None
        if not stage.is_displaced():
            _record(attempts_file, attempts)
    publish(stage, metrics, attempts)
    _tidy(stage)


def _tidy(stage: Stage) -> None:
    """Leaves in the state of a published artifact what somebody may want to read."""
    for leftover in stage.state.glob("checkpoint-*"):  # the artifact has what they were kept for
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(stage.state / KEPT, ignore_errors=True)
    attempts_file = stage.state / ATTEMPTS
    if attempts_file.exists():
        # They are in the record now; what the same state folder makes another time begins a history of its own.
        attempts_file.rename(attempts_file.with_name("attempts.published.jsonl"))


def _stage(args: argparse.Namespace, stop: Stop | None) -> Stage:
    """What a stage's command names, its inputs verified."""
    content = _read_stage_config(args.config)
    inputs = dict(item.split("=", 1) for item in args.input)
    cache = DigestCache(Path(folder) if (folder := os.environ.get("TUNETRAIL_DIGESTS")) else None)
    parents = {role: verify(Path(path), cache) for role, path in inputs.items()}
    part = tuple(int(n) for n in args.part.split("/"))
    output = args.output.parent
    return Stage(
        name=content["stage"],
        config=content["config"],
        shared={k: v for k, v in content.items() if k != "config"},
        inputs={role: Path(path).parent for role, path in inputs.items()},
        output=output,
        # Its own: one that was displaced must find nothing of the other's to spoil. No name has a tilde.
        work=output.with_name(f".{output.name}~{socket.gethostname()}-{os.getpid()}.work"),
        state=args.state / sha256_json({"config": content, "inputs": parents, "part": part})[:16],
        stop=stop,  # type: ignore[arg-type]
        parents=parents,
        origins={role: parent_of(Path(path).parent) for role, path in inputs.items()},
        tokenizer_digest=_tokenizer_of(parents),
        part=(part[0], part[1]),
        cache=cache,
    )


def _execute(run: Callable[[Stage], dict], args: argparse.Namespace) -> None:
    stage = _stage(args, Stop())
    name, state, output = stage.name, stage.state, stage.output
    if not is_main_process():  # the main process locks, records and publishes for all
        state.mkdir(parents=True, exist_ok=True)
        run(stage)
        return
    waited: list[str] = []

    def say(text: str) -> None:
        waited.append(text)
        log.info("%s: %s", name, text)

    # Not two attempts in one state folder, and not two in one output, whatever their configs.
    with ExitStack() as leases:
        for path in (state / "lock", args.state / f"{output.name}.lock"):
            stage.leases.append(leases.enter_context(hold(path, stage.stop.requested, say)))
        stage.stop.leases = stage.leases
        handler = logging.FileHandler(state / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        for left in output.parent.glob(f".{output.name}~*.work"):  # by attempts that were killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            # Without a reason to think so nobody pays for hashing; made anew is what a user asks for by this command.
            maybe = waited or not args.output.exists() or (state / ATTEMPTS).exists() or "SLURM_RESTART_COUNT" in os.environ  # fmt: skip
            if maybe and finished(stage):
                if (
                    processes() > 1
                ):  # who have begun, and would wait for this one; a launcher looks before it starts any
                    raise Interrupted(f"{output} was finished by another attempt; run the same command again")
                log.info("%s: %s is finished; nothing to do", name, output)
                _tidy(stage)
                return
            stage.work.mkdir(parents=True)
            _attempt(stage, run)
        finally:
            shutil.rmtree(stage.work, ignore_errors=True)
            log.removeHandler(handler)
            handler.close()


def _end_process_group() -> None:
    """Ends the process group that the stage began, if any: one left to the interpreter's exit may abort it.

    "terminate called without an active exception", https://github.com/pytorch/pytorch/issues/190489. Not called when
    a stage failed, since the other processes may be waiting in a collective, where this would wait with them.
    """
    if group := _process_group():
        group.destroy_process_group()


def main(run: Callable[[Stage], dict], argv: list[str] | None = None, distributed: bool = False) -> int:
    """Runs a stage under the contract and returns its exit code.

    Args:
        distributed: whether the stage knows how to share its work among the processes that were started.
    """
    args = _parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    name = args.config.stem
    try:
        if processes() > 1 and not distributed:
            raise ConfigError(f"this stage runs in one process, and {processes()} were started (WORLD_SIZE); start one")
        _execute(run, args)
    except TunetrailError as e:
        for line in str(e).split("\n"):
            print(f"{name}: {e.word}: {line}", file=sys.stderr)
        if isinstance(e, Interrupted):  # all processes leave at the same step
            _end_process_group()
        return e.exit_code
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        print(f"{name}: error: {e.filename or args.output.parent}: {e.strerror}", file=sys.stderr)
        return 74  # EX_IOERR: a full disk, a missing right
    except Exception as e:
        if "No space left on device" not in str(e):  # safetensors and torch wrap the system's error in their own
            raise
        print(f"{name}: error: {args.output.parent}: No space left on device", file=sys.stderr)
        return 74
    _end_process_group()
    return 0
