"""The places of things in a run's folder."""

import os
from pathlib import Path

from tunetrail.provenance.manifest import MANIFEST
from tunetrail.stages.registry import config_name

LEDGER, CONFIG = "ledger.jsonl", "config"
DEPTH = 4
"""How many levels deep artifacts are searched for: a folder of runs, a run, `policies`, an artifact."""


def artifacts(run: Path) -> list[Path]:
    """Every finished artifact below a run's folder, or below a folder of runs.

    A link counts as the folder that it leads to if that is an artifact or holds artifacts. Each folder counts once;
    links come last.
    """
    found, seen, links = [], set(), []

    def look(folder: Path, depth: int) -> None:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        if os.path.lexists(folder / MANIFEST):
            found.append(folder)
            return
        for entry in sorted(_entries(folder), key=lambda entry: entry.name) if depth else []:
            if entry.name.startswith(".") or not _is_folder(entry):
                continue
            if entry.is_symlink():
                links.append((folder / entry.name, min(depth - 1, 1)))
            else:
                look(folder / entry.name, depth - 1)

    look(run, DEPTH)
    while links:
        look(*links.pop(0))
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or a link to one; False for a circular link."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; empty if it cannot be read, which `leftovers` reports."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def config_of(run: Path, artifact: str) -> Path | None:
    """The path of the resolved config of an artifact's stage; None for a folder of no stage."""
    name = config_name(artifact)
    return run / CONFIG / f"{name}.json" if name else None
