"""An artifact's lineage in formats that others read, each written by the format's own library.

slsa        the record as it is, in its DSSE envelope if it is signed
prov        W3C PROV-JSON: entities, activities, derivations
spdx        SPDX 3.0.1 with the AI and dataset profiles: trainedOn, descendantOf
ro-crate    Workflow Run RO-Crate metadata (ro-crate-metadata.json) of the run
model-card  a README.md as Hugging Face reads it
"""

import importlib
from pathlib import Path

FORMATS = ("slsa", "ro-crate", "prov", "spdx", "model-card")


def export(folder: Path, format: str) -> str:
    """The artifact's lineage in one of `FORMATS`."""
    return importlib.import_module(f"tunetrail.provenance.exports.{format.replace('-', '_')}").export(folder)
