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
    localrule: is_submitted("data")
    conda:
        ENVIRONMENT
    params:
        launch=launched("data"),
        state=f"{STATE}/data",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.data --config {input.config} --input base={input.base}"
        " --output {output.manifest} --state {params.state}"
