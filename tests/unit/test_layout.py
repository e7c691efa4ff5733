"""House rules that no linter knows: layers, sizes, and what importing a module may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "workflow/lib/tunetrail"
LAYERS = (
    {"errors", "seeds", "files", "terminal"},
    {"config"},
    {"preferences"},
    {"provenance"},
    {"contract"},
    {"models", "data"},
    {"scorers", "ppo", "reward", "evaluation"},
    {"labeling"},
    {"reporting"},
    {"stages"},
    {"launch"},
    {"monitor"},
    {"cli"},
)
"""From the ground up: a package imports packages above it in this list, and those on the same line."""
TABLE = "tunetrail.stages.registry"
"""The table of stages imports only the config, so every layer above the config may read it."""
MODULES = sorted(LIBRARY.rglob("*.py"))


def layer(module: str) -> int:
    """The layer of `tunetrail.<package>.…`; the package `tunetrail` itself is below all."""
    package = module.split(".")[1] if "." in module else ""
    return next((n for n, packages in enumerate(LAYERS) if package in packages), -1)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Every module of the library that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tunetrail"):
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "tunetrail" else {node.module}
            )
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("tunetrail")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_package_imports_only_lower_layers(path):
    own = layer(name_of(path))
    used = imports(path) - {TABLE}
    assert [module for module in sorted(used) if own >= 0 and layer(module) > own] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    limit = 200 if path.parent == LIBRARY / "stages" and path.name != "registry.py" else 400
    assert len(source.splitlines()) <= limit
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60} == {}  # type: ignore[operator]


HEAVY = ("torch", "transformers", "trl", "datasets", "pandas", "altair", "sqlalchemy", "starlette", "snakemake")
LIGHT = {
    "tunetrail.stages.registry": HEAVY,
    "tunetrail.data.readers": (*HEAVY, "tunetrail.provenance.verify", "tunetrail.labeling", "tunetrail.reporting"),
    "tunetrail.preferences.ranks": (*HEAVY, "tunetrail.labeling", "tunetrail.provenance"),
    "tunetrail.cli": HEAVY,
    "tunetrail.launch.__main__": HEAVY,
    "tunetrail.contract.runner": HEAVY,
    "tunetrail.stages.sft": ("altair", "sqlalchemy", "snakemake", "tunetrail.labeling", "tunetrail.reporting"),
    "tunetrail.stages.comparisons": ("torch", "altair", "sqlalchemy", "starlette", "tunetrail.reporting"),
    "tunetrail.stages.report": ("torch", "transformers", "sqlalchemy", "starlette", "tunetrail.labeling"),
}  # fmt: skip
"""Module -> what importing it must not load."""


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_only_what_is_used(module):
    code = f"import sys, {module}; print(*sorted(set({LIGHT[module]!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_head_process_loads_nothing_heavy():
    """Every start of Snakemake pays for the rules' imports and for validating a config with local files."""
    rules = (ROOT / "workflow/rules/common.smk").read_text(encoding="utf-8")
    lines = [line.strip() for line in rules.splitlines() if line.strip().startswith("from tunetrail")]
    assert any("preflight" in line for line in lines)
    heavy = set(HEAVY) - {"snakemake"} | {"tunetrail.provenance.verify", "tunetrail.labeling", "tunetrail.reporting"}
    code = "\n".join([*lines, "import sys", f"print(*sorted({heavy!r} & set(sys.modules)))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_model_brings_code_that_is_run():
    """transformers would ask on a terminal, where the question can be missed; an adapter of PEFT has no code."""
    calls = [
        (name_of(path), node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) > 10
    trusting = [
        name
        for name, call in calls
        if "trust_remote_code=False" not in [ast.unparse(word).replace(" ", "") for word in call.keywords]
        and ast.unparse(call.func) != "PeftModel.from_pretrained"
    ]
    assert trusting == []
