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
    localrule: is_submitted("sft")
    conda:
        ENVIRONMENT
    params:
        launch=launched("sft"),
        state=f"{STATE}/sft",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.sft --config {input.config} --input base={input.base} --input data={input.data}"
        " --output {output.manifest} --state {params.state}"
