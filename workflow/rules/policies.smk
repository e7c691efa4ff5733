rule ppo:
    input:
        config=resolved("policies.{policy}"),
        policy=manifest(BEFORE),
        data=manifest("data"),
        reward=manifest("reward"),
    output:
        manifest=manifest("policies/{policy}"),
    log:
        f"{LOGS}/policies/{{policy}}.log",
    benchmark:
        f"{BENCHMARKS}/policies/{{policy}}.tsv"
    wildcard_constraints:
        policy=policies_by("ppo"),
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/policies/{{policy}}",
    shell:
        "python -m tunetrail.stages.ppo --config {input.config} --input policy={input.policy}"
        " --input data={input.data} --input reward={input.reward}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"


rule dpo:
    input:
        config=resolved("policies.{policy}"),
        policy=manifest(BEFORE),
        comparisons=comparisons_manifest(),
    output:
        manifest=manifest("policies/{policy}"),
    log:
        f"{LOGS}/policies/{{policy}}.log",
    benchmark:
        f"{BENCHMARKS}/policies/{{policy}}.tsv"
    wildcard_constraints:
        policy=policies_by("dpo"),
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/policies/{{policy}}",
    shell:
        "python -m tunetrail.stages.dpo --config {input.config} --input policy={input.policy}"
        " --input comparisons={input.comparisons}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"


rule best_of_n:
    input:
        config=resolved("policies.{policy}"),
        policy=manifest(BEFORE),
        reward=manifest("reward"),
    output:
        manifest=manifest("policies/{policy}"),
    log:
        f"{LOGS}/policies/{{policy}}.log",
    benchmark:
        f"{BENCHMARKS}/policies/{{policy}}.tsv"
    wildcard_constraints:
        policy=policies_by("best_of_n"),
    conda:
        ENVIRONMENT
    params:
        state=f"{STATE}/policies/{{policy}}",
    shell:
        "python -m tunetrail.stages.best_of_n --config {input.config} --input policy={input.policy}"
        " --input reward={input.reward}"
        " --output {output.manifest} --state {params.state} 2>&1 | tee {log}"
