"""The adapter is for one version of Snakemake: the one in the lock."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import snakemake

from tunetrail.monitor.snakemake_adapter import VERSION, run_handlers

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


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((75, 65), 65), ((65, 75), 65), ((65, 78), 65), ((78, 65), 78), ((76, 75), 75), ((75, 75), 75), ((None, 65), 65)],
)
def test_of_two_modules_that_fail_the_graver_exit_code_counts_and_both_have_their_say(codes, expected):
    """Not that of the module that was read last."""
    said = []

    def end(n: int):
        def handler():
            said.append(n)
            if codes[n] is not None:
                sys.exit(codes[n])

        return handler

    def nothing(log: object) -> None:
        said.append("outer")

    workflow = SimpleNamespace(
        _onstart=nothing, _onsuccess=nothing, _onerror=nothing, onstart=None, onsuccess=None, onerror=None,
        modifier=SimpleNamespace(is_main_snakefile=lambda: False),
    )  # fmt: skip
    for n in range(2):
        workflow.globals = {"onstart": end(n), "onsuccess": end(n), "onerror": end(n)}
        run_handlers(workflow, f"results/{n}")
    with pytest.raises(SystemExit) as ended:
        workflow._onerror("log")
    assert (ended.value.code, said) == (expected, ["outer", 0, 1])
