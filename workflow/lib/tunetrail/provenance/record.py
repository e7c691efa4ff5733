"""Records: how an artifact came to be, as an in-toto Statement v1 with a SLSA provenance v1 predicate.

`provenance.json` is canonical JSON (RFC 8785); its sha256 is the record's digest, which the records of everything made
from the artifact name. A value that is unknown is null with a reason. https://in-toto.io/Statement/v1,
https://slsa.dev/provenance/v1
"""

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import tunetrail
from tunetrail.errors import DataError
from tunetrail.files import parse_json, read_regular
from tunetrail.provenance.environment import code_state, device_hours, lock_file, packages
from tunetrail.provenance.manifest import (
    MANIFEST,
    PROVENANCE,
    cannot_read,
    canonical,
    first_error,
    sha256_bytes,
    sha256_file,
    sha256_json,
)
from tunetrail.provenance.schema import AttemptRecord, Dependency, ParentEntry, RecordedParent, Statement
from tunetrail.stages.registry import STAGES

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:tunetrail:stage:v1"
MAX_DIFF = 2**20
"""The most bytes of a dirty tree's diff that a record keeps; of a larger diff it keeps only the digest."""


@dataclass(frozen=True)
class Place:
    """Where an artifact was made. Since its record says so, it cannot pass for another artifact."""

    run: str
    artifact: str
    """Its path in the run."""


def place_of(stage: str, output: Path) -> Place:
    """The place of a stage's output folder, `<run>/<artifact>` as the table of stages names artifacts.

    >>> place_of("ppo", Path("results/demo/policies/ppo"))
    Place(run='demo', artifact='policies/ppo')
    """
    depth = 2 if stage in STAGES and STAGES[stage].wildcard else 1
    parts = Path(os.path.abspath(output)).parts
    return Place("".join(parts[-depth - 1 : -depth]), "/".join(parts[-depth:]))


# ----------------------------------------------------------------------------- writing


def dependency(
    role: str, name: str, digest: str | None = None, uri: str | None = None, **annotations: Any
) -> Dependency:
    """Something that an artifact was made from.

    Args:
        digest: sha256 of its content; None if none can be had, and an annotation `reason` says why.
        annotations: `files`, a mapping of paths to sha256, is checked again by a recursive audit.
    """
    result: Dependency = {"name": name, "annotations": {"role": role} | exact_integers(annotations)}
    if uri:
        result["uri"] = uri
    if digest:
        result["digest"] = {"sha256": digest}
    return result


def labels_dependency(path: Path, rows: Sequence[Mapping[str, Any]], source: dict) -> Dependency:
    """The exact set of labels: its export, how many rankings by whom (pseudonyms), and where they come from.

    Args:
        rows: the rows of the export, each with `rankings`.
        source: what the labeler reports; `files` (path -> sha256) if the labels were read from files.
    """
    rankings = [ranking for row in rows for ranking in row["rankings"]]
    chain = {key: source.get(key) for key in ("events", "chain_head", "guideline")}
    if chain["chain_head"] is None:
        chain["reason"] = "these labels were not collected by the ranking page, which keeps a chain of events"
    return dependency(
        "labels",
        path.name,
        sha256_file(path),
        rankings=len(rankings),
        labelers=sorted({ranking["labeler"] for ranking in rankings}),
        **(source | chain),
    )


def _renamed(found: Dependency, rename: Callable[[str], str]) -> Dependency:
    """The dependency with other paths for its files.

    A record names files relative to its own folder, like inputs: a run and its raw data may be moved together.
    """
    annotations = found["annotations"]
    if not annotations.get("files"):
        return found
    files = {rename(path): digest for path, digest in annotations["files"].items()}
    return found | {"annotations": annotations | {"files": files}}


def parent_entry(folder: Path, must_match: bool = True) -> ParentEntry:
    """What a record will say about the input in this folder, as it is now.

    Raises DataError if its record belongs to another manifest and `must_match`.
    """
    path, manifest = folder / PROVENANCE, sha256_file(folder / MANIFEST)
    try:
        record = Record(read_regular(path), str(path))
    except FileNotFoundError:
        record = None
    except OSError as e:
        raise cannot_read(path, e) from None
    if record and record.manifest != manifest and must_match:
        raise DataError(
            f"{path}: is the record of another {MANIFEST} ({record.manifest[:16]}…, not {manifest[:16]}…); restore the "
            "folder from a copy, or run its stage again"
        )
    labels = record.of_role("labels") if record else []
    return {
        "path": folder,
        "manifest": manifest,
        "record": record.digest if record else None,
        "labels": [_renamed(d, lambda path: os.path.relpath(folder / path)) for d in labels],
    }


