"""The contract every stage keeps: verified inputs, resumable state, atomic publishing, a record.

A stage is a module with `run(stage) -> metrics`, called as

    python -m tunetrail.stages.<stage> --config C.json --input role=…/manifest.json …         --output OUT/manifest.json --state STATE

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
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunetrail.contract.artifact import finished, publish, verify
from tunetrail.contract.distributed import end_process_group, is_main_process, processes
from tunetrail.contract.lease import hold
from tunetrail.contract.stage import Attempt, Input, RecordDraft, Request, Stage
from tunetrail.contract.stop import Stop
from tunetrail.errors import ConfigError, DataError, Interrupted, TunetrailError, Waiting
from tunetrail.files import read_finished_rows, write_jsonl
from tunetrail.provenance.manifest import PROVENANCE, DigestCache, sha256_json
from tunetrail.provenance.record import energy_joules, environment, parent_of

# What a user can fix: no room, no right, a disk that failed. Any other OSError is a fault and keeps its traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
ATTEMPTS = "attempts.jsonl"
KEPT = "kept"
"""Folder of the state for models of steps along the way, which the artifact gets too."""

log = logging.getLogger("tunetrail")


def is_finished(argv: list[str], declare: bool) -> bool:
    """`finished` for the options of a stage's command: launchers ask it before they start several processes."""
    args = _parse_arguments(argv)
    return (args.output.parent / PROVENANCE).exists() and finished(_stage(args, None), declare)


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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

    stage.attempt.note = note
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
        if not stage.attempt.is_displaced():
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
        Request(
            name=content["stage"],
            config=content["config"],
            shared={k: v for k, v in content.items() if k != "config"},
            output=output,
            part=(part[0], part[1]),
        ),
        {role: Input(Path(path).parent, parents[role], parent_of(Path(path).parent)) for role, path in inputs.items()},
        Attempt(
            # Its own: one that was displaced must find nothing of the other's to spoil. No name has a tilde.
            work=output.with_name(f".{output.name}~{socket.gethostname()}-{os.getpid()}.work"),
            state=args.state / sha256_json({"config": content, "inputs": parents, "part": part})[:16],
            stop=stop,  # type: ignore[arg-type]
            digests=cache,
        ),
        RecordDraft(tokenizer_digest=_tokenizer_of(parents)),
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
            stage.attempt.leases.append(leases.enter_context(hold(path, stage.stop.requested, say)))
        stage.stop.leases = stage.attempt.leases
        handler = logging.FileHandler(state / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        for left in output.parent.glob(f".{output.name}~*.work"):  # by attempts that were killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            # Without a reason to think so nobody pays for hashing; made anew is what a user asks for by this command.
            maybe = (
                waited or not args.output.exists() or (state / ATTEMPTS).exists() or "SLURM_RESTART_COUNT" in os.environ
            )
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


def main(run: Callable[[Stage], dict], argv: list[str] | None = None, distributed: bool = False) -> int:
    """Runs a stage under the contract and returns its exit code.

    Args:
        distributed: whether the stage knows how to share its work among the processes that were started.
    """
    args = _parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    name, code = args.config.stem, 0
    try:
        if processes() > 1 and not distributed:
            raise ConfigError(f"this stage runs in one process, and {processes()} were started (WORLD_SIZE); start one")
        _execute(run, args)
    except TunetrailError as e:
        for line in str(e).split("\n"):
            print(f"{name}: {e.word}: {line}", file=sys.stderr)
        if not isinstance(e, Interrupted):
            return e.exit_code
        code = e.exit_code  # all processes leave at the same step
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
    end_process_group()
    return code
