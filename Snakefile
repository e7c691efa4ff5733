# tunetrail: post-training of a language model as one DAG.
#
#   snakemake --profile profiles/local                                  the config/config.yaml run
#   snakemake --profile profiles/local --configfile config/examples/tiny.yaml
#
# Naming: a stage <s> is workflow/lib/tunetrail/stages/<s>.py, the block <s> of the config, and the rule <s>.
# Paths: results/<run>/<s>/manifest.json, logs/<run>/<s>.log, benchmarks/<run>/<s>.tsv, state/<run>/<s>/.
from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/library.smk"


if "base" not in config:  # no --configfile given: a second file would be merged into this one, key by key

    configfile: default_config()


include: "workflow/rules/common.smk"
include: "workflow/rules/stage.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/comparisons.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


# One head a run. It ends with the process, unlike Snakemake's own lock, which after a crash wants --unlock.
onstart:
    lease_run()


# The head process, and no job, writes the run's ledger, whether the workflow went through or a part of it failed.
onsuccess:
    shell(
        "{PYTHON:q} -m tunetrail audit seal {RESULTS} >&2"
        " && {PYTHON:q} -m tunetrail audit verify --recursive {RESULTS} >&2 || true"
    )


onerror:
    from tunetrail.monitor.failure import FAULT, after_failure

    code = after_failure(workflow, Path(RESULTS), sys.argv[1:])
    if code != FAULT:  # Snakemake's own
        sys.exit(code)


rule all:
    default_target: True
    input:
        f"{RESULTS}/report/manifest.json",
