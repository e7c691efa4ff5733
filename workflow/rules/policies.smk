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
    localrule: is_submitted("ppo")
    conda:
        ENVIRONMENT
    params:
        launch=launched("ppo"),
        state=f"{STATE}/policies/{{policy}}",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.ppo --config {input.config} --input policy={input.policy}"
        " --input data={input.data} --input reward={input.reward}"
        " --output {output.manifest} --state {params.state}"


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
    localrule: is_submitted("dpo")
    conda:
        ENVIRONMENT
    params:
        launch=launched("dpo"),
        state=f"{STATE}/policies/{{policy}}",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.dpo --config {input.config} --input policy={input.policy}"
        " --input comparisons={input.comparisons}"
        " --output {output.manifest} --state {params.state}"


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
    localrule: is_submitted("best_of_n")
    conda:
        ENVIRONMENT
    params:
        launch=launched("best_of_n"),
        state=f"{STATE}/policies/{{policy}}",
    shell:
        "{params.launch} --log {log} -- python -m tunetrail.stages.best_of_n --config {input.config} --input policy={input.policy}"
        " --input reward={input.reward}"
        " --output {output.manifest} --state {params.state}"
