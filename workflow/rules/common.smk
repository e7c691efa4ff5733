# Shared by all: the validated config, the paths, and who feeds whom.
import json
import os
import re
import shlex
import sys
from pathlib import Path

# As a module: Snakemake runs its own code in this namespace, where a name like `parse` would shadow its own.
import tunetrail.config as tunetrail_config
from tunetrail.errors import ConfigError, Interrupted, TunetrailError
from tunetrail.launch.resources import LAUNCH, LAUNCHERS, SLURM
from tunetrail.lease import hold
from tunetrail.trackers import VARIABLE as REPORT_TO
from tunetrail.trackers import check as check_trackers


def validated(raw):
    """The typed config; on a mistake one clear line each, and exit code 78 before any job starts."""
    source = ", ".join(os.path.relpath(path) for path in workflow.configfiles) or "config"
    try:
        for path in workflow.configfiles:
            # Finds what a loaded mapping no longer shows: keys given twice.
            tunetrail_config.read_yaml(Path(path))
        parsed = tunetrail_config.parse(dict(raw), source)
        if workflow.is_main_process:
            from tunetrail.data.readers import check_sources

            tunetrail_config.check_files(parsed, source)
            check_sources(parsed.data)
            check_trackers(parsed.report_to, source)
        return parsed
    except TunetrailError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


CONFIG = validated(config)
RESULTS = f"results/{CONFIG.run}"
LOGS = f"logs/{CONFIG.run}"
BENCHMARKS = f"benchmarks/{CONFIG.run}"
STATE = f"state/{CONFIG.run}"
ENVIRONMENT = "../../envs/tunetrail.yaml"

BEFORE = "sft" if CONFIG.sft else "base"  # the model every policy starts from and is compared to
SHARDS = [f"{i}-of-{CONFIG.completions.shards}" for i in range(CONFIG.completions.shards)] if CONFIG.completions else []
HUMAN = CONFIG.comparisons is not None and CONFIG.comparisons.labeler == "human"
SUBJECTS = ["base", *(["sft"] if CONFIG.sft else []), *CONFIG.policies]
TRAINED = [  # best-of-n has no weights of its own
    name for name in SUBJECTS if name not in CONFIG.policies or CONFIG.policies[name].method != "best_of_n"
]

# The library is importable in every environment, also where it was not pip-installed (conda, apptainer).
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={workflow.basedir}/workflow/lib TUNETRAIL_DIGESTS={STATE}/.digests"
    f" {REPORT_TO}={','.join(CONFIG.report_to)}; "
)


def is_submitted(rule):
    """Whether the profile says so (`launcher: submitit`). The rule is then a local one that submits a job of its own."""
    settings = workflow.resource_settings
    for given in (dict(settings.overwrite_resources).get(rule), settings.default_resources):
        if given and "launcher" in given:
            if (launcher := given["launcher"].raw.strip("'\"")) not in LAUNCHERS:
                print(
                    f"the profile: launcher of {rule}: {launcher!r} is none of {', '.join(LAUNCHERS)}", file=sys.stderr
                )
                sys.exit(ConfigError.exit_code)
            return launcher == "submitit"
    return False


def launched(stage):
    """What stands before a stage's command: see `tunetrail.launch`. As a function of the resources it is no parameter
    whose change makes anything anew."""
    # The people's answers are on this machine, whatever the profile says.
    here = HUMAN and stage in ("tasks", "comparisons")

    def launch(wildcards, resources, threads):
        given = {name: resources.get(name) for name in (*SLURM, *LAUNCH) if resources.get(name) is not None}
        if here:
            given.pop("launcher", None)
        # Not a child of the shell's, which a signal to the job would end before the stage has saved.
        return shlex.join(
            ["exec", "python", "-m", "tunetrail.launch", "--stage", stage, "--jobs", f"{STATE}/jobs", "--threads"]
            + [str(threads), "--resources", json.dumps(given)]
        )

    return launch


wildcard_constraints:
    stage=r"[a-z_]+(\.[a-z0-9._-]+)?",
    policy=r"[a-z0-9][a-z0-9._-]*",
    subject=r"[a-z0-9][a-z0-9._-]*",
    shard=r"\d+-of-\d+",


def manifest(artifact):
    return f"{RESULTS}/{artifact}/manifest.json"


def resolved(stage):
    return f"{RESULTS}/config/{stage}.json"


def comparisons_manifest():
    """Comparisons were collected, or came with the data."""
    return manifest("comparisons" if CONFIG.completions else "data")


def model_manifest(subject):
    return manifest(subject if subject in ("base", "sft") else f"policies/{subject}")


def policies_by(method):
    """A regular expression of the names of the policies with this method; it matches nothing where there are none."""
    names = [re.escape(name) for name, policy in CONFIG.policies.items() if policy.method == method]
    return "|".join(names) or "(?!)"


def evaluation_inputs(subject):
    """Role -> manifest of everything the evaluation of one model reads. The roles a run lacks are left out."""
    inputs = {"model": model_manifest(subject), "data": manifest("data")}
    if subject != BEFORE:
        inputs["sft"] = manifest(BEFORE)
    if CONFIG.reward:
        inputs["reward"] = manifest("reward")
    if CONFIG.retention:
        inputs["retention"] = manifest("retention")
    if CONFIG.completions or CONFIG.data.preferences:
        inputs["comparisons"] = comparisons_manifest()
    return inputs


def report_inputs():
    """Role -> manifest of every artifact of the run."""
    inputs = {"base": manifest("base"), "data": manifest("data")}
    blocks = {
        "sft": CONFIG.sft,
        "tasks": HUMAN,
        "comparisons": CONFIG.completions,
        "reward": CONFIG.reward,
        "retention": CONFIG.retention,
    }
    inputs |= {stage: manifest(stage) for stage, block in blocks.items() if block}
    inputs |= {f"policy.{name}": manifest(f"policies/{name}") for name in CONFIG.policies}
    inputs |= evaluations() | {"tournament": manifest("tournament")}
    if CONFIG.lm_eval:
        inputs |= {f"lm_eval.{subject}": manifest(f"lm_eval/{subject}") for subject in TRAINED}
    return inputs


def evaluations():
    """Role -> manifest of the evaluation of every model."""
    return {f"evaluation.{subject}": manifest(f"evaluation/{subject}") for subject in SUBJECTS}


def tournament_inputs():
    """Sorted: the order of policies in the config changes nothing."""
    return {"base": manifest("base")} | dict(sorted(evaluations().items()))


def input_options(inputs):
    """The `--input role=manifest` options of a stage."""
    return " ".join(f"--input {role}={path}" for role, path in inputs.items())


def shard_options(manifests):
    return input_options({f"shard{i}": path for i, path in enumerate(manifests)})


def lease_run():
    """Keeps a second Snakemake off this run for as long as this process lives."""
    global HEAD
    HEAD = hold(Path(STATE, "head"), give_up=lambda: True, say=print)
    try:
        HEAD.__enter__()
    except Interrupted as error:
        print(f"another snakemake works on this run: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except TunetrailError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
