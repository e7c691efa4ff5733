# Scatter: every shard samples K completions of its share of the prompts.
rule completions:
    input:
        config=resolved("completions"),
        model=manifest(BEFORE),
        data=manifest("data"),
    output:
        manifest=manifest("completions/{shard}"),
    log:
        f"{LOGS}/completions/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/completions/{{shard}}.tsv"
    localrule: is_submitted("completions")
    conda:
        ENVIRONMENT
    params:
        launch=launched("completions"),
        state=f"{STATE}/completions/{{shard}}",
        part=lambda wildcards: wildcards.shard.replace("-of-", "/"),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.completions --part {params.part} --config {input.config}"
        " --input model={input.model} --input data={input.data}"
        " --output {output.manifest} --state {params.state}"


# Gather: a labeler ranks the completions of every prompt best to worst.
rule comparisons:
    input:
        config=resolved("comparisons"),
        base=manifest("base"),
        data=manifest("data"),
        shards=[manifest(f"completions/{shard}") for shard in SHARDS],
        labels=[str(path) for key, path in CONFIG.files().items() if key == "comparisons.path" and path.is_file()],
    output:
        manifest=manifest("comparisons"),
    log:
        f"{LOGS}/comparisons.log",
    benchmark:
        f"{BENCHMARKS}/comparisons.tsv"
    localrule: is_submitted("comparisons")
    conda:
        ENVIRONMENT
    params:
        launch=launched("comparisons"),
        state=f"{STATE}/comparisons",
        shards=lambda wildcards, input: " ".join(f"--input shard{i}={path}" for i, path in enumerate(input.shards)),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.comparisons --config {input.config}"
        " --input base={input.base} --input data={input.data} {params.shards}"
        " --output {output.manifest} --state {params.state}"
