# The template for the rules of all stages. `use rule stage as <name> with:` adds what differs:
#   pathvars: artifact, its folder below results/<run>/
#   input:    unpack(reads("<name>")): its resolved config, the manifests of its parents, the user's files
# Each stage has its own small config file, so it reruns only when keys that it reads change.
rule stage_config:
    output:
        config=f"{RESULTS}/config/{{stage}}.json",
    log:
        f"{LOGS}/config/{{stage}}.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        json=lambda wildcards: canonical_json(stage_config(CONFIG, wildcards.stage, Path(STATE, ".digests"))),
    shell:
        "printf '%s\\n' {params.json:q} > {output:q} 2> {log:q}"


rule stage:
    output:
        manifest=f"{RESULTS}/<artifact>/manifest.json",
    log:
        f"{LOGS}/<artifact>.log",
    benchmark:
        f"{BENCHMARKS}/<artifact>.tsv"
    pathvars:
        artifact="template",
    conda:
        ENVIRONMENT
    params:
        launch=launcher,
        python=python,
        stage=lambda wildcards, output: made_by(output),
        state=lambda wildcards, output: f"{STATE}/{artifact_of(output)}",
        inputs=lambda wildcards, input: input_options(input),
        part="",
    shell:
        "{params.launch} --log {log:q} -- {params.python} -m tunetrail.stages.{params.stage}{params.part}"
        " --config {input.config:q} {params.inputs} --output {output.manifest:q} --state {params.state:q}"
