FIGURES = [
    "win_rates",
    "gold",
    "preferences",
    "reward_kl",
    "over_optimisation",
    "learning",
    "probes",
    "forgetting",
    "reward_model",
]


rule report:
    input:
        config=resolved("report"),
        artifacts=list(report_inputs().values()),
    output:
        manifest=manifest("report"),
        page=report(
            f"{RESULTS}/report/report.html",
            category="Report",
            caption="../report/report.rst",
        ),
        figures=[
            report(
                f"{RESULTS}/report/figures/{name}.svg",
                category="Figures",
                caption=f"../report/{name}.rst",
            )
            for name in FIGURES
        ],
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{BENCHMARKS}/report.tsv"
    localrule: is_submitted("report")
    conda:
        ENVIRONMENT
    params:
        launch=launched("report"),
        state=f"{STATE}/report",
        inputs=input_options(report_inputs()),
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.report --config {input.config} {params.inputs}"
        " --output {output.manifest} --state {params.state}"
