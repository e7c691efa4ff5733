"""The contract of a stage: verified inputs, resumable state, atomic publishing, a provenance record.

A stage is a module with `run(stage) -> metrics`, called as

    python -m tunetrail.stages.<stage> --config C.json --input role=…/manifest.json … \
        --output OUT/manifest.json --state STATE

and `main(run)` does the rest:

1. It checks every input folder against its manifest; a byte that differs stops the stage. With $TUNETRAIL_DIGESTS,
   files whose size, inode and times have not changed since they were last hashed are not hashed again.
2. It works in the state folder `STATE/<fingerprint>`, the digest of the config and the input manifests: a changed
   hyperparameter never loads an old optimizer state. A lease keeps a second writer out.
3. `run` fills `stage.work`, a sibling of the output folder, with files.
4. It adds `metrics.json`, `provenance.json` and, last, `manifest.json`, flushes everything to disk and renames it into
   place: a killed stage leaves nothing that looks finished.

`metrics.json` holds results only (no times, no hosts), so equal runs give equal manifests. Times, hosts and attempts
are in `provenance.json`, which the manifest does not list. See `tunetrail.provenance`.

An artifact that lacks only its manifest is not made again: its job was killed at the very end, or Snakemake removed the
manifest of a job whose head process had died. `artifact.finished` compares such an artifact with its record.

Exit codes: 0 done; 75 interrupted with progress saved; 76 another attempt has taken over; 65 bad data; 78 bad config;
74 the disk failed; anything else is a fault.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunetrail.contract import progress
from tunetrail.contract.artifact import check_files, finished, publish, verify
from tunetrail.contract.distributed import end_process_group, is_main_process, processes
from tunetrail.contract.lease import hold
from tunetrail.contract.scorers import hub_scorers, own_scorers
from tunetrail.contract.stage import Attempt, Input, RecordDraft, Request, Stage
from tunetrail.contract.stop import Stop
from tunetrail.errors import ConfigError, DataError, Interrupted, Superseded, TunetrailError, Waiting
from tunetrail.files import read_finished_rows, rename_durably, write_jsonl
from tunetrail.provenance.environment import energy_joules, environment, peak_bytes
from tunetrail.provenance.manifest import PROVENANCE, DigestCache, sha256_json
from tunetrail.provenance.record import parent_entry
from tunetrail.provenance.schema import Ended, Manifest
from tunetrail.terminal import Formatter, escape

# What a user can fix: no room, no permission, a failing disk. Any other OSError is a fault and keeps its traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
ATTEMPTS = "attempts.jsonl"
KEPT = "kept"
"""Folder of the state for models that were kept along the way; they become part of the artifact."""

log = logging.getLogger("tunetrail")


def how_it_ended(error: BaseException | None) -> Ended:
    """The end of an attempt that raised this, or None for an attempt that raised nothing."""
    if error is None:
        return {"outcome": "done", "message": None}
    if isinstance(error, Waiting):
        return {"outcome": "waiting", "message": str(error)}
    if isinstance(error, Superseded):
        return {"outcome": "superseded", "message": str(error)}
    if isinstance(error, Interrupted):
        return {"outcome": "interrupted", "message": str(error)}
    return {"outcome": "failed", "message": type(error).__name__}


def is_finished(argv: list[str], declare: bool) -> bool:
    """`artifact.finished` for the options of a stage's command; launchers ask before they start several processes."""
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


def _tokenizer_of(parents: dict[str, Manifest]) -> str | None:
    """The one tokenizer digest all parents share. Raises DataError when they differ."""
    digests = {role: digest for role, m in parents.items() if (digest := m.get("tokenizer"))}
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{role}: {digest[:12]}" for role, digest in sorted(digests.items()))
        raise DataError(
            f"the inputs were made with different tokenizers or chat templates ({listed}); rebuild them from one "
            "base model"
        )
    return next(iter(digests.values()), None)


def _of_this_run(parents: dict[str, Manifest], stage: str) -> dict[str, Manifest]:
    """The inputs without models of other runs: importing compares what their tokenizers do, not the bytes of files."""
    return {role: m for role, m in parents.items() if not (role == "model" and stage in ("sft", "reward"))}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_attempts(path: Path, attempts: list[dict]) -> None:
    """Writes the attempts atomically: a full disk or a kill must not lose the history."""
    pending = path.with_suffix(".new")
    write_jsonl(pending, attempts)
    rename_durably(pending, path)


def _earlier_attempts(path: Path) -> list[dict]:
    """The attempts in this state folder; a killed one could not write its end."""
    attempts = read_finished_rows(path, "start")
    for attempt in attempts:
        if "outcome" not in (attempt.get("ended") or {}):
            attempt["ended"] = {"outcome": "killed", "message": None}
        attempt.setdefault("end", None)
    # An attempt that only found people at work did nothing, and there may be many of them.
    return [attempt for attempt in attempts if attempt["ended"]["outcome"] != "waiting"]


def _attempt(stage: Stage, run: Callable[[Stage], dict]) -> None:
    """Runs the stage, keeps the record of this attempt as it goes, and publishes."""
    path = stage.state / ATTEMPTS
    this: dict[str, Any] = {"start": _now(), "pid": os.getpid()} | environment()
    attempts = [*_earlier_attempts(path), this]
    _write_attempts(path, attempts)

    def note(key: str, value: Any) -> None:
        this[key] = value
        _write_attempts(path, attempts)

    stage.attempt.note = note
    joules, started, error = energy_joules(), time.monotonic(), None
    try:
        metrics = run(stage)
    except BaseException as e:
        error = e
        raise
    finally:
        now = energy_joules()
        this |= environment() | {"end": _now(), "seconds": round(time.monotonic() - started, 3)}
        # If the counter has wrapped around, the difference means nothing.
        this["energy_joules"] = round(now - joules, 3) if now and joules and now > joules else None
        this["peak_bytes"] = peak_bytes()
        this["ended"] = how_it_ended(error)
        if not stage.attempt.is_superseded():
            _write_attempts(path, attempts)
        error = None  # it holds the stage's frames, and with them the model
    stage.draft.dependencies += hub_scorers(stage.shared.get("scorers", {}))
    publish(stage, metrics, attempts)
    _clean_up(stage)


