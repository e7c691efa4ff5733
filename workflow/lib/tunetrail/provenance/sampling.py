"""A quick digest of a large folder, for what each start of Snakemake compares."""

import hashlib
from pathlib import Path

from tunetrail.provenance.manifest import visible_files

BLOCK, BLOCKS = 2**12, 256
"""How many bytes per block, and blocks per file, `sample` reads."""


def sample(folder: Path) -> str:
    """A digest of names, sizes and evenly spaced blocks of a folder's files, to tell models apart quickly.

    At most 1 MB per file is read, so that each start of Snakemake can afford it. Training changes nearly every weight;
    files of up to 1 MB are read completely. This is not a digest of the content: stages and audits read every byte.
    """
    digest = hashlib.sha256()
    for path in visible_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode(errors="surrogateescape"))
        step = max(BLOCK, size // BLOCKS)
        with path.open("rb", buffering=0) as f:
            for start in range(0, size, step):
                f.seek(start)
                digest.update(f.read(BLOCK))
    return digest.hexdigest()[:16]
