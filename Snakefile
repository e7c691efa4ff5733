# tunetrail: post-training of a language model as one DAG.
#
#   snakemake --profile profiles/local                                  the run in config/config.yaml
#   snakemake --profile profiles/local --configfile config/examples/tiny.yaml
#
# Naming: a stage <s> has the module workflow/lib/tunetrail/stages/<s>.py, the block <s> in the config and the rule <s>.
# Paths: results/<run>/<s>/manifest.json, logs/<run>/<s>.log, benchmarks/<run>/<s>.tsv, state/<run>/<s>/.
from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/library.smk"


# Only without --configfile: Snakemake would merge the two files key by key.
if not MODULE and "base" not in config:

    configfile: default_config()


include: "workflow/rules/common.smk"
include: "workflow/rules/stage.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/comparisons.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


# One head process per run. The lease ends with the process; Snakemake's own lock needs --unlock after a crash.
onstart:
    from tunetrail.monitor.head import hold_run

    hold_run(Path(STATE))
    link_library()


# The head process writes the run's ledger, not a job, and it does so whether the workflow succeeds or fails.
onsuccess:
    from tunetrail.monitor.dag import has_made
    from tunetrail.monitor.failure import after_success
    from tunetrail.monitor.head import end_if_superseded

    end_if_superseded()
    if has_made(workflow, Path(RUN)):
        code = after_success(Path(RUN), {"PYTHONPATH": str(LIBRARY), "TUNETRAIL_DIGESTS": f"{STATE}/.digests"})
        if code:
            sys.exit(code)


onerror:
    from tunetrail.monitor.failure import FAULT, after_failure
    from tunetrail.monitor.head import end_if_superseded

    end_if_superseded()
    code = after_failure(workflow, Path(RUN), sys.argv[1:])
    if code != FAULT:  # which is Snakemake's own exit code
        sys.exit(code)


if MODULE:
    snakemake_adapter.run_handlers(workflow, RUN)


rule all:
    default_target: True
    input:
        f"{RESULTS}/report/manifest.json",
    localrule: True
