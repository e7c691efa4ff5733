"""The record as it is, in its DSSE envelope if it is signed."""

from pathlib import Path

from tunetrail.provenance.exports.common import lineage_of
from tunetrail.provenance.manifest import PROVENANCE, SIGNATURE


def export(folder: Path) -> str:
    path = folder / (SIGNATURE if (folder / SIGNATURE).exists() else PROVENANCE)
    lineage_of(folder)  # raises if the folder is no artifact, or an ancestor is missing
    return path.read_text() + "\n"
