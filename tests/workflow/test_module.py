"""tunetrail as a module of another workflow: the same guarantees, with other names and folders."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tunetrail.contract.lease import hold
from tunetrail.monitor import dag
from tunetrail.provenance import ledger

from ..conftest import ROOT, Project

TINY = yaml.safe_load((ROOT / "config/examples/tiny.yaml").read_text())
SNAKEFILE = """
configfile: "config/config.yaml"

module tunetrail:
    snakefile:
        {snakefile!r}
    config:
        config["alignment"]
    prefix:
        "results/llm"

use rule * from tunetrail as tt_*

rule own:
    input:
        "results/llm/results/tiny/{artifact}/manifest.json",
    output:
        "own.txt",
    shell:
        "env > {{output}}"

onstart:
    print("outer starts", file=sys.stderr)
onsuccess:
    print("outer has succeeded", file=sys.stderr)
onerror:
    print("outer has failed", file=sys.stderr)
"""
PREFIX = "results/llm"
RUN = f"{PREFIX}/results/tiny"


class Outer:
    """Another repository, whose workflow uses the project's as a module."""

    def __init__(self, folder: Path, project: Project):
        self.folder, self.project = folder, project
        (folder / "workflow").mkdir(parents=True)
        (folder / "config").mkdir()
        self.write(TINY)

    def write(self, config: dict, artifact: str = "base", snakefile: str = SNAKEFILE) -> None:
        inner = str(self.project.folder / "workflow/Snakefile")
        (self.folder / "workflow/Snakefile").write_text(snakefile.format(snakefile=inner, artifact=artifact))
        (self.folder / "config/config.yaml").write_text(yaml.safe_dump({"other": 1, "alignment": config}))

    def snakemake(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        path = f"{self.project.path}{os.pathsep}{os.environ['PATH']}"
        command = [self.project.python, "-m", "snakemake", "--profile", f"{self.project.folder}/profiles/local"]
        return subprocess.run(
            [*command, *options], cwd=self.folder, env=os.environ | {"PATH": path} | environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def run(self, *options: str, **environment: str) -> str:
        reply = self.snakemake(*options, **environment)
        assert reply.returncode == 0, reply.stdout[-3000:] + reply.stderr[-6000:]
        return reply.stdout + reply.stderr


@pytest.fixture
def outer(project, tmp_path) -> Outer:
    return Outer(tmp_path / "outer", project)


def test_a_run_below_a_prefix_is_sealed_and_sound_and_does_not_affect_the_outer_rules(outer, monkeypatch):
    outer.write(TINY, "sft")
    said = outer.run("own")
    assert re.search("SOUND.*: 3 artifacts", said)
    assert len(ledger.artifacts(outer.folder / RUN)) == len(read(outer.folder / RUN / "ledger.jsonl")) == 3
    assert [said.count(f"outer {event}") for event in ("starts", "has succeeded", "has failed")] == [1, 1, 0]
    assert {path.name for path in outer.folder.iterdir()} == {".snakemake", "config", "own.txt", "results", "workflow"}
    assert {path.name for path in (outer.folder / PREFIX).iterdir()} == {"benchmarks", "logs", "results", "state"}
    given = dict(line.partition("=")[::2] for line in (outer.folder / "own.txt").read_text().splitlines())
    assert "TUNETRAIL_DIGESTS" not in given
    assert given.get("PYTHONPATH") == os.environ.get("PYTHONPATH")
    assert "Nothing to be done" in outer.run("own")

    # Commands that look at runs know the stages by their own names.
    monkeypatch.chdir(outer.folder)
    config, jobs = dag.read_run(f"{outer.project.folder}/profiles/local", [], Path("workflow/Snakefile"))
    assert config.run == "tiny"
    assert {job.name for job in jobs if not job.needed} == {"base", "data", "sft"}
    changed = TINY | {"sft": TINY["sft"] | {"learning_rate": 0.5}}
    outer.write(changed, "sft")
    _, jobs = dag.read_run(f"{outer.project.folder}/profiles/local", [], Path("workflow/Snakefile"))
    why = {job.name: (job.rule, job.why, job.after) for job in jobs if job.needed}
    assert why["sft"] == ("tt_sft", "config: learning_rate: 0.001 -> 0.5", ())
    assert why["evaluation/sft"] == ("tt_evaluation", "not made yet", ("comparisons", "retention", "reward", "sft"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_one_head_works_on_a_run(outer):
    with hold(outer.folder / PREFIX / "state/tiny/head", give_up=lambda: True, say=print):
        reply = outer.snakemake("own")
    assert reply.returncode == 75
    assert "another snakemake is working on this run" in reply.stderr
    assert "outer starts" not in reply.stderr
    assert not (outer.folder / RUN).exists()


def test_a_failed_stage_sets_the_exit_code_after_the_outer_workflows_handlers(outer):
    """Earlier artifacts are sealed, and the user's files are where the config says, whatever the prefix."""
    rows = [{"prompt": f"question {i}", "completion": "x" * (10 + i)} for i in range(40)]
    (outer.folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"demonstrations": [{"source": "file", "path": "d.jsonl"}], "max_completion_tokens": 48}
    outer.write({"run": "tiny", "base": TINY["base"], "data": data}, "data")
    reply = outer.snakemake("own")
    assert reply.returncode == 65
    assert reply.stderr.index("outer has failed") < reply.stderr.index("data failed (attempt 1, exit code 65): ")
    assert f"{PREFIX}/logs/tiny/data.log" in reply.stderr
    assert len(read(outer.folder / RUN / "ledger.jsonl")) == 1

    # If a rule of the outer workflow fails too, no stage sets the exit code.
    snakefile = SNAKEFILE + 'rule bad:\n    output: "bad.txt"\n    shell: "false"\n'
    outer.write({"run": "tiny", "base": TINY["base"], "data": data}, "data", snakefile)
    reply = outer.snakemake("own", "bad.txt")
    assert reply.returncode == 1
    assert "data failed (attempt 2, exit code 65): " in reply.stderr


def test_the_profile_applies_to_renamed_rules_and_their_new_names_win(outer, monkeypatch):
    monkeypatch.chdir(outer.folder)
    jobs = {job.rule: job for job in dag.read_run(f"{outer.project.folder}/profiles/local", [])[1]}
    assert (jobs["tt_sft"].threads, jobs["tt_sft"].resources["mem_mb"]) == (2, 5000)
    assert (jobs["tt_report"].threads, jobs["tt_report"].resources["mem_mb"]) == (1, 1000)

    said = outer.run(
        "--dry-run", "--printshellcmds", "--set-resources", "sft:mem_mb=7", "sft:launcher='submitit'", "dpo:mem_mb=8",
        "tt_sft:mem_mb=9", "tt_reward:launcher='submitit'",
    )  # fmt: skip
    launched = {stage: json.loads(given) for stage, given in re.findall(r"--stage (\w+) .*--resources '(.*?)'", said)}
    assert launched["sft"] == {"mem_mb": 9, "launcher": "submitit"}
    assert launched["reward"]["launcher"] == "submitit"
    assert launched["dpo"] == {"mem_mb": 8}


def test_redefining_a_rule_runs_the_handlers_only_once(outer):
    again = "use rule base from tunetrail as tt_base with:\n    resources: marker=7\n"
    outer.write(TINY, "base", SNAKEFILE + again)
    said = outer.run("own")
    assert said.count("SOUND") == 1
    assert re.search(r"rule tt_base:(\n    .*)*\n    resources: .*marker=7", said)


def test_two_runs_as_modules_are_both_sealed(outer):
    """No setting of one, such as the place of its digests, affects the other."""
    second = SNAKEFILE.replace("module tunetrail:", "module second:").replace('"results/llm"', '"results/second"')
    second = second[second.index("module second:") : second.index("rule own:")]
    second = second.replace("from tunetrail as tt_*", "from second as second_*")
    outer.write(TINY, "base", SNAKEFILE.replace("rule own:", second + "\nrule own:"))
    manifests = [f"{RUN}/base/manifest.json", "results/second/results/tiny/base/manifest.json"]
    said = outer.run("--printshellcmds", *manifests)
    assert len(re.findall("SOUND.*: 1 artifacts", said)) == 2
    digests = dict(re.findall(r"TUNETRAIL_DIGESTS=(\S+) .* --output (\S+)", said))
    assert digests == {
        "results/llm/state/tiny/.digests": manifests[0], "results/second/state/tiny/.digests": manifests[1]
    }  # fmt: skip


def test_the_error_for_a_module_without_a_config_is_one_line(outer):
    outer.write({"samples": 3})
    reply = outer.snakemake("own", "--dry-run")
    assert reply.returncode == 78
    line = (
        "config/config.yaml (module tunetrail): base is missing: give the module a config of tunetrail, as in `config: "
    )
    assert [line in said for said in reply.stderr.splitlines()].count(True) == 1
    assert "Traceback" not in reply.stderr
    outer.write(TINY | {"sft": {"batchsize": 8}})
    reply = outer.snakemake("own", "--dry-run")
    assert reply.returncode == 78
    assert "config/config.yaml (module tunetrail): sft.batchsize: unknown key" in reply.stderr


def test_the_snakefiles_in_the_documentation_run(outer):
    page = (ROOT / "workflow/README.md").read_text()
    snakefile, change = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    hosted = 'github("<owner>/tunetrail", path="workflow/Snakefile", tag="<tag>")'
    assert hosted in snakefile
    inner = repr(str(outer.project.folder / "workflow/Snakefile"))
    text = snakefile.replace(hosted, inner) + change.partition("\n\n")[2]
    (outer.folder / "workflow/Snakefile").write_text(text)
    (outer.folder / "config/config.yaml").write_text(yaml.safe_dump({"tunetrail": TINY | {"run": "demo"}}))
    said = outer.run("--dry-run")
    made = dict(re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE))
    assert {"everything", "answers", "tt_dpo", "tt_sft"} <= made.keys()
    assert "tt_report" not in made
    assert re.search(r"rule tt_sft:(\n    .*)*\n    resources: .*slurm_partition=a100", said)


# ----------------------------------------------------------------------------- from a repository on the web


REPOSITORY = "https://github.com/example/tunetrail"


@pytest.fixture
def repository(outer, tmp_path) -> dict[str, str]:
    """The project with a tag v1 at an address on the web; returns the variables with which git finds it."""
    origin = tmp_path / "origin"
    shutil.copytree(outer.project.folder, origin, ignore=shutil.ignore_patterns("outer", "origin"), symlinks=True)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(origin)]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "all"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    instead = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{origin}.insteadOf"}
    return instead | {"GIT_CONFIG_VALUE_0": REPOSITORY, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_a_repository_made_by_snakedeploy_runs(outer, repository, tmp_path):
    """Rules come from the tag; the library is the installed one, alone on the jobs' path."""
    snakedeploy = shutil.which("snakedeploy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not snakedeploy:
        pytest.skip("snakedeploy is not installed")
    outer.folder = tmp_path / "deployed"
    command = [snakedeploy, "deploy-workflow", REPOSITORY, str(outer.folder), "--tag", "v1"]
    subprocess.run(command, env=os.environ | repository, check=True, capture_output=True)
    shutil.copy(outer.folder / "config/examples/tiny.yaml", outer.folder / "config/config.yaml")
    said = outer.run("--dry-run", **repository)
    assert re.search(r"^report +1$", said, re.MULTILINE)
    said = outer.run("--printshellcmds", "results/tiny/base/manifest.json", **repository)
    assert re.search("SOUND.*: 1 artifacts", said)
    library = outer.folder / "state/tiny/lib"
    assert f"PYTHONPATH={library} " in said
    assert [path.name for path in library.iterdir()] == ["tunetrail"]


def test_rules_of_another_version_than_the_library_are_refused(outer, repository, tmp_path):
    source = 'github("example/tunetrail", path="workflow/Snakefile", tag="v1")'
    outer.write(TINY, snakefile=SNAKEFILE.replace("{snakefile!r}", source))
    init = tmp_path / "origin/workflow/lib/tunetrail/__init__.py"
    init.write_text('__version__ = "9.9.9"\n')
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "9.9.9"],
        cwd=tmp_path / "origin", check=True,
    )  # fmt: skip
    subprocess.run(["git", "tag", "-f", "v1"], cwd=tmp_path / "origin", check=True, capture_output=True)
    reply = outer.snakemake("own", "--dry-run", **repository)
    assert reply.returncode == 78
    line = reply.stderr.splitlines()[-1]
    assert "is installed, but the workflow is version 9.9.9; install it into this environment: " in line
    assert line.endswith(f'pip install "git+{REPOSITORY}@v1"')


def test_the_catalogs_requirements_are_met():
    """https://github.com/snakemake/snakemake-workflow-catalog#standardized-usage-workflows"""
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage.keys() == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["mandatory-flags"].keys() == {"desc", "flags"}
    assert Path(ROOT, usage["mandatory-flags"]["flags"].split()[-1], "config.yaml").exists()
    assert (ROOT / "config/README.md").exists()
    assert "workflow" in (ROOT / "README.md").read_text().lower()
