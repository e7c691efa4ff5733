"""The DAG: every rule with a tiny random model, what reruns and what does not, and real human data."""

import copy
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tunetrail.config.loading import load
from tunetrail.contract.artifact import verify
from tunetrail.files import read_jsonl
from tunetrail.provenance.record import read_record

from ..conftest import ROOT, SHARED, Project

TINY = "results/tiny"
ARTIFACTS = [
    "base", "data", "sft", "retention", "comparisons", "completions/0-of-2", "completions/1-of-2", "reward",
    "head_to_head", "report",
    *(f"policies/{name}" for name in ("dpo", "ppo", "ppo-lora", "best-of-2")),
    *(f"evaluation/{name}" for name in ("base", "sft", "dpo", "ppo", "ppo-lora", "best-of-2")),
]  # fmt: skip


def metrics(project: Project, artifact: str, run: str = TINY) -> dict:
    return json.loads((project.folder / run / artifact / "metrics.json").read_text())


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_every_artifact_keeps_the_contract(tiny_run, artifact):
    folder = tiny_run.folder / TINY / artifact
    manifest = verify(folder / "manifest.json")
    assert manifest["tokenizer"]
    assert read_record(folder).attempts[-1]["ended"]["outcome"] == "done"
    assert not list(folder.parent.glob(".*.work"))