def _clean_up(stage: Stage) -> None:
    """Removes everything from the state of a published artifact that nobody will want to read."""
    for checkpoint in stage.state.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(stage.state / KEPT, ignore_errors=True)
    path = stage.state / ATTEMPTS
    if path.exists():
        # The record has them now; if this state folder is used again, it starts a new history.
        path.rename(path.with_name("attempts.published.jsonl"))


def _stage(args: argparse.Namespace, stop: Stop | None) -> Stage:
    """The stage that the command describes, with verified inputs."""
    content = _read_stage_config(args.config)
    inputs = dict(item.split("=", 1) for item in args.input)
    cache = DigestCache(Path(folder) if (folder := os.environ.get("TUNETRAIL_DIGESTS")) else None)
    parents = {role: verify(Path(path), cache) for role, path in inputs.items()}

    def check_inputs() -> None:
        for role, path in inputs.items():
            check_files(Path(path), parents[role], cache)

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
        {
            # The report shows records that do not match; all other stages would use them.
            role: Input(Path(path).parent, parents[role], parent_entry(Path(path).parent, content["stage"] != "report"))
            for role, path in inputs.items()
        },
        Attempt(
            # A folder of its own: a superseded attempt must find nothing of its successor's to spoil. No name has a
            # tilde.
            work=output.with_name(f".{output.name}~{socket.gethostname()}-{os.getpid()}.work"),
            state=args.state / sha256_json({"config": content, "inputs": parents, "part": part})[:16],
            stop=stop,  # type: ignore[arg-type]
            digests=cache,
            check_inputs=check_inputs,
        ),
        RecordDraft(
            tokenizer_digest=_tokenizer_of(_of_this_run(parents, content["stage"])),
            dependencies=own_scorers(content.get("scorers", {}), cache),
        ),
    )


def _execute(run: Callable[[Stage], dict], args: argparse.Namespace) -> None:
    stage = _stage(args, Stop())
    name, state, output = stage.name, stage.state, stage.output
    if not is_main_process():  # the main process holds leases, records and publishes for all
        state.mkdir(parents=True, exist_ok=True)
        run(stage)
        return
    waits: list[str] = []

    def say(text: str) -> None:
        waits.append(text)
        log.info("%s: %s", name, text)

    # Two attempts may share neither a state folder nor an output, whatever their configs.
    with ExitStack() as stack:
        for path in (state / "lock", args.state / f"{output.name}.lock"):
            stage.attempt.leases.append(stack.enter_context(hold(path, stage.stop.requested, say)))
        stage.stop.leases = stage.attempt.leases
        stack.enter_context(_logging_to(state))
        for abandoned in output.parent.glob(f".{output.name}~*.work"):  # left by attempts that were killed
            shutil.rmtree(abandoned, ignore_errors=True)
        stack.callback(shutil.rmtree, stage.work, ignore_errors=True)
        # Skip hashing unless a finished artifact is plausible: an explicit rerun must rebuild.
        plausible = (
            waits or not args.output.exists() or (state / ATTEMPTS).exists() or "SLURM_RESTART_COUNT" in os.environ
        )
        if plausible and finished(stage):
            if processes() > 1:  # the others have started and would wait for this one; a launcher checks beforehand
                raise Interrupted(f"{output} was finished by another attempt; run the same command again")
            log.info("%s: %s is finished; nothing to do", name, output)
            _clean_up(stage)
            return
        stage.work.mkdir(parents=True)
        try:
            _attempt(stage, run)
        except Exception:  # if another attempt has taken over, it has removed this one's work folder
            stage.attempt.check_leases()
            raise


@contextmanager
def _logging_to(state: Path) -> Iterator[None]:
    """Logs and progress go into the state folder too."""
    handler = logging.FileHandler(state / "log.txt")
    handler.setFormatter(Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    progress.write_to(state / progress.FILE)
    try:
        yield
    finally:
        progress.write_to(None)
        log.removeHandler(handler)
        handler.close()


def main(run: Callable[[Stage], dict], argv: list[str] | None = None, distributed: bool = False) -> int:
    """Runs a stage under the contract and returns its exit code.

    Args:
        distributed: whether the stage knows how to share its work among the processes that were started.
    """
    args = _parse_arguments(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    name, code = args.config.stem, 0
    try:
        if processes() > 1 and not distributed:
            raise ConfigError(f"this stage runs in one process, and {processes()} were started (WORLD_SIZE); start one")
        _execute(run, args)
    except TunetrailError as e:
        for line in str(e).split("\n"):
            print(escape(f"{name}: {e.word}: {line}"), file=sys.stderr)
        if not isinstance(e, Interrupted):
            return e.exit_code
        code = e.exit_code  # all processes leave at the same step
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        print(escape(f"{name}: error: {e.filename or args.output.parent}: {e.strerror}"), file=sys.stderr)
        return 74  # EX_IOERR: a full disk, a missing permission
    except Exception as e:
        if "No space left on device" not in str(e):  # safetensors and torch wrap the system's error
            raise
        print(f"{name}: error: {args.output.parent}: No space left on device", file=sys.stderr)
        return 74
    end_process_group()
    return code
