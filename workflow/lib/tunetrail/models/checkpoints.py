"""Checkpoints to resume from, and models kept along the way.

A checkpoint counts only once its `complete.json` lists every file with its digest. An interrupted save is skipped, and
the checkpoint before it is used.
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
    """At most `count` evenly spaced steps before the last of `total`.

    >>> kept_steps(12, 3), kept_steps(2, 5)
    ([3, 6, 9], [1])
    """
    return sorted({round(total * i / (count + 1)) for i in range(1, count + 1)} - {0, total})


def keep(stage: Stage, step: int, save: Callable[[Path], None]) -> None:
    """Saves the model of this step for good, separately from the checkpoints to resume from.

    Call it in the process that writes.

    Args:
        save: writes the model into a folder.
    """
    folder = stage.state / KEPT / str(step)
    if folder.exists():  # an earlier attempt got this far and wrote the same bytes
        return
    pending = folder.with_name(f"{step}.new")
    shutil.rmtree(pending, ignore_errors=True)
    save(pending)
    settle(pending)  # once the folder has its name, it is taken to be complete
    stage.attempt.check()
    rename_durably(pending, folder)


def publish_kept(stage: Stage) -> None:
    """Copies the kept models into the artifact; they are not moved, since this attempt may yet be killed."""
    if (stage.state / KEPT).exists():
        shutil.copytree(stage.state / KEPT, stage.work / "checkpoints", ignore=shutil.ignore_patterns("*.new"))


def mark_complete(stage: Stage, checkpoint: Path) -> None:
    """Declares a checkpoint complete: all its files are on disk, and the last one to be written lists the others.

    The digest goes into the record first, so that an attempt that resumes from a checkpoint is known to resume from one
    that this run saved.
    """
    stage.attempt.check()
    follow_umask(checkpoint)
    with ThreadPoolExecutor() as pool:  # the disk writes while the processors hash
        syncs = pool.map(sync, walk(checkpoint))
        write_json(checkpoint / f".{COMPLETE}", list_files(checkpoint))
        list(syncs)  # raises the first error, if any
    stage.attempt.saves = [
        *stage.attempt.saves[-1:],
        {"name": checkpoint.name, "digest": sha256_file(checkpoint / f".{COMPLETE}")},
    ]
    stage.attempt.note("states_out", stage.attempt.saves)
    rename_durably(checkpoint / f".{COMPLETE}", checkpoint / COMPLETE)  # before older checkpoints are removed
    sync(checkpoint.parent)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is unchanged since its save ended."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return [f for f in list_files(checkpoint) if f["path"] != COMPLETE] == listed


def _by_step(state: Path) -> list[Path]:
    checkpoints = [p for p in state.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]))


def keep_newest(state: Path) -> None:
    """Keeps the two newest checkpoints: if a disk loses part of the last one, the one before it remains."""
    for old in _by_step(state)[:-2]:
        shutil.rmtree(old)


def latest_checkpoint(stage: Stage) -> Path | None:
    """The newest complete checkpoint, whose digest goes into the record; incomplete ones are removed.

    Call it in all processes: the main one looks for all of them.
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