def test_models_load_with_from_pretrained(tiny_run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for artifact in ("base", "sft", "policies/dpo", "policies/ppo", "policies/ppo-lora", "reward"):
        folder = tiny_run.folder / TINY / artifact / "model"
        kind = AutoModelForSequenceClassification if artifact == "reward" else AutoModelForCausalLM
        config, tokenizer = kind.from_pretrained(folder).config, AutoTokenizer.from_pretrained(folder)
        assert tokenizer.pad_token != tokenizer.eos_token
        assert tokenizer.model_max_length == config.max_position_embeddings
        written = json.loads((folder / "config.json").read_text())
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
        assert written["use_cache"]
    assert config.num_labels == 1


def test_splits_share_no_groups_and_no_prompts(tiny_run):
    data = tiny_run.folder / TINY / "data"
    groups = {
        split: {row["group"] for row in read_jsonl(data / f"{split}.jsonl")}
        for split in ("sft", "reward", "rl", "evaluation", "heldout")
    }
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    ranked = {row["prompt"] for row in read_jsonl(tiny_run.folder / TINY / "comparisons/comparisons.jsonl")}
    evaluated = {row["prompt"] for row in read_jsonl(tiny_run.folder / TINY / "evaluation/sft/samples.jsonl")}
    assert not ranked & evaluated


def test_evaluations_use_the_same_prompts_and_say_what_they_measured(tiny_run):
    ids = [row["id"] for row in read_jsonl(tiny_run.folder / TINY / "evaluation/sft/samples.jsonl")]
    for name in ("base", "sft", "dpo", "ppo", "ppo-lora", "best-of-2"):
        assert [row["id"] for row in read_jsonl(tiny_run.folder / TINY / f"evaluation/{name}/samples.jsonl")] == ids
        found = metrics(tiny_run, f"evaluation/{name}")
        assert found["gold"]["n"] == found["reward"]["n"] == 12
        assert (found["greedy_gold"] is None) == (name == "best-of-2")
    ours, theirs = (read_jsonl(tiny_run.folder / TINY / f"evaluation/{name}/samples.jsonl") for name in ("base", "sft"))
    greedy = [(a["greedy_gold"], b["greedy_gold"]) for a, b in zip(ours, theirs, strict=True)]
    assert metrics(tiny_run, "evaluation/base")["greedy_gold"]["mean"] == pytest.approx(sum(a for a, _ in greedy) / 12)
    wins = sum((b > a) + (a == b) / 2 for a, b in greedy)
    (pair,) = (
        p for p in metrics(tiny_run, "head_to_head")["greedy"]["pairs"] if (p["first"], p["second"]) == ("sft", "base")
    )
    assert pair["win_rate"]["mean"] == pytest.approx(wins / 12)
    assert metrics(tiny_run, "evaluation/best-of-2")["kl_to_sft"]["mean"] == pytest.approx(math.log(2) - 0.5)
    assert metrics(tiny_run, "evaluation/ppo-lora")["adapter"] == "lora"
    assert metrics(tiny_run, "evaluation/base")["retention"]["nll"]["mean"] == pytest.approx(
        metrics(tiny_run, "retention")["base_nll"], abs=1e-3
    )


def test_checkpoints_are_on_the_frontier_and_can_be_loaded(tiny_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = tiny_run.folder / TINY
    for name, steps in (("dpo", [2, 4]), ("ppo", [2]), ("ppo-lora", [1, 2])):
        points = metrics(tiny_run, f"evaluation/{name}")["frontier"]["points"]
        assert [(p["step"], p["chosen"]) for p in points] == [(step, step == steps[-1]) for step in steps]
        assert all(p["kl"]["n"] == p["reward"]["n"] == p["gold"]["n"] == 4 for p in points)
        for step in steps[:-1]:
            checkpoint = run / "policies" / name / "checkpoints" / str(step)
            if name == "ppo-lora":
                assert not (checkpoint / "model").exists()
                PeftModel.from_pretrained(
                    AutoModelForCausalLM.from_pretrained(run / "sft/model"), checkpoint / "adapter"
                )
            else:
                AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    assert [p["n"] for p in metrics(tiny_run, "evaluation/sft")["best_of_n"]["points"]] == [1, 2, 4, 8]


def test_all_models_are_compared_with_each_other(tiny_run):
    found = metrics(tiny_run, "head_to_head")
    assert found["subjects"] == ["base", "sft", "best-of-2", "dpo", "ppo", "ppo-lora"]
    assert len(found["sampled"]["pairs"]) == 15
    assert len(found["greedy"]["pairs"]) == 10  # best-of-n has no greedy responses
    adapters = {tuple(row["adapters"]) for row in found["forgetting"]}
    assert ("lora", "full") in adapters


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """Pretends that the package is installed."""
    (tmp_path / "packages/lm_eval").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/packages", prepend=os.pathsep)


def test_every_model_with_weights_has_a_node_for_harness_tasks(tiny_run, lm_eval):
    found = tiny_run.pending(edited(tiny_run, lm_eval={"tasks": ["arc_easy"]}))
    assert (found["lm_eval"], found["report"]) == (5, 1)
    assert not found.keys() & {"evaluation", "head_to_head", "dpo"}


def test_files_of_tasks_are_inputs(project, lm_eval):
    """Otherwise an edited file would keep its old numbers."""
    (project.folder / "tasks").mkdir()
    for name in ("text.txt", "tasks/own.yaml"):
        (project.folder / name).write_text("text")
    config = edited(
        project, retention={"source": "file", "path": "text.txt"}, lm_eval={"tasks": ["own"], "include_path": "tasks"}
    )
    targets = (f"results/tiny/{artifact}/manifest.json" for artifact in ("retention", "lm_eval/base"))
    output = project.run("--dry-run", *targets, config=config)
    inputs = dict(re.findall(r"rule (\w+):\n    input: (.*)", output))
    assert "text.txt" in inputs["retention"]
    assert "tasks/own.yaml" in inputs["lm_eval"]


def test_a_finished_run_has_nothing_to_do(tiny_run):
    assert tiny_run.pending() == {}
    assert "Nothing to be done" in tiny_run.run()


def test_touched_weights_rerun_nothing(tiny_run):
    later = time.time() + 100
    for path in (tiny_run.folder / TINY).rglob("*.safetensors"):
        os.utime(path, (later, later))
    assert tiny_run.pending() == {}


def test_a_comment_reruns_nothing(tiny_run):
    path = tiny_run.folder / "config/examples/tiny.yaml"
    path.write_text("# a remark\n" + path.read_text())
    assert tiny_run.pending() == {}


def edited(project: Project, **changes) -> str:
    """The path of tiny.yaml with keys replaced (`a__b=1` sets a.b)."""
    content = yaml.safe_load((ROOT / "config/examples/tiny.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        place = content
        for part in path:
            place = place[part]
        place[last] = value
    (project.folder / "edited.yaml").write_text(yaml.safe_dump(content))
    return "edited.yaml"


def test_a_new_beta_reruns_only_that_policy_its_evaluation_and_the_report(tiny_run):
    assert tiny_run.pending(edited(tiny_run, policies__dpo={"method": "dpo", "batch_size": 8, "beta": 0.7})) == {
        "stage_config": 1, "dpo": 1, "evaluation": 1, "head_to_head": 1, "report": 1, "all": 1,
    }  # fmt: skip


def test_a_new_sample_size_in_the_report_reruns_only_the_report(tiny_run):
    assert tiny_run.pending(edited(tiny_run, report={"samples": 3})) == {"stage_config": 1, "report": 1, "all": 1}


def test_snakemakes_own_report_has_the_page_and_the_figures(tiny_run):
    tiny_run.run("--report", "snakemake-report.html")
    html = (tiny_run.folder / "snakemake-report.html").read_text()
    for text in ("report.html", "win_rates.svg", "Reward and KL", "Bradley-Terry strengths", "The whole run"):
        assert text in html


def test_the_page_is_one_small_file(tiny_run):
    page = tiny_run.folder / TINY / "report/report.html"
    assert 20_000 < page.stat().st_size < 5_000_000


def test_a_lost_shard_reruns_only_that_shard(tiny_run, tmp_path):
    """One shard failed, so nothing after it was made. Only that shard runs again."""
    project = copy.copy(tiny_run)
    project.folder = tmp_path / "copy"
    shutil.copytree(tiny_run.folder, project.folder, symlinks=True)
    results = project.folder / TINY
    lost, ranked, kept = (
        results / f"{name}/manifest.json" for name in ("completions/1-of-2", "comparisons", "completions/0-of-2")
    )
    before, kept_time = [lost.read_bytes(), ranked.read_bytes()], kept.stat().st_mtime_ns
    shutil.rmtree(project.folder / "state/tiny/completions")  # otherwise the shard would find its samples there
    for name in ("completions/1-of-2", "comparisons", "reward", "policies", "evaluation", "head_to_head", "report"):
        shutil.rmtree(results / name)
    pending = project.pending()
    assert (pending["completions"], pending["comparisons"]) == (1, 1)
    assert not pending.keys() & {"base", "data", "retention", "sft"}
    project.run("--until", "comparisons")
    assert [lost.read_bytes(), ranked.read_bytes()] == before
    assert kept.stat().st_mtime_ns == kept_time


def test_a_killed_stage_ends_with_the_same_bytes(tiny_run, tmp_path):
    """kill -9 in the middle of PPO through the rule's own command, then a rerun: the manifest is that of the run."""
    expected = (tiny_run.folder / TINY / "policies/ppo/manifest.json").read_bytes()
    inputs = [
        f"--input={role}={TINY}/{folder}/manifest.json"
        for role, folder in (("policy", "sft"), ("data", "data"), ("reward", "reward"))
    ]
    command = [
        sys.executable,
        "-m",
        "tunetrail.stages.ppo",
        f"--config={TINY}/config/policies.ppo.json",
        *inputs,
        f"--output={tmp_path}/out/manifest.json",
        f"--state={tmp_path}/state",
    ]
    environment = os.environ | {"TUNETRAIL_CHECKPOINT_MINUTES": "0", "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, cwd=tiny_run.folder, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("state/*/checkpoint-1/complete.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/manifest.json").exists()
    reply = subprocess.run(command, cwd=tiny_run.folder, env=environment, capture_output=True, text=True, check=False)
    assert reply.returncode == 0, reply.stderr
    assert "resuming from checkpoint-1" in reply.stderr
    assert (tmp_path / "out/manifest.json").read_bytes() == expected


# ----------------------------------------------------------------------------- before any job


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft__lr": 1}, "edited.yaml: sft.lr: unknown key; see config/README.md for the keys of this block"),
        ({"retention": {"source": "file", "path": "no.txt"}}, "edited.yaml: retention.path: no such file or folder: "
            "no.txt"),
        ({"data": {"demonstrations": [{"source": "file", "path": "bad.jsonl"}]}}, "bad.jsonl:2: 'completion' is "
            "empty; remove the row or fill it"),
    ],
)  # fmt: skip
def test_mistakes_stop_before_any_job(project, changes, message):
    (project.folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    reply = project.snakemake(config=edited(project, **changes))
    assert reply.returncode in (65, 78)
    assert message in reply.stderr.splitlines()
    assert "Traceback" not in reply.stderr
    assert not (project.folder / "results").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "run: x\nbase: {source: random\n",
            "config/config.yaml:3: not valid YAML: expected ',' or '}', but got '<stream end>'",
        ),
        ("run: x\nrun: y\n", "config/config.yaml:2: key 'run' is given twice"),
        (None, "config/config.yaml: no such config file"),
    ],
)
def test_the_error_for_an_unreadable_default_config_is_one_line(project, content, line):
    path = project.folder / "config/config.yaml"
    path.write_text(content) if content else path.unlink()
    for options in ((), ("--config", "seed=3")):
        reply = project.snakemake(*options, config=None)
        assert reply.returncode == 78
        assert line in reply.stderr.splitlines()
        assert "Traceback" not in reply.stderr


def snakemake(project: Project, *options: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Snakemake in another folder than the workflow's, or with another environment."""
    command = [sys.executable, "-m", "snakemake", *options]
    environment = os.environ | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_jobs_run_in_snakemakes_environment_even_if_it_is_not_activated(project):
    options = ("--cores", "1", "--configfile", "config/examples/tiny.yaml", "--dry-run", "--printshellcmds")
    activated = f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin"
    for path, python in (("/usr/bin:/bin", sys.executable), (activated, "python")):
        reply = snakemake(project, *options, folder=project.folder, PATH=path)
        started = set(re.findall(r"(\S+) -m tunetrail\.(?:launch|stages)", reply.stdout))
        assert started == {python}, reply.stderr
    deployed = snakemake(project, *options, "--sdm", "conda", folder=project.folder, PATH="/usr/bin:/bin")
    assert set(re.findall(r"(\S+) -m tunetrail\.launch", deployed.stdout)) in ({"python"}, set())  # no conda here


def test_a_snakemake_that_lacks_the_library_says_so(project, tmp_path):
    (tmp_path / "lacks/tunetrail").mkdir(parents=True)
    (tmp_path / "lacks/tunetrail/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\")")
    reply = snakemake(project, "--cores", "1", "-n", folder=project.folder, PYTHONPATH=f"{tmp_path}/lacks")
    assert reply.returncode == 78
    (line,) = reply.stderr.splitlines()
    assert line.startswith(f"{sys.executable}: No module named 'pydantic'; start the snakemake of the environment that")
    assert f"pip install -r {project.folder}/envs/requirements.txt -e {project.folder}" in line


def test_a_workflow_in_another_folder_runs_in_the_current_or_the_given_folder(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    workflow = ("--snakefile", f"{project.folder}/Snakefile", "--profile", f"{project.folder}/profiles/local")
    reply = snakemake(project, *workflow, "--dry-run", folder=elsewhere)  # its own default config
    assert reply.returncode == 0, reply.stderr
    assert "output: results/demo/report/manifest.json" in reply.stdout
    rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(40)]
    (project.folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = project.folder / "own.yaml"
    own.write_text("run: own\nbase: {source: random}\ndata: {demonstrations: [{source: file, path: d.jsonl}]}\n")
    sent = ("--profile", "profiles/local", "--configfile", "own.yaml", "--directory", str(elsewhere), "--dry-run")
    reply = snakemake(project, *sent, folder=project.folder)
    assert reply.returncode == 78
    assert reply.stderr.splitlines()[-1].endswith(
        "data.demonstrations[0].path: no such file or folder: d.jsonl; paths are relative to where Snakemake runs, "
        f"which is {elsewhere}"
    )
    shutil.copy(project.folder / "d.jsonl", elsewhere)
    assert snakemake(project, *sent, folder=project.folder).returncode == 0
    status = [sys.executable, "-m", "tunetrail", "status", *workflow, "--configfile", str(own)]
    reply = subprocess.run(status, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert (reply.returncode, "base" in reply.stdout) == (0, True), reply.stderr


def test_a_stage_that_finds_bad_data_sets_the_exit_code_and_the_last_message(project):
    """Only the stage knows lengths if the base is not a local folder."""
    rows = [{"prompt": f"question {i}", "completion": "x" * (10 + i)} for i in range(40)]
    (project.folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": "file", "path": "d.jsonl"}
    content = {"run": "own", "data": {"demonstrations": [source], "max_completion_tokens": 48}}
    (project.folder / "real.yaml").write_text(yaml.safe_dump(COMMON | content))
    reply = project.snakemake("--until", "data", config="real.yaml")
    assert reply.returncode == 65
    lines = reply.stderr.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("data failed (attempt 1, exit code 65): ")]
    assert "data.max_completion_tokens: 1 of 40 rows has an answer of more than 48 tokens: d.jsonl:40" in lines[place]
    command = "snakemake --profile profiles/local --configfile real.yaml --until data"
    assert lines[place + 1 : place + 5] == [
        "    log    logs/own/data.log",
        "    fix    the data is bad; change what is named above, then",
        f"    again  {command} -- results/own/data/manifest.json",
        f"To go on with all that is left: {command}",
    ]
    assert not re.search("git tag|no artifact", reply.stderr)
    assert (project.folder / "results/own/ledger.jsonl").read_text().count("\n") == 1  # base is sealed


def rules(output: dict) -> set[str]:
    return set(output) - {"stage_config", "all"}


def test_the_default_has_every_node(project):
    assert rules(project.pending(config=None)) == {
        "base", "data", "retention", "sft", "completions", "comparisons", "reward", "ppo", "dpo", "best_of_n",
        "evaluation",
        "head_to_head", "report",
    }  # fmt: skip


def test_preferences_from_a_file_skip_sampling_and_the_reward_model(project):
    (project.folder / "data").mkdir()
    with gzip.open(project.folder / "data/hh.jsonl.gz", "wt") as f:
        f.write('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}\n')
    assert rules(project.pending(config="config/examples/hh-dpo.yaml")) == {
        "base",
        "data",
        "retention",
        "dpo",
        "evaluation",
        "head_to_head",
        "report",
    }


def test_a_sweep_is_a_list_in_the_config(project):
    found = project.pending(config="config/examples/dpo-beta-sweep.yaml")
    assert (found["dpo"], found["sft"], found["evaluation"]) == (4, 1, 6)


def test_people_are_given_tasks(project):
    found = project.pending(config="config/examples/human-labels.yaml")
    assert (found["tasks"], found["comparisons"], found["reward"]) == (1, 1, 1)
    assert "tasks" not in project.pending()


def test_people_answer_on_this_machine_whatever_the_profile_submits(project):
    submitted = [f"{rule}:launcher='submitit'" for rule in ("tasks", "comparisons", "reward")]
    said = project.run(
        "--dry-run", "--printshellcmds", "--set-resources", *submitted, config="config/examples/human-labels.yaml"
    )
    launched = dict(re.findall(r"launch --stage (\w+) (.*?) -- python", said))
    assert {stage for stage, options in launched.items() if "submitit" in options} == {"reward"}
    assert launched.keys() > {"tasks", "comparisons"}


def test_the_catalogs_snakefile_runs_everything_too(project):
    """An include drops the default target: without one, Snakemake exits with 0 and runs nothing."""
    output = project.run("--dry-run", "--snakefile", "workflow/Snakefile")
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))
    expected = {rule: str(count) for rule, count in project.pending().items() if rule != "all"}
    assert expected
    assert expected.items() <= jobs.items()


@pytest.mark.parametrize("name", ["demo-lora", "llama-8b-h100"])
def test_examples_dry_run(project, name):
    assert "ppo" in project.pending(config=f"config/examples/{name}.yaml")


# ----------------------------------------------------------------------------- real human data, tiny model

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data (real human data) is not on this machine")
COMMON = {
    "seed": 1,
    "precision": "fp32",
    "base": {"source": "random"},
    "retention": None,
    "evaluation": {"max_new_tokens": 8, "bootstrap": 100},
}


def run_config(project: Project, content: dict) -> None:
    (project.folder / "real.yaml").write_text(yaml.safe_dump(COMMON | content))
    project.run(config="real.yaml")


@needs_shared
def test_hh_transcripts_train_dpo_and_a_reward_model(project):
    run_config(project, {
        "run": "hh",
        "data": {
            "preferences": [{"source": "file", "path": str(SHARED / "hh-harmless-base/comparisons.jsonl.gz"),
                "licence": "MIT"}],
            "invalid": "drop", "too_long": "drop", "duplicates": "drop", "max_prompt_tokens": 400,
            "max_completion_tokens": 300,
            "shares": {"sft": 0, "reward": 0.6, "rl": 0, "evaluation": 0.2, "heldout": 0.2}, "limits": {"reward": 64,
                "evaluation": 8, "heldout": 32},
        },
        "reward": {"learning_rate": 1.0e-3, "batch_size": 16},
        "policies": {"dpo": {"method": "dpo", "learning_rate": 1.0e-3, "batch_size": 16}},
        "evaluation": COMMON["evaluation"] | {"gold": None},
    })  # fmt: skip
    assert metrics(project, "data", "results/hh")["sources"][0]["invalid_rows"] == 6
    assert metrics(project, "reward", "results/hh")["accuracy"]["n"] == 32
    evaluation = metrics(project, "evaluation/dpo", "results/hh")
    assert evaluation["gold"] is None
    assert evaluation["comparisons"]["chosen_logps"]["n"] == 32


@needs_shared
def test_recorded_annotators_with_ties_and_expert_demonstrations(project):
    run_config(project, {
        "run": "pandalm",
        "data": {
            "demonstrations": [{"source": "file", "path": str(SHARED / "self-instruct/demonstrations.jsonl.gz"),
                "columns": {"group": "id"}}],
            "preferences": [{"source": "file", "path": str(SHARED / "pandalm/pairs.jsonl.gz"),
                "licence": "Apache-2.0"}],
            "invalid": "drop", "too_long": "drop", "duplicates": "drop", "max_prompt_tokens": 700,
            "max_completion_tokens": 400,
            "limits": {"sft": 64, "reward": 64, "rl": 16, "evaluation": 8, "heldout": 48},
        },
        "sft": {"learning_rate": 1.0e-3, "batch_size": 8, "max_length": 1200},
        "reward": {"learning_rate": 1.0e-3, "batch_size": 8, "max_length": 1200},
        "policies": {"dpo": {"method": "dpo", "learning_rate": 1.0e-3, "batch_size": 8, "max_length": 1200}},
    })  # fmt: skip
    card = metrics(project, "data", "results/pandalm")
    assert card["comparisons"]["labelers"] == ["annotator-0", "annotator-1", "annotator-2"]
    rankings = [
        r["ranks"]
        for row in read_jsonl(project.folder / "results/pandalm/data/comparisons.jsonl")
        for r in row["rankings"]
    ]
    assert [1, 1] in rankings
    assert set(metrics(project, "reward", "results/pandalm")["accuracy_by_labeler"]) == {
        "annotator-0",
        "annotator-1",
        "annotator-2",
    }


def test_the_default_config_is_the_embedded_default():
    config = load(ROOT / "config/config.yaml")
    assert config.base.source == "pypi"
    assert [s.source for s in config.data.demonstrations] == ["docstrings"]
    assert {p.method for p in config.policies.values()} == {"ppo", "dpo", "best_of_n"}
    assert Path(ROOT / "config/README.md").exists()