def build(
    *,
    stage: str,
    part: tuple[int, int],
    config: dict,
    manifest: bytes,
    output: Path,
    parents: Mapping[str, ParentEntry],
    dependencies: Sequence[Dependency],
    attempts: Sequence[Mapping[str, Any]],
    metrics: str,
    training_flops: float | None,
    byproducts: list[dict],
    also_about: list[dict],
) -> bytes:
    """The canonical record of an artifact.

    Args:
        config: the stage's resolved config file.
        manifest: the bytes of manifest.json.
        parents: the inputs, by role.
        dependencies: everything else that it was made from.
        attempts: an `AttemptRecord` each, oldest first.
        metrics: sha256 of metrics.json.
        byproducts: ResourceDescriptors of logs and similar files.
        also_about: further subjects, for instance an evaluation's model.
    """
    code, inputs = code_state(), _inputs(parents, output)
    made_from = [*inputs, *(_renamed(d, lambda path: os.path.relpath(path, output)) for d in dependencies)]
    invocation = {"config": config, "parents": [parent["digest"] for parent in inputs], "part": part}
    metrics_file = {"name": "metrics.json", "digest": {"sha256": metrics}}
    usage = {"name": "usage", "annotations": _usage(stage, attempts, training_flops)}
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": stage, "digest": {"sha256": sha256_bytes(manifest)}}, *also_about],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "stage": stage,
                    "part": f"{part[0]}/{part[1]}",
                    **asdict(place_of(stage, output)),
                    "config": exact_integers(config),
                },
                "internalParameters": {"attempts": exact_integers(attempts)},
                "resolvedDependencies": [*made_from, *_software(code)],
            },
            "runDetails": {
                "builder": {"id": "urn:tunetrail", "version": _versions()},
                "metadata": {
                    "invocationId": sha256_json(invocation),
                    "startedOn": attempts[0]["start"],
                    "finishedOn": attempts[-1]["end"],
                },
                "byproducts": [metrics_file, *byproducts, *_code_diff(code), usage],
            },
        },
    }
    return canonical(statement)


def _versions() -> dict[str, str]:
    return {"tunetrail": tunetrail.__version__, "snakemake": packages().get("snakemake", "")}


def _inputs(parents: Mapping[str, ParentEntry], output: Path) -> list[Dependency]:
    """The inputs, named by relative paths, since a run may be moved."""
    return [
        {
            "name": os.path.relpath(parent["path"], output),
            "digest": {"sha256": parent["manifest"]},
            "annotations": {"role": f"parent:{role}", "record": parent["record"]},
        }
        for role, parent in sorted(parents.items())
    ]


def _software(code: dict[str, Any]) -> list[dict]:
    """Code, lock file and installed packages."""
    git = {key: code[key] for key in ("commit", "dirty", "untracked", "library")}
    reason = {"reason": code["reason"]} if "reason" in code else {}
    digest = {"digest": {"gitCommit": code["commit"]}} if code["commit"] else {}
    lock = lock_file()
    return [
        {"name": "code"} | digest | {"annotations": {"role": "code"} | git | reason},
        *([lock | {"annotations": {"role": "lock"}}] if lock else []),
        {
            "name": "packages",
            "digest": {"sha256": sha256_json(packages())},
            "annotations": {"role": "packages", "installed": packages()},
        },
    ]


def _code_diff(code: dict[str, Any]) -> list[dict]:
    """How the code differed from its commit; only a digest if the diff is large."""
    diff = code["diff"]
    if diff is None:
        return []
    content = {"content": base64.b64encode(diff).decode()} if len(diff) <= MAX_DIFF else {}
    return [{"name": "code.diff", "digest": {"sha256": hashlib.sha256(diff).hexdigest()}} | content]


def _usage(stage: str, attempts: Sequence[Mapping[str, Any]], training_flops: float | None) -> dict[str, Any]:
    """The cost of making it; an unknown value is null with a reason."""
    energy = [attempt.get("energy_joules") for attempt in attempts]
    usage: dict[str, Any] = {
        "rule": stage,
        "device_hours": round(device_hours(attempts), 6),
        "training_flops": training_flops,
        "energy_joules": sum(e for e in energy if e) if None not in energy else None,
    }
    for key, reason in (
        ("training_flops", "this stage trains nothing, or its trainer does not count"),
        ("energy_joules", "no counter that this user may read"),
    ):
        if usage[key] is None:
            usage[f"{key}_reason"] = reason
    return usage


