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


# Every model against every other.
rule tournament:
    input:
        config=resolved("tournament"),
        evaluations=list(tournament_inputs().values()),
    output:
        manifest=manifest("tournament"),
    log:
        f"{LOGS}/tournament.log",
    benchmark:
        f"{BENCHMARKS}/tournament.tsv"
    localrule: is_submitted("tournament")
    conda:
        ENVIRONMENT
    params:
        launch=launched("tournament"),
        state=f"{STATE}/tournament",
        inputs=input_options(tournament_inputs()),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.tournament --config {input.config} {params.inputs}"
        " --output {output.manifest} --state {params.state}"


# Tasks of the evaluation harness, where the config names some. Any one: snakemake results/<run>/lm_eval/<subject>/manifest.json
rule lm_eval:
    input:
        config=resolved("lm_eval.{subject}"),
        model=lambda wildcards: model_manifest(wildcards.subject),
        tasks=[str(path) for path in CONFIG.lm_eval.own_files()] if CONFIG.lm_eval else [],
    output:
        manifest=manifest("lm_eval/{subject}"),
    log:
        f"{LOGS}/lm_eval/{{subject}}.log",
    benchmark:
        f"{BENCHMARKS}/lm_eval/{{subject}}.tsv"
    localrule: is_submitted("lm_eval")
    conda:
        ENVIRONMENT
    params:
        launch=launched("lm_eval"),
        state=f"{STATE}/lm_eval/{{subject}}",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.lm_eval --config {input.config} --input model={input.model}"
        " --output {output.manifest} --state {params.state}"
