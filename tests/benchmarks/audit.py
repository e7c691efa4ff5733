"""Speed of the audit: verifying, compared with sha256sum on all cores over the same bytes; tracing a lineage of 10,000
artifacts.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.records import seal_folder
from tunetrail.provenance.environment import packages
from tunetrail.provenance.lineage import Lineage, artifacts_using
from tunetrail.provenance.manifest import MANIFEST, read_manifest
from tunetrail.provenance.run_folder import artifacts
from tunetrail.provenance.verify import Verifier


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def verifying(run: Path, repeats: int = 5) -> dict:
    """Ratio of `audit verify --deep --recursive` to sha256sum over the files of all manifests; above 1: we are faster.

    They alternate, with the files in the page cache for both, and without start-up times.
    """
    files = [
        str(folder / entry["path"]) for folder in artifacts(run) for entry in read_manifest(folder / MANIFEST)["files"]
    ]
    command = ["xargs", "-0", "-n", "1", "-P", str(os.cpu_count()), "sha256sum"]
    names = "\0".join(sorted(files, key=lambda name: -os.path.getsize(name))).encode()
    sha256sum = lambda: subprocess.run(command, input=names, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
    size = sum(os.path.getsize(name) for name in files)
    sha256sum()
    ratios, speeds = [], []
    for _ in range(repeats):
        theirs, ours = seconds(sha256sum), seconds(lambda: Verifier(recursive=True).run([run]))
        ratios.append(theirs / ours)
        speeds.append(size / ours)
    whole = seconds(
        lambda: subprocess.run(
            [sys.executable, "-m", "tunetrail", "audit", "verify", "--recursive", str(run)],
            check=False,
            stdout=subprocess.DEVNULL,
        )
    )
    return {
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "bytes": size,
        "bytes_a_second": statistics.median(speeds),
        "command_seconds": whole,
    }


def tracing(n: int = 10_000) -> dict:
    """Seconds to trace a lineage of n artifacts: up from its last, and down from its first."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        folders = [run / str(i) for i in range(n)]
        for i, folder in enumerate(folders):
            folder.mkdir()
            (folder / "metrics.json").write_text(f'{{"i": {i}}}')
            seal_folder(folder, "sft", {"a": folders[i - 1], "b": folders[i // 2]} if i else {}, installed=packages())
        up = seconds(lambda: Lineage().add(folders[-1]))

        def down() -> None:
            lineage = Lineage()
            lineage.add_run(run)
            assert len(lineage.descendants(artifacts_using(lineage, str(folders[0])))) == n - 1

        return {"artifacts": n, "up_seconds": up, "reverse_seconds": seconds(down)}
