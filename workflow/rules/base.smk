rule base:
    input:
        config=resolved("base"),
    output:
        manifest=manifest("base"),
    log:
        f"{LOGS}/base.log",
    benchmark:
        f"{BENCHMARKS}/base.tsv"
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/base",
    shell:
        "python -m tunetrail.stages.base --config {input.config}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"


# Text unrelated to the task, with the base model's loss on it: what must not be forgotten.
rule retention:
    input:
        config=resolved("retention"),
        base=manifest("base"),
    output:
        manifest=manifest("retention"),
    log:
        f"{LOGS}/retention.log",
    benchmark:
        f"{BENCHMARKS}/retention.tsv"
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/retention",
    shell:
        "python -m tunetrail.stages.retention --config {input.config} --input base={input.base}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"
