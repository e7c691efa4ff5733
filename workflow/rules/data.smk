rule data:
    input:
        config=resolved("data"),
        base=manifest("base"),
        # A changed data file makes new splits; files over a megabyte are compared by time.
        sources=[str(path) for key, path in CONFIG.files().items() if key.startswith("data.")],
    output:
        manifest=manifest("data"),
    log:
        f"{LOGS}/data.log",
    benchmark:
        f"{BENCHMARKS}/data.tsv"
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/data",
    shell:
        "python -m tunetrail.stages.data --config {input.config} --input base={input.base}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"
