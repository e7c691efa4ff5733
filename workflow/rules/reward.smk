rule reward:
    input:
        config=resolved("reward"),
        policy=manifest(BEFORE),
        data=manifest("data"),
        comparisons=comparisons_manifest(),
    output:
        manifest=manifest("reward"),
    log:
        f"{LOGS}/reward.log",
    benchmark:
        f"{BENCHMARKS}/reward.tsv"
    localrule: is_submitted("reward")
    conda:
        ENVIRONMENT
    params:
        launch=launched("reward"),
        state=f"{STATE}/reward",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.reward --config {input.config} --input policy={input.policy}"
        " --input data={input.data} --input comparisons={input.comparisons}"
        " --output {output.manifest} --state {params.state}"
