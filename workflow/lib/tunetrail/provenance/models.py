"""Models on disk: their kind, and how records name models that were made elsewhere."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunetrail.provenance.hub import resolved_revision
from tunetrail.provenance.manifest import DigestCache, list_files, sha256_json
from tunetrail.provenance.record import dependency
from tunetrail.provenance.schema import Dependency


def is_reward_model(config: Mapping[str, Any]) -> bool:
    """Whether this config.json belongs to a model that scores text instead of writing it, trained here or elsewhere."""
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def local_model(role: str, folder: Path, licence: str | None, cache: DigestCache | None = None) -> Dependency:
    """A model in a folder; an audit compares its files again."""
    listed = list_files(folder, cache, hidden=False)
    files = {os.path.relpath(folder / entry["path"]): entry["sha256"] for entry in listed}
    return dependency(role, os.path.relpath(folder), sha256_json(listed), licence=licence, files=files)


def hub_model(
    role: str,
    repo: str,
    revision: str,
    licence: str | None,
    reason: str = "the manifest has the digests of what was downloaded",
) -> Dependency:
    """A model repository on the hub.

    Args:
        reason: why this says nothing about its content.
    """
    return dependency(
        role,
        repo,
        uri=f"pkg:huggingface/{repo}@{revision}",
        licence=licence,
        revision=revision,
        commit=resolved_revision(repo, revision),
        reason=reason,
    )
