"""The rows of manifests, records and ledgers. On disk each is JSON of exactly this shape."""

from pathlib import Path
from typing import Any, Literal, TypedDict


class FileEntry(TypedDict):
    """A file of a manifest."""

    path: str
    """From the artifact's folder."""
    size: int
    """Bytes."""
    sha256: str


class TensorEntry(TypedDict):
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    shape: list[int]
    sha256: str
    """Of its bytes."""


class LedgerEntry(TypedDict):
    """A line of a ledger."""

    artifact: str
    """Its path in the run."""
    manifest: str
    """sha256 of its manifest file."""
    record: str
    """sha256 of its record."""
    number: int
    """Of this line, from 0."""
    previous: str
    """sha256 of the line before."""


class Dependency(TypedDict, total=False):
    """What an artifact was made from: a ResourceDescriptor of SLSA."""

    name: str
    uri: str
    digest: dict[str, str]
    """`sha256` or `gitCommit`; absent where none can be had."""
    annotations: dict[str, Any]
    """`role`, and what else is known. `files` maps paths to sha256; a recursive audit compares them again."""


class ParentEntry(TypedDict):
    """What a record will say of an input."""

    path: Path
    """Its folder."""
    manifest: str
    """sha256 of its manifest file."""
    record: str | None
    """sha256 of its record; None where there is none."""
    labels: list[Dependency]
    """The labels it was made from, and its own."""


class RecordedParent(TypedDict):
    """What a record says of an input."""

    name: str
    """The way from the artifact's folder to the input's."""
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
    """What the error said; None where there was none, or nobody could write it."""


class PlannedMemory(TypedDict):
    """What a training expects to need on each device, see `models.fit`."""

    bytes: int
    gradient_checkpointing: bool


class AttemptRecord(TypedDict, total=False):
    """One process that worked on an artifact. `environment.environment` fills in the keys from `host` on."""

    start: str
    """ISO 8601."""
    end: str | None
    """None for an attempt that was killed."""
    seconds: float | None
    pid: int
    ended: Ended
    state_in: SavedState
    """What it resumed from; absent for one that began from nothing."""
    states_out: list[SavedState]
    """The last two states it saved, newest last."""
    measurements: dict[str, dict[str, float | None]]
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
    cores: int
    python: str
    torch: str | None
    code: str
    """Digest of the library's files."""
    packages: str
    """Digest of the installed packages."""
    deterministic: bool | None
    variables: dict[str, str]
