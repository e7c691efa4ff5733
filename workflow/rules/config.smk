# The resolved config of each stage, a small file: a stage reruns when the keys it reads change, and only then.
localrules:
    stage_config,
    all,


rule stage_config:
    output:
        f"{RESULTS}/config/{{stage}}.json",
    log:
        f"{LOGS}/config/{{stage}}.log",
    conda:
        ENVIRONMENT
    params:
        json=lambda wildcards: tunetrail_config.canonical_json(tunetrail_config.stage_config(CONFIG, wildcards.stage)),
    shell:
        "printf '%s\\n' {params.json:q} > {output} 2> {log}"
