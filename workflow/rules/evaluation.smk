rule evaluation:
    input:
        unpack(lambda wildcards: evaluation_inputs(wildcards.subject)),
        config=resolved("evaluation.{subject}"),
    output:
        manifest=manifest("evaluation/{subject}"),
    log:
        f"{LOGS}/evaluation/{{subject}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluation/{{subject}}.tsv"
    localrule: is_submitted("evaluation")
    conda:
        ENVIRONMENT
    params:
        launch=launched("evaluation"),
        state=f"{STATE}/evaluation/{{subject}}",
        inputs=lambda wildcards: input_options(evaluation_inputs(wildcards.subject)),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.evaluation --config {input.config} {params.inputs}"
        " --output {output.manifest} --state {params.state}"
