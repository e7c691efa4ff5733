"""Finds everything in a run's folder that belongs to none of its artifacts."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tunetrail.provenance.findings import VerifyResult
from tunetrail.provenance.manifest import MANIFEST, NFS
from tunetrail.provenance.run_folder import CONFIG, LEDGER, config_of
from tunetrail.stages.registry import STAGES, family_of

AT_WORK = re.compile(r"\..+(~.+\.work|\.old)")
"""The folder in which a stage works, and the artifact that it is about to replace."""
FAMILIES = {stage.family for stage in STAGES.values()}


def check_leftovers(result: VerifyResult, run: Path, found: list[Path]) -> None:
    """Notes everything in a run's folder that is in none of these artifacts. Folders without files do not count."""
    holders = {above for artifact in found for above in artifact.parents}
    used = {config_of(run, _name(artifact, run)) for artifact in found}
    todo, known = [run], set(found)
    while todo:
        folder = todo.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            result.add("unreadable", _name(folder, run), f"the folder cannot be read ({e.strerror}); ask its owner")
            continue
        for entry in entries:
            path = folder / entry.name
            if path in holders and entry.is_dir():
                todo.append(path)
            elif path not in known and not NFS.fullmatch(entry.name):
                _leftover(result, run, path, entry, used)


def _name(path: Path, run: Path) -> str:
    return path.relative_to(run).as_posix()


def _leftover(result: VerifyResult, run: Path, path: Path, entry: os.DirEntry[str], used: set[Path | None]) -> None:
    """Notes what kind of leftover this is, if it is one."""
    name = _name(path, run)
    if name == LEDGER:
        return  # a ledger is read as such
    if name == CONFIG and entry.is_dir(follow_symlinks=False):
        for config in _files(result, run, path):
            _check_config(result, run, config, used)
    elif entry.name == LEDGER:
        result.add("ledger-broken", name, "a second ledger within the run; remove it")
    elif not entry.is_dir(follow_symlinks=False):
        result.add("stray-file", name, "it belongs to no artifact; remove it")
    elif not (first := next(_files(result, run, path), None)):
        return
    elif AT_WORK.fullmatch(entry.name):
        result.add("unfinished", name, "a stage is at work there, or was killed; run snakemake to finish it")
    elif entry.name.startswith("."):
        result.add("hidden-folder", name, f"it holds {first.name} and belongs to no artifact; remove it")
    elif family_of(name):
        message = f"it holds {first.name}; run snakemake to make the artifact again, or restore its {MANIFEST}"
        result.add("manifest-missing", name, message)
    else:
        result.add("stray-folder", name, f"it holds {first.name} and belongs to no artifact; remove it")


def _files(result: VerifyResult, run: Path, folder: Path) -> Iterator[Path]:
    """Yields the files and links below a folder."""
    todo = [folder]
    while todo:
        at = todo.pop()
        try:
            entries = list(os.scandir(at))
        except OSError as e:
            result.add("unreadable", _name(at, run), f"the folder cannot be read ({e.strerror}); ask its owner")
            continue
        todo += [at / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from (at / entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))


def _check_config(result: VerifyResult, run: Path, path: Path, used: set[Path | None]) -> None:
    """Notes a config that no artifact was made with; `RecordCheck` compares all others."""
    if path in used:
        return
    is_config = path.parent == run / CONFIG and path.suffix == ".json" and path.stem.partition(".")[0] in FAMILIES
    if is_config:
        result.add("config-unused", _name(path, run), "no artifact here was made with it; make it, or remove the file")
    else:
        result.add("stray-file", _name(path, run), "it belongs to no artifact; remove it")