def exact_integers(value: Any) -> Any:
    """The value with integers from 2^53 on, which JSON readers may round, as strings: a seed can be that large."""
    if isinstance(value, dict):
        return {key: exact_integers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exact_integers(item) for item in value]
    return str(value) if isinstance(value, int) and abs(value) >= 2**53 else value


# ----------------------------------------------------------------------------- reading


_STATEMENT = TypeAdapter(Statement)


class Record:
    """The content of provenance.json by name. Raises DataError if it is not a record."""

    def __init__(self, content: bytes, source: str = PROVENANCE):
        self.content, self.digest = content, sha256_bytes(content)
        try:
            self.statement = parse_json(content)
            _STATEMENT.validate_python(self.statement, strict=True)
            if self.statement["_type"] != STATEMENT or self.statement["predicateType"] != PREDICATE:
                raise ValueError("another type of statement")
            build = self.statement["predicate"]["buildDefinition"]
            self.run = self.statement["predicate"]["runDetails"]
            parameters = build["externalParameters"]
            self.stage: str = parameters["stage"]
            self.part: str = parameters["part"]
            self.place: Place | None = None
            """Where it was made; None in records of earlier versions."""
            if "run" in parameters and "artifact" in parameters:
                self.place = Place(parameters["run"], parameters["artifact"])
            self.config_file: dict = parameters["config"]
            self.attempts: list[AttemptRecord] = build["internalParameters"]["attempts"]
            self.dependencies: list[Dependency] = build["resolvedDependencies"]
            self.manifest: str = self.statement["subject"][0]["digest"]["sha256"]
            self.roles = [d["annotations"]["role"] for d in self.dependencies]
            self.parents = self._parents()
        except ValidationError as e:
            raise DataError(f"{source}: is no provenance record ({first_error(e)})") from None
        except (ValueError, LookupError, TypeError) as e:
            raise DataError(f"{source}: is no provenance record ({type(e).__name__}: {e})") from None

    @property
    def config(self) -> dict:
        """The stage's own block."""
        return self.config_file.get("config", {})

    def _parents(self) -> dict[str, RecordedParent]:
        """The inputs, by role."""
        return {
            role.removeprefix("parent:"): {
                "name": d["name"],
                "manifest": d["digest"]["sha256"],
                "record": d["annotations"].get("record"),
            }
            for role, d in zip(self.roles, self.dependencies, strict=True)
            if role.startswith("parent:")
        }

    def of_role(self, role: str) -> list[Dependency]:
        return [d for r, d in zip(self.roles, self.dependencies, strict=True) if r == role]

    @property
    def imported(self) -> list[Dependency]:
        """The model that the stage took from elsewhere instead of training one, if it did."""
        return self.of_role(self.stage) if self.stage in ("sft", "reward") else []

    def annotations(self, role: str) -> dict:
        """The annotations of the first dependency with this role."""
        matching = self.of_role(role)
        return matching[0]["annotations"] if matching else {}

    @property
    def code(self) -> dict:
        return self.annotations("code")

    @property
    def packages(self) -> dict[str, str]:
        return self.annotations("packages").get("installed", {})

    @property
    def version(self) -> str:
        """The version of tunetrail."""
        return self.run.get("builder", {}).get("version", {}).get("tunetrail", "an unknown version")

    @property
    def started(self) -> str | None:
        return self.run.get("metadata", {}).get("startedOn")

    @property
    def finished(self) -> str | None:
        return self.run.get("metadata", {}).get("finishedOn")

    @property
    def usage(self) -> dict:
        return self._byproduct("usage").get("annotations", {})

    @property
    def metrics(self) -> str | None:
        """sha256 of metrics.json."""
        return self._byproduct("metrics.json").get("digest", {}).get("sha256")

    @property
    def tokenizer(self) -> str | None:
        """Digest of tokenizer and chat template; None if the stage has none."""
        found = self.of_role("tokenizer")
        return found[0].get("digest", {}).get("sha256") if found else None

    def _byproduct(self, name: str) -> dict[str, Any]:
        return next((b for b in self.run.get("byproducts", []) if b.get("name") == name), {})


def read_record(folder: Path) -> Record:
    """The record in a folder. Raises DataError if there is none or it is invalid, DiskError if it cannot be read."""
    path = folder / PROVENANCE
    try:
        return Record(read_regular(path), str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no record; run the stage that makes this folder again") from None
    except OSError as e:
        raise cannot_read(path, e) from None
