"""Artifacts: verifies inputs, and publishes outputs completely or not at all."""

import os
import shutil
from pathlib import Path

from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.files import rename_durably, settle, sync, write_json
from tunetrail.provenance.environment import code_state
from tunetrail.provenance.manifest import (
    MANIFEST,
    METRICS,
    PROVENANCE,
    SIGNATURE,
    UNLISTED_FILES,
    DigestCache,
    build,
    canonical,
    hash_files,
    is_inside,
    read_manifest,
    sha256_bytes,
    sha256_file,
    walk,
)
from tunetrail.provenance.record import Record, dependency, exact_integers, place_of, read_record
from tunetrail.provenance.record import build as build_record
from tunetrail.provenance.schema import Manifest

FIX = "delete the folder and run its stage again, or restore the file"


def verify(manifest_path: Path, cache: DigestCache | None = None) -> Manifest:
    """Checks a folder against its manifest and returns the manifest. Raises DataError naming what differs.

    Args:
        cache: digests of files that have not changed since they were hashed; None: every byte is read.
    """
    manifest = read_manifest(manifest_path)
    check_files(manifest_path, manifest, cache or DigestCache(None))
    return manifest


def check_files(manifest_path: Path, manifest: Manifest, cache: DigestCache) -> None:
    """Checks the files of an artifact against its manifest, as it was read before. Raises DataError."""
    folder = manifest_path.parent
    listed = {entry["path"]: entry for entry in manifest["files"]}
    for name, entry in listed.items():
        path = folder / name
        if not is_inside(name):
            raise DataError(
                f"{manifest_path}: lists {name}, which is outside the folder; delete the folder and run its stage again"
            )
        if not path.is_file():
            raise DataError(f"{path}: listed in the manifest but missing; {FIX}")
        if path.stat().st_size != entry["size"]:
            raise DataError(f"{path}: differs from its manifest; {FIX}")
    digests = hash_files(cache.sha256, [folder / name for name in listed])
    for (name, entry), digest in zip(listed.items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise DataError(f"{folder / name}: differs from its manifest; {FIX}")
    for path in walk(folder):  # an extra file can change what from_pretrained loads
        name = path.relative_to(folder).as_posix()
        is_pending = name.startswith(f".{SIGNATURE}.")  # an `audit seal` is writing it
        if name not in listed and name not in UNLISTED_FILES and not is_pending:
            raise DataError(f"{path}: is not in the manifest; remove it, or delete the folder and run its stage again")


def publish(stage: Stage, metrics: dict, attempts: list[dict]) -> None:
    """Turns `stage.work` into the artifact at `stage.output`, completely or not at all."""
    write_json(stage.work / METRICS, metrics)
    if (stage.work / "model/config.json").exists():
        _write_card(stage, metrics)
    content = build(stage.work)
    manifest = _manifest(stage, content)
    (stage.work / PROVENANCE).write_bytes(_record(stage, manifest, attempts))
    settle(stage.work)
    stage.attempt.check()
    previous = _previous(stage.output)
    shutil.rmtree(previous, ignore_errors=True)
    if stage.output.exists():
        stage.output.rename(previous)
    stage.work.rename(stage.output)
    declare_finished(stage.output, manifest)
    for entry in content["files"]:  # so that the next stage need not hash it again
        stage.attempt.digests.remember(stage.output / entry["path"], entry["sha256"])


def _write_card(stage: Stage, metrics: dict) -> None:
    """Writes a model's card into its folder, so that it is copied along."""
    from tunetrail.provenance.exports.model_card import of_stage

    inputs = {role: parent.folder for role, parent in stage.inputs.items()}
    card = of_stage(stage.name, stage.work, inputs, stage.draft.dependencies, metrics)
    (stage.work / "model/README.md").write_text(card, encoding="utf-8")


def _record(stage: Stage, manifest: bytes, attempts: list[dict]) -> bytes:
    """The provenance record."""
    parents, draft = {role: parent.origin for role, parent in stage.inputs.items()}, stage.draft
    # Everything trained on labels names them, however far upstream they were collected.
    inherited = [d for parent in parents.values() if parent["labels"] for d in parent["labels"]]
    own = [d for d in draft.dependencies if d not in inherited]
    unique = [d for n, d in enumerate(inherited) if d not in inherited[:n]]
    tokenizer = (
        [dependency("tokenizer", "tokenizer and chat template", draft.tokenizer_digest)]
        if draft.tokenizer_digest
        else []
    )
    log_file = stage.state / "log.txt"
    return build_record(
        stage=stage.name,
        part=stage.request.part,
        config=stage.shared | {"config": stage.config},
        manifest=manifest,
        output=stage.output,
        parents=parents,
        dependencies=[*own, *unique, *tokenizer],
        attempts=attempts,
        metrics=sha256_file(stage.work / METRICS),
        training_flops=draft.training_flops,
        byproducts=[{"name": "log.txt", "digest": {"sha256": sha256_file(log_file)}}] if log_file.exists() else [],
        also_about=[
            {"name": f"{role} under evaluation", "digest": {"sha256": parents[role]["manifest"]}}
            for role in draft.about
        ],
    )


def _manifest(stage: Stage, content: dict) -> bytes:
    return canonical({"schema": 1, "stage": stage.name, "tokenizer": stage.draft.tokenizer_digest} | content)


def _previous(output: Path) -> Path:
    """Where the previous artifact stays until the new one is complete."""
    return output.with_name(f".{output.name}.old")


def declare_finished(output: Path, manifest: bytes) -> None:
    """Writes the manifest, which marks the artifact as finished; it comes last, with its own rename."""
    pending = output / f".{MANIFEST}"
    pending.write_bytes(manifest)
    rename_durably(pending, output / MANIFEST)
    sync(output.parent)
    shutil.rmtree(_previous(output), ignore_errors=True)


def _reads_other_files(record: Record, folder: Path, digests: DigestCache) -> bool:
    """Whether an existing file from outside the run differs from what the record says was read."""
    named = [item for d in record.dependencies for item in d["annotations"].get("files", {}).items()]
    files = [(Path(os.path.normpath(folder / name)), digest) for name, digest in named]
    return any(path.is_file() and digests.sha256(path) != digest for path, digest in files)


def finished(stage: Stage, declare: bool = True) -> bool:
    """Whether the artifact already exists, made by this code from this config, these inputs and the user's files.

    Its record says so; its files and the user's are hashed again.

    Args:
        declare: also write the manifest if it is missing.
    """
    try:
        record = read_record(stage.output)
        made_from = {role: parent["manifest"] for role, parent in record.parents.items()}
        if (
            (record.stage, record.part) != (stage.name, f"{stage.request.part[0]}/{stage.request.part[1]}")
            or record.place != place_of(stage.name, stage.output)
            or record.config_file != exact_integers(stage.shared | {"config": stage.config})
            or made_from != {role: parent.origin["manifest"] for role, parent in stage.inputs.items()}
            or record.code.get("library") != code_state()["library"]
            or _reads_other_files(record, stage.output, stage.attempt.digests)
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
        declare_finished(stage.output, manifest)
    return True
