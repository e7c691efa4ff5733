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


# No --configfile given: a second file would be merged into this one, key by key.
if not MODULE and "base" not in config:

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
    link_library()


# The head process, and no job, writes the run's ledger, whether the workflow went through or a part of it failed.
onsuccess:
    from tunetrail.monitor.dag import has_made
    from tunetrail.monitor.failure import after_success

    if has_made(workflow, Path(RUN)):
        code = after_success(Path(RUN), {"PYTHONPATH": str(LIBRARY), "TUNETRAIL_DIGESTS": f"{STATE}/.digests"})
        if code:
            sys.exit(code)


onerror:
    from tunetrail.monitor.failure import FAULT, after_failure

    code = after_failure(workflow, Path(RUN), sys.argv[1:])
    if code != FAULT:  # Snakemake's own
        sys.exit(code)


if MODULE:
    snakemake_adapter.run_handlers(workflow, RUN)


rule all:
    default_target: True
    input:
        f"{RESULTS}/report/manifest.json",
    localrule: True
