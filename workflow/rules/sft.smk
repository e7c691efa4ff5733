rule sft:
    input:
        config=resolved("sft"),
        base=manifest("base"),
        data=manifest("data"),
    output:
        manifest=manifest("sft"),
    log:
        f"{LOGS}/sft.log",
    benchmark:
        f"{BENCHMARKS}/sft.tsv"
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/sft",
    shell:
        "python -m tunetrail.stages.sft --config {input.config} --input base={input.base} --input data={input.data}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"
