"""Checkpoints to resume from, and models kept along the way.

A checkpoint counts only once its `complete.json` lists every file with its digest: an interrupted save is skipped and
the one before it is used.
"""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tunetrail.contract.distributed import is_main_process, of_all_processes
from tunetrail.contract.runner import KEPT
from tunetrail.contract.stage import Stage
from tunetrail.files import follow_umask, rename_durably, settle, sync, write_json
from tunetrail.provenance.manifest import list_files, sha256_file, walk

log = logging.getLogger("tunetrail")

COMPLETE = "complete.json"


def kept_steps(total: int, count: int) -> list[int]:
    """At most `count` steps at equal distances before the last of `total`.

    >>> kept_steps(12, 3), kept_steps(2, 5)
    ([3, 6, 9], [1])
    """
    return sorted({round(total * i / (count + 1)) for i in range(1, count + 1)} - {0, total})


def keep(stage: Stage, step: int, save: Callable[[Path], None]) -> None:
    """Saves the model of this step for good, beside what is saved to resume from. Call it in the process that writes.

    Args:
        save: fills a folder.
    """
    folder = stage.state / KEPT / str(step)
    if folder.exists():  # an earlier attempt came this far, with the same bytes
        return
    pending = folder.with_name(f"{step}.new")
    shutil.rmtree(pending, ignore_errors=True)
    save(pending)
    settle(pending)  # whoever finds the folder takes it for whole
    stage.attempt.check()
    rename_durably(pending, folder)


def publish_kept(stage: Stage) -> None:
    """Puts the kept models into the artifact; a copy, since this attempt may yet be killed."""
    if (stage.state / KEPT).exists():
        shutil.copytree(stage.state / KEPT, stage.work / "checkpoints", ignore=shutil.ignore_patterns("*.new"))


def mark_complete(stage: Stage, checkpoint: Path) -> None:
    """Declares a checkpoint whole: the last file to be written lists the others, and all are on disk.

    The record has its digest before: an attempt that goes on from a checkpoint is then known to go on from this run's.
    """
    stage.attempt.check()
    follow_umask(checkpoint)
    with ThreadPoolExecutor() as pool:  # the disk writes while the processors hash
        written = pool.map(sync, walk(checkpoint))
        write_json(checkpoint / f".{COMPLETE}", list_files(checkpoint))
        list(written)  # raises what went wrong
    stage.attempt.saves = [
        *stage.attempt.saves[-1:],
        {"name": checkpoint.name, "digest": sha256_file(checkpoint / f".{COMPLETE}")},
    ]
    stage.attempt.note("states_out", stage.attempt.saves)
    rename_durably(checkpoint / f".{COMPLETE}", checkpoint / COMPLETE)  # before the older ones go
    sync(checkpoint.parent)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is as it was when its save ended."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return [f for f in list_files(checkpoint) if f["path"] != COMPLETE] == listed


def _by_step(state: Path) -> list[Path]:
    found = [p for p in state.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def keep_newest(state: Path) -> None:
    """Two: should a disk lose a part of the last, the one before it is there."""
    for old in _by_step(state)[:-2]:
        shutil.rmtree(old)


def latest_checkpoint(stage: Stage) -> Path | None:
    """The newest whole checkpoint, whose digest goes into the record; broken ones are removed.

    Call it in all processes: one looks, for all.
    """
    return of_all_processes(_newest_whole(stage) if is_main_process() else None)[0]


def _newest_whole(stage: Stage) -> Path | None:
    for checkpoint in reversed(_by_step(stage.state)):
        if is_complete(checkpoint):
            log.info("%s: resuming from %s", stage.name, checkpoint.name)
            state = {"name": checkpoint.name, "digest": sha256_file(checkpoint / COMPLETE)}
            stage.attempt.saves = [state]  # a later attempt may have to begin from it again
            stage.attempt.note("state_in", state)
            stage.attempt.note("states_out", stage.attempt.saves)
            return checkpoint
        log.info("%s: the save was interrupted; using the one before it", checkpoint)
        shutil.rmtree(checkpoint)
    return None
