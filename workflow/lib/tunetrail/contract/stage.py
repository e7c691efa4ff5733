"""What a stage's `run` gets: the request, its verified inputs, this attempt, and a draft of the record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunetrail.contract.lease import Lease
from tunetrail.contract.stop import Stop
from tunetrail.files import read_jsonl
from tunetrail.provenance.manifest import DigestCache
from tunetrail.provenance.schema import Dependency, Manifest, ParentEntry


@dataclass(frozen=True)
class Request:
    """What to make, according to the stage's command and its config file."""

    name: str
    config: dict[str, Any]
    """The stage's own block."""
    shared: dict[str, Any]
    """The other keys of its config file: stage, seed, precision, …"""
    output: Path
    """Where the artifact will be. Write nothing there: fill `Attempt.work`."""
    part: tuple[int, int] = (0, 1)
    """(i, n): this is shard i of n."""


@dataclass(frozen=True)
class Input:
    """An artifact that the stage reads."""

    folder: Path
    """Verified against its manifest."""
    manifest: Manifest
    origin: ParentEntry
    """What the record will say about it, as it was when the stage started."""


@dataclass
class Attempt:
    """The work of this process: its folders, its leases, and when to save and leave."""

    work: Path
    """An empty folder that becomes the artifact."""
    state: Path
    """Survives failure; the place for checkpoints and finished parts."""
    stop: Stop
    digests: DigestCache = field(default_factory=lambda: DigestCache(None))
    check_inputs: Callable[[], None] = lambda: None
    """Compares the inputs with their manifests again; untouched files are not read again."""
    leases: list[Lease] = field(default_factory=list)
    """On state and output, held by the process that writes."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    """Name and digest of the last two states that this attempt could be resumed from, newest last."""
    note: Callable[[str, Any], None] = lambda key, value: None
    """Writes something into the record of this attempt at once: a killed attempt cannot do so later."""

    def is_superseded(self) -> bool:
        """Whether another attempt has taken over: then nothing more may be written."""
        return any(lease.lost() for lease in self.leases)

    def check_leases(self) -> None:
        """Raises Superseded if another attempt has taken over."""
        for lease in self.leases:
            lease.check()

    def check(self) -> None:
        """Call before writing anything that others or a later attempt read.

        Raises Superseded if another attempt has taken over, and DataError if an input has changed since it was
        verified: the stage may have loaded either version.
        """
        self.check_leases()
        self.check_inputs()


@dataclass
class RecordDraft:
    """What only the stage knows about the artifact's origin, for its provenance record."""

    dependencies: list[Dependency] = field(default_factory=list)
    """Data sources, packages and labels, made by `provenance.record.dependency`."""
    about: tuple[str, ...] = ()
    """Roles of the inputs that the artifact is a statement about: the model of an evaluation."""
    training_flops: float | None = None
    """See `models.loading.training_flops`; None if nothing is trained."""
    tokenizer_digest: str | None = None


@dataclass
class Stage:
    """What a stage's `run` gets."""

    request: Request
    inputs: dict[str, Input]
    """By role."""
    attempt: Attempt
    draft: RecordDraft = field(default_factory=RecordDraft)

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def config(self) -> dict[str, Any]:
        return self.request.config

    @property
    def shared(self) -> dict[str, Any]:
        return self.request.shared

    @property
    def seed(self) -> int:
        return self.request.shared["seed"]

    @property
    def output(self) -> Path:
        return self.request.output

    @property
    def work(self) -> Path:
        return self.attempt.work

    @property
    def state(self) -> Path:
        return self.attempt.state

    @property
    def stop(self) -> Stop:
        return self.attempt.stop

    def rows(self, role: str, name: str, optional: bool = False) -> list[dict[str, Any]]:
        """The rows of a JSONL file in an input folder; empty if the file is `optional` and missing."""
        path = self.inputs[role].folder / name
        return [] if optional and not path.exists() else read_jsonl(path)
