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


# What people are to rank, where they do.
rule tasks:
    input:
        config=resolved("tasks"),
        base=manifest("base"),
        shards=[manifest(f"completions/{shard}") for shard in SHARDS],
        gold=[str(path) for key, path in CONFIG.files().items() if key == "comparisons.gold"],
    output:
        manifest=manifest("tasks"),
    log:
        f"{LOGS}/tasks.log",
    benchmark:
        f"{BENCHMARKS}/tasks.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    params:
        launch=launched("tasks"),
        state=f"{STATE}/tasks",
        shards=lambda wildcards, input: shard_options(input.shards),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.tasks --config {input.config}"
        " --input base={input.base} {params.shards} --output {output.manifest} --state {params.state}"


# Gather: a labeler ranks the completions of every prompt best to worst.
rule comparisons:
    input:
        config=resolved("comparisons"),
        base=manifest("base"),
        data=manifest("data"),
        shards=[manifest(f"completions/{shard}") for shard in SHARDS],
        tasks=[manifest("tasks")] if HUMAN else [],
        labels=[str(path) for key, path in CONFIG.files().items() if key == "comparisons.path" and path.is_file()],
    output:
        manifest=manifest("comparisons"),
    log:
        f"{LOGS}/comparisons.log",
    benchmark:
        f"{BENCHMARKS}/comparisons.tsv"
    retries: 0 if HUMAN else None
    # The people's answers are here, and while they are at it there is nothing to queue or to try again for.
    localrule: HUMAN or is_submitted("comparisons")
    conda:
        ENVIRONMENT
    params:
        launch=launched("comparisons"),
        state=f"{STATE}/comparisons",
        shards=lambda wildcards, input: shard_options(input.shards),
        tasks=lambda wildcards, input: input_options({"tasks": path for path in input.tasks}),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.comparisons --config {input.config}"
        " --input base={input.base} --input data={input.data} {params.shards} {params.tasks}"
        " --output {output.manifest} --state {params.state}"
