"""What profiles/slurm requests from Slurm, rule by rule, as it is and as a site would change it."""

import re
from pathlib import Path

import pytest
import yaml
from snakemake.profiles import ProfileConfigFileParser
from snakemake.resources import Resources

from tunetrail.launch.resources import sbatch_options
from tunetrail.stages.registry import STAGES

from ..conftest import ROOT

PROFILE = ROOT / "profiles/slurm/config.yaml"


def options(path: Path, attempt: int = 1) -> dict[str, dict[str, str]]:
    """Rule -> sbatch's options, as Snakemake itself reads the profile."""
    with path.open() as f:
        read = ProfileConfigFileParser().parse(f)

    def pairs(items: list[str], depth: int) -> dict:
        found: dict = {}
        for item in items:
            name, value = item.split("=", 1)
            rule, _, key = name.partition(":") if depth == 2 else (name, "", "")
            found.setdefault(rule, {}).update({key: value}) if depth == 2 else found.update({rule: value})
        return found

    defaults, threads = pairs(read["default-resources"], 1), pairs(read["set-threads"], 1)
    found = {}
    for rule, own in pairs(read["set-resources"], 2).items():
        parsed = Resources.from_mapping({name: evaluated(value, attempt) for name, value in (defaults | own).items()})
        resources = {name: resource.value for name, resource in parsed.items()}
        found[rule] = sbatch_options(resources, int(threads.get(rule, 1)))
    return found


def evaluated(value: str, attempt: int) -> str | int:
    """Evaluates a value as Snakemake does: an expression if it is one, else the text."""
    try:
        result = eval(value, {"attempt": attempt})
    except (NameError, SyntaxError):
        return value
    return result if isinstance(result, int | str) else value


def edited(tmp_path: Path, **variables: str) -> Path:
    """The profile with other values at its top, as a site would set them."""
    content = PROFILE.read_text()
    for name, value in variables.items():
        content, n = re.subn(rf"^  {name}: \S+", f"  {name}: {value}", content, count=1, flags=re.MULTILINE)
        assert n == 1
    path = tmp_path / "config.yaml"
    path.write_text(content)
    return path


def test_both_profiles_name_every_stage_and_nothing_else():
    """All but `tasks`, which runs where snakemake runs. Snakemake ignores names that are no rules."""
    rules = {
        name
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for name in re.findall(r"^use rule stage as (\w+) with:", path.read_text(), re.MULTILINE)
    }
    assert rules == set(STAGES)
    local = yaml.safe_load((ROOT / "profiles/local/config.yaml").read_text())
    assert set(options(PROFILE)) == set(local["set-threads"]) == set(STAGES) - {"tasks"}
    assert set(local["set-resources"]) <= set(STAGES)


def test_the_stages_that_run_a_model_get_a_gpu():
    assert {rule for rule, found in options(PROFILE).items() if "gres" in found} == {
        name for name, stage in STAGES.items() if stage.gpu
    }


EXPECTED = {
    "base": "partition=cpu time=60 mem=16000 ntasks=1 cpus-per-task=2",
    "data": "partition=cpu time=120 mem=16000 ntasks=1 cpus-per-task=2",
    "comparisons": "partition=cpu time=120 mem=16000 ntasks=1 cpus-per-task=2",
    "best_of_n": "partition=cpu time=30 mem=4000 ntasks=1 cpus-per-task=1",
    "head_to_head": "partition=cpu time=60 mem=8000 ntasks=1 cpus-per-task=2",
    "report": "partition=cpu time=60 mem=8000 ntasks=1 cpus-per-task=2",
    "retention": "partition=gpu time=60 mem=16000 cpus-per-gpu=4 gres=gpu:1",
    "completions": "partition=gpu time=240 mem=16000 cpus-per-gpu=4 gres=gpu:1",
    "evaluation": "partition=gpu time=240 mem=16000 cpus-per-gpu=4 gres=gpu:1",
    "methods": "partition=gpu time=240 mem=32000 cpus-per-gpu=4 gres=gpu:1",
    "lm_eval": "partition=gpu time=240 mem=16000 cpus-per-gpu=4 gres=gpu:1",
    "sft": "partition=gpu time=720 mem=32000 cpus-per-gpu=8 gres=gpu:1",
    "reward": "partition=gpu time=720 mem=32000 cpus-per-gpu=8 gres=gpu:1",
    "dpo": "partition=gpu time=720 mem=32000 cpus-per-gpu=8 gres=gpu:1",
    "orpo": "partition=gpu time=720 mem=32000 cpus-per-gpu=8 gres=gpu:1",
    "simpo": "partition=gpu time=720 mem=32000 cpus-per-gpu=8 gres=gpu:1",
    "kto": "partition=gpu time=720 mem=32000 cpus-per-gpu=8 gres=gpu:1",
    "ppo": "partition=gpu-large time=1440 mem=64000 cpus-per-gpu=8 gres=gpu:1",
}


def line(options: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("rule", EXPECTED)
def test_the_options_of_sbatch(rule):
    assert line(options(PROFILE)[rule]) == EXPECTED[rule]


def test_a_site_with_accounts_typed_gpus_and_a_preemptible_partition(tmp_path):
    path = edited(tmp_path, account="lab7", type='":a100"', training="scavenger", large="gpu")
    found = options(path)
    assert line(found["sft"]) == "account=lab7 partition=scavenger time=720 mem=32000 cpus-per-gpu=8 gres=gpu:a100:1"
    assert line(found["ppo"]) == "account=lab7 partition=gpu time=1440 mem=64000 cpus-per-gpu=8 gres=gpu:a100:1"
    assert line(found["base"]) == "account=lab7 partition=cpu time=60 mem=16000 ntasks=1 cpus-per-task=2"


def test_a_retry_gets_more_memory():
    """But not more than a node has, or sbatch would refuse the last retry of a job that was only cancelled."""
    first, third = options(PROFILE), options(PROFILE, attempt=3)
    assert all(int(third[rule]["mem"]) == min(3 * int(first[rule]["mem"]), 128000) for rule in first)
    assert third["ppo"]["mem"] == "128000"


def test_the_table_in_the_readme_matches_the_profile():
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$",
        (ROOT / "config/README.md").read_text(),
        re.MULTILINE,
    )
    told = {rule: cells for rule, *cells in rows}
    for rule, found in options(PROFILE).items():
        gpus = found.get("gres", "0").rpartition(":")[2]
        cpus = found.get("cpus-per-gpu", found.get("cpus-per-task"))
        assert told.pop(rule) == [
            found["partition"],
            gpus,
            cpus,
            f"{int(found['mem']) / 1000:g} GB",
            f"{int(found['time']) / 60:g} h",
        ], rule
    assert told == {}


def test_the_profile_is_found_by_its_name():
    """Snakemake looks for `--profile slurm` in ./slurm."""
    assert (ROOT / "slurm").resolve() == ROOT / "profiles/slurm"
    assert yaml.safe_load((ROOT / "slurm/config.yaml").read_text())["executor"] == "slurm"
    assert not (ROOT / "profiles/default").exists()  # Snakemake would merge it into every other profile
