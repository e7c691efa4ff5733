rule base:
    input:
        config=resolved("base"),
    output:
        manifest=manifest("base"),
    log:
        f"{LOGS}/base.log",
    benchmark:
        f"{BENCHMARKS}/base.tsv"
    localrule: is_submitted("base")
    conda:
        ENVIRONMENT
    params:
        launch=launched("base"),
        state=f"{STATE}/base",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.base --config {input.config}"
        " --output {output.manifest} --state {params.state}"


# Text unrelated to the task, with the base model's loss on it: what must not be forgotten.
rule retention:
    input:
        config=resolved("retention"),
        base=manifest("base"),
        text=[str(path) for key, path in CONFIG.files().items() if key == "retention.path"],
    output:
        manifest=manifest("retention"),
    log:
        f"{LOGS}/retention.log",
    benchmark:
        f"{BENCHMARKS}/retention.tsv"
    localrule: is_submitted("retention")
    conda:
        ENVIRONMENT
    params:
        launch=launched("retention"),
        state=f"{STATE}/retention",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.retention --config {input.config} --input base={input.base}"
        " --output {output.manifest} --state {params.state}"
