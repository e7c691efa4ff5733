"""The user's own files and models that a stage reads: checks that they have not changed, and records them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError
from tunetrail.provenance.manifest import DigestCache, digest_of
from tunetrail.provenance.models import hub_model, local_model
from tunetrail.provenance.record import dependency
from tunetrail.provenance.schema import Dependency


def check_unchanged(key: str, path: Path, planned: str | None, cache: DigestCache | None = None) -> None:
    """Raises DataError if a file or folder of the user's has changed since the run was planned."""
    digest = digest_of(path, cache)
    if digest is None or digest != planned:
        what = "differs from what it was when this run was planned" if digest else "is missing"
        raise DataError(f"{key}: {path} {what}; run snakemake again")


def own_scorers(scorers: Mapping[str, Mapping[str, Any]], cache: DigestCache) -> list[Dependency]:
    """The user's own files and folders among a stage's scorers. Raises DataError for one that changed since the run was
    planned."""
    dependencies = []
    for name, scorer in scorers.items():
        if scorer.get("path"):
            path = Path(scorer["path"])
            check_unchanged(f"scorers.{name}", path, scorer.get("sha256"), cache)
            if path.is_dir():
                dependencies.append(local_model("scorer", path, scorer["licence"], cache))
            else:
                dependencies.append(dependency("scorer", name, scorer["sha256"], files={str(path): scorer["sha256"]}))
    return dependencies


def hub_scorers(scorers: Mapping[str, Mapping[str, Any]]) -> list[Dependency]:
    """The models from the hub among a stage's scorers. Call it after they were loaded: then their commits are known."""
    return [
        hub_model(
            "scorer", scorer["repo"], scorer["revision"], scorer["licence"], "the hub has the digests of its files"
        )
        for scorer in scorers.values()
        if scorer.get("repo")
    ]
