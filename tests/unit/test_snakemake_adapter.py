"""The adapter is for one version of Snakemake: the one in the lock."""

import re
from pathlib import Path

import snakemake

from tunetrail.monitor.snakemake_adapter import VERSION

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"\b(?:workflow|dag|persistence|api)\._[a-z]\w+|workflow_api\._workflow")


def test_the_adapter_is_for_the_locked_version():
    """When the lock changes: review every call in the adapter, run tests/workflow, and then change VERSION."""
    locked = re.search(r"^snakemake==(\S+)", (ROOT / "envs/requirements.txt").read_text(), re.MULTILINE)
    assert locked
    assert VERSION == locked[1] == snakemake.__version__


def test_nothing_else_calls_private_parts_of_snakemake():
    sources = [ROOT / "Snakefile", *(ROOT / "workflow").rglob("*.smk"), *(ROOT / "workflow/lib").rglob("*.py")]
    calls = {str(path.relative_to(ROOT)) for path in sources if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert calls == {"workflow/lib/tunetrail/monitor/snakemake_adapter.py"}
