# The template of every stage's rule. `use rule stage as <name> with:` says what is its own:
#   pathvars: artifact, the folder below results/<run>/; config, the name of its resolved config
#   input:    unpack(reads("<name>")), the manifests of its parents and the user's files, as the table of stages says
#   params:   stage and launch
localrules:
    stage_config,
    all,


# A small file per stage: a stage reruns when the keys it reads change, and only then.
rule stage_config:
    output:
        f"{RESULTS}/config/{{stage}}.json",
    log:
        f"{LOGS}/config/{{stage}}.log",
    conda:
        ENVIRONMENT
    params:
        json=lambda wildcards: canonical_json(stage_config(CONFIG, wildcards.stage)),
    shell:
        "printf '%s\\n' {params.json:q} > {output} 2> {log}"


rule stage:
    pathvars:
        artifact="template",
        config="template",
    input:
        config=f"{RESULTS}/config/<config>.json",
    output:
        manifest=f"{RESULTS}/<artifact>/manifest.json",
    log:
        f"{LOGS}/<artifact>.log",
    benchmark:
        f"{BENCHMARKS}/<artifact>.tsv"
    conda:
        ENVIRONMENT
    params:
        launch="false",
        stage="template",
        state=lambda wildcards, output: output.manifest.replace(RESULTS, STATE, 1).removesuffix("/manifest.json"),
        inputs=lambda wildcards, input: input_options(input),
        part="",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.{params.stage}{params.part} --config {input.config}"
        " {params.inputs} --output {output.manifest} --state {params.state}"
