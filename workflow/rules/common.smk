# Shared by all rules: the validated config, the paths, and the functions that give each stage its inputs.
import json
import os
import re
import shlex
import sys
from pathlib import Path

# Snakemake runs its own code in this namespace, so a name like `parse` would shadow Snakemake's.
from tunetrail.errors import ConfigError, TunetrailError
from tunetrail.launch.interpreter import job_python
from tunetrail.launch.resources import LAUNCH, LAUNCHERS, SLURM
from tunetrail.models.trackers import VARIABLE as REPORT_TO
from tunetrail.monitor import snakemake_adapter
from tunetrail.files import canonical_json
from tunetrail.terminal import LINES, escape
from tunetrail.stages.registry import STAGES, artifacts_of_others, has_people, own_files, stage_config, stage_of

# Whether jobs run in their own conda environments or containers.
IS_DEPLOYED = bool(workflow.deployment_settings.deployment_method)
PYTHON = "python" if IS_DEPLOYED else job_python()


def validated(raw):
    """The typed config. Prints one clear line per mistake and exits with 78 before any job starts."""
    source = ", ".join(os.path.relpath(path) for path in workflow.configfiles) or "config"
    if MODULE:
        source += f" (module {MODULE})"
    try:
        for path in workflow.configfiles:
            # Finds duplicate keys, which a loaded mapping no longer shows.
            loading.read_yaml(Path(path))
        if MODULE and "base" not in raw:
            raise ConfigError(
                f'{source}: base is missing: give the module a config of tunetrail, as in `config: config["tunetrail"]`'
            )
        parsed = loading.parse(dict(raw), source)
        if workflow.is_main_process:
            from tunetrail.launch.preflight import check

            folder = Path(snakemake_adapter.located(workflow, f"results/{parsed.run}"))
            for warning in check(parsed, source, packages=not IS_DEPLOYED, folder=folder):
                print(escape(f"{source}: warning: {warning}"), file=sys.stderr)
        return parsed
    except TunetrailError as error:
        print(escape(error, LINES), file=sys.stderr)
        sys.exit(error.exit_code)


CONFIG = validated(config)
# The paths in rules, to which Snakemake adds the prefix that a module may have.
RESULTS = f"results/{CONFIG.run}"
LOGS = f"logs/{CONFIG.run}"
BENCHMARKS = f"benchmarks/{CONFIG.run}"
# The paths for everything else, with that prefix: the run's folder and its state folder.
RUN = snakemake_adapter.located(workflow, RESULTS)
STATE = snakemake_adapter.located(workflow, f"state/{CONFIG.run}")
ENVIRONMENT = "../../envs/tunetrail.yaml"
if IS_CLONE and {"{", "}"} & set(str(WORKFLOW.resolve())):  # Snakemake reads the whole path as a pattern
    ENVIRONMENT = str(WORKFLOW.resolve().parent / "envs/tunetrail.yaml").replace("{", "{{").replace("}", "}}")

HUMAN = has_people(CONFIG)

# Makes the library importable in every environment, even if it is not installed there (conda, apptainer).
LIBRARY = library(f"{STATE}/lib")
# Not set by shell.prefix, which would also affect other rules of a workflow that uses this one as a module.
VARIABLES = (
    f"export PYTHONPATH={shlex.quote(str(LIBRARY))} TUNETRAIL_DIGESTS={shlex.quote(STATE)}/.digests"
    f" {REPORT_TO}={','.join(CONFIG.report_to)}; "
)
snakemake_adapter.apply_profile(workflow, STAGES)
snakemake_adapter.keep_what_is_published()


def is_submitted(rule):
    """Whether the profile sets `launcher: submitit` for a rule, which is then a local rule that submits its own job."""
    launcher = snakemake_adapter.launcher_of(workflow, rule)
    if launcher not in (None, *LAUNCHERS):
        print(f"the profile: launcher of {rule}: {launcher!r} is none of {', '.join(LAUNCHERS)}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    return launcher == "submitit"


def artifact_of(output):
    return str(Path(output.manifest).parent.relative_to(RUN))


def made_by(output):
    """The name of the stage that makes the artifact of this output."""
    return stage_of(CONFIG, artifact_of(output)).name


def python(wildcards, resources):
    """The Python that runs a stage. It takes `resources`, since params that depend on them do not trigger reruns."""
    return shlex.quote(PYTHON)


def launcher(wildcards, output, resources, threads):
    """The start of a stage's command line, see `tunetrail.launch`. It depends on resources too."""
    stage = made_by(output)
    given = {name: resources.get(name) for name in (*SLURM, *LAUNCH) if resources.get(name) is not None}
    if HUMAN and stage in ("tasks", "comparisons"):  # people's answers are on this machine, so they run here
        given.pop("launcher", None)
    # exec: as a child of the shell, it would be killed by a signal to the job before the stage has saved.
    return VARIABLES + shlex.join(
        ["exec", PYTHON, "-m", "tunetrail.launch", "--stage", stage, "--jobs", f"{STATE}/jobs"]
        + ["--threads", str(threads), "--resources", json.dumps(given)]
    )


wildcard_constraints:
    stage=r"[a-z_]+(\.[a-z0-9._-]+)?",
    policy=r"[a-z0-9][a-z0-9._-]*",
    subject=r"[a-z0-9][a-z0-9._-]*",
    shard=r"\d+-of-\d+",


def policies_by(method):
    """A pattern for the artifacts of the policies with this method; it matches nothing if there are none."""
    names = [re.escape(name) for name, policy in CONFIG.policies.items() if policy.method == method]
    return f"policies/{{policy,{'|'.join(names) or '(?!)'}}}"


def reads(stage):
    """An input function: role -> manifest of each parent, and the resolved `config` and the user's own `files`."""
    info = STAGES[stage]
    # local: a module's prefix must not be added to the user's files.
    has_files = info.files or stage == "lm_eval"
    files = {"files": [local(str(path)) for path in own_files(CONFIG, stage)]} if has_files else {}

    def inputs(wildcards):
        value = wildcards.get(info.wildcard) if info.wildcard else ""
        config = info.config_pattern.format(**{info.wildcard: value}) if info.has_config_each else info.config_pattern
        parents = {role: f"{RESULTS}/{artifact}/manifest.json" for role, artifact in info.inputs(CONFIG, value).items()}
        others = {role: local(str(manifest)) for role, manifest in artifacts_of_others(CONFIG, stage).items()}
        return {"config": f"{RESULTS}/config/{config}.json"} | files | parents | others

    return inputs


def input_options(input):
    """The `--input role=manifest` options of a stage."""
    parents = {role: path for role, path in input.items() if role not in ("config", "files")}
    return " ".join(f"--input {shlex.quote(f'{role}={path}')}" for role, path in parents.items())
