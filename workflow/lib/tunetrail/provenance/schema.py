"""The rows of manifests, records and ledgers. On disk each is JSON of this shape, and is refused if it is not.

pydantic checks them, which needs the TypedDict of typing_extensions before Python 3.12.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required

from annotated_types import MinLen
from pydantic import NonNegativeInt, StringConstraints
from typing_extensions import TypedDict

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class FileEntry(TypedDict):
    """A file of a manifest."""

    path: str
    """From the artifact's folder."""
    size: NonNegativeInt
    """Bytes."""
    sha256: Sha256


class TensorEntry(TypedDict):
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    shape: list[int]
    sha256: str
    """sha256 of its bytes."""


class ListedTensor(TensorEntry):
    """A tensor of a manifest."""

    file: str
    """The path of its file."""


class Manifest(TypedDict):
    """A manifest.json."""

    schema: NotRequired[int]
    stage: NotRequired[str]
    tokenizer: NotRequired[str | None]
    """Digest of the tokenizer and chat template; None where the stage has none."""
    files: list[FileEntry]
    tensors: NotRequired[list[ListedTensor]]


class LedgerEntry(TypedDict):
    """A line of a ledger."""

    artifact: str
    """Its path in the run."""
    manifest: str
    """sha256 of its manifest file."""
    record: str
    """sha256 of its record."""
    number: int
    """The number of this line, from 0."""
    previous: str
    """sha256 of the line before."""


class Annotations(TypedDict, total=False):
    """What is known of a dependency; other keys may say more."""

    role: Required[str]
    record: str | None
    """Of an input: sha256 of its record."""
    files: dict[str, str]
    """Path from the artifact's folder -> sha256; a recursive audit compares them again."""
    licence: str | None
    revision: str | None
    commit: str | None
    dirty: bool | None
    library: str
    untracked: dict[str, str]
    installed: dict[str, str]
    """Package -> version."""
    labelers: list[str]


class Dependency(TypedDict, total=False):
    """What an artifact was made from: a ResourceDescriptor of SLSA."""

    name: Required[str]
    uri: str
    digest: dict[str, str]
    """`sha256` or `gitCommit`; absent where none can be had."""
    annotations: Required[dict[str, Any]]
    """See `Annotations`."""


class ParentEntry(TypedDict):
    """What a record will say about an input."""

    path: Path
    """Its folder."""
    manifest: str
    """sha256 of its manifest file."""
    record: str | None
    """sha256 of its record; None if there is none."""
    labels: list[Dependency]
    """The labels that it was made from, and its own."""


class RecordedParent(TypedDict):
    """What a record says about an input."""

    name: str
    """The input's folder, relative to the artifact's."""
    manifest: str
    record: str | None


class SavedState(TypedDict):
    """A state of a trainer that an attempt saved or resumed from."""

    name: str
    digest: str


class Ended(TypedDict):
    """How an attempt ended."""

    outcome: Literal["done", "interrupted", "waiting", "superseded", "failed", "killed"]
    message: str | None
    """The error's message; None if there was no error, or it could not be written."""


class PlannedMemory(TypedDict):
    """What a training expects to need on each device, see `models.fit`."""

    bytes: int
    gradient_checkpointing: bool


class AttemptRecord(TypedDict, total=False):
    """One process that worked on an artifact. `environment.environment` fills in the keys from `host` on."""

    start: Required[str]
    """ISO 8601."""
    end: str | None
    """None for an attempt that was killed."""
    seconds: float | None
    pid: int
    ended: Ended | str
    """Text in records of early versions."""
    state_in: SavedState
    """The state that it resumed from; absent for a fresh start."""
    states_out: list[SavedState]
    """The last two states it saved, newest last."""
    measurements: dict[str, dict[str, Any]]
    """What a stage measured of the machine, by what it was doing; see the stage."""
    planned: PlannedMemory
    """Of a stage that trains: what it expected to need; absent where that is negligible."""
    peak_bytes: int
    """The most memory its first process used: what torch took of its GPU, or the resident set."""
    energy_joules: float | None
    host: str
    job_id: str | None
    partition: str | None
    nodes: str | None
    world_size: int
    gpus: list[str]
    driver: str | None
    cpu: str
    cores: int | None
    python: str
    torch: str | None
    code: str
    """Digest of the library's files."""
    packages: str
    """Digest of the installed packages."""
    deterministic: bool | None
    variables: dict[str, str]


# ----------------------------------------------------------------------------- the record as a whole


class AnnotatedDependency(Dependency):
    annotations: Required[Annotations]  # type: ignore[misc]


class Subject(TypedDict):
    name: NotRequired[str]
    digest: dict[str, str]


class ConfigFile(TypedDict, total=False):
    """A stage's resolved config."""

    config: dict[str, Any]
    """The stage's own block."""


class ExternalParameters(TypedDict):
    stage: str
    part: str
    config: ConfigFile
    run: NotRequired[str]
    """The run it was made in."""
    artifact: NotRequired[str]
    """Its path in the run. Records of early versions have neither."""


class InternalParameters(TypedDict):
    attempts: Annotated[list[AttemptRecord], MinLen(1)]


class BuildDefinition(TypedDict):
    externalParameters: ExternalParameters
    internalParameters: InternalParameters
    resolvedDependencies: list[AnnotatedDependency]


class Builder(TypedDict):
    version: NotRequired[dict[str, str]]


class Metadata(TypedDict):
    startedOn: NotRequired[str | None]
    finishedOn: NotRequired[str | None]


class Usage(TypedDict, total=False):
    device_hours: float
    training_flops: float | None
    energy_joules: float | None


class Byproduct(TypedDict):
    name: NotRequired[str]
    digest: NotRequired[dict[str, str]]
    annotations: NotRequired[Usage]


class RunDetails(TypedDict):
    builder: NotRequired[Builder]
    metadata: NotRequired[Metadata]
    byproducts: NotRequired[list[Byproduct]]


class Predicate(TypedDict):
    buildDefinition: BuildDefinition
    runDetails: RunDetails


class Statement(TypedDict):
    """A provenance.json: an in-toto Statement with a SLSA provenance predicate."""

    subject: Annotated[list[Subject], MinLen(1)]
    predicate: Predicate
