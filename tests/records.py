"""Made-up artifacts for tests, with real records."""

import json
from pathlib import Path
from typing import Any

from tunetrail.files import write_json, write_jsonl
from tunetrail.provenance import record
from tunetrail.provenance.manifest import build, canonical, list_files, sha256_file

ATTEMPT = {
    "start": "2026-01-02T03:04:05+00:00", "end": "2026-01-02T03:05:05+00:00", "host": "node7", "job_id": None,
    "python": "3.11.7", "ended": {"outcome": "done", "message": None}, "seconds": 60.0, "world_size": 1,
}  # fmt: skip


def write_artifact(folder: Path, files: dict[str, list[dict]], tokenizer: str) -> Path:
    """An artifact without a record, of tables beside what is in the folder; returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    write_json(
        folder / "manifest.json",
        {"schema": 1, "stage": folder.name, "tokenizer": tokenizer, "files": list_files(folder)},
    )
    return folder / "manifest.json"


def seal_folder(
    folder: Path,
    stage: str,
    parents: dict[str, Path] | None = None,
    config: dict | None = None,
    attempts: list[dict] | None = None,
    dependencies: list[dict] | None = None,
    about: tuple[str, ...] = (),
    installed: dict[str, str] | None = None,
    **code: Any,
) -> Path:
    """Gives a folder of files a manifest and a record. `code` overrides what the record says about the code."""
    manifest = canonical({"schema": 1, "stage": stage, "tokenizer": "t" * 64} | build(folder))
    found = {role: record.parent_entry(path) for role, path in (parents or {}).items()}
    metrics = sha256_file(folder / "metrics.json") if (folder / "metrics.json").exists() else "0" * 64
    labels = [d for parent in found.values() for d in parent["labels"]]
    content = record.build(
        stage=stage, part=(0, 1), config={"stage": stage, "seed": 17, "config": config or {}}, manifest=manifest,
        output=folder, parents=found,
        dependencies=[*(dependencies or []), *labels, record.dependency("tokenizer", "tokenizer", "t" * 64)],
        attempts=attempts or [ATTEMPT], metrics=metrics, training_flops=None, byproducts=[],
        also_about=[{"name": role, "digest": {"sha256": found[role]["manifest"]}} for role in about],
    )  # fmt: skip
    statement = json.loads(content)
    resolved = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    for dependency in resolved:
        if dependency["annotations"]["role"] == "code":
            dependency["annotations"] |= {
                "commit": "fde7df5d8a2d6f79b0029603499dceb502300eeb",
                "dirty": False,
                "untracked": {},
            } | code
        if dependency["annotations"]["role"] == "packages":
            dependency["annotations"]["installed"] = installed or {"torch": "2.13.0", "trl": "1.16.0"}
    (folder / "provenance.json").write_bytes(canonical(statement))
    (folder / "manifest.json").write_bytes(manifest)
    return folder
