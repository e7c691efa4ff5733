# From the base model and the data to every policy.
use rule stage as base with:
    pathvars:
        artifact="base",
        config="base",
    localrule: is_submitted("base")
    params:
        stage="base",
        launch=launched("base"),


use rule stage as data with:
    pathvars:
        artifact="data",
        config="data",
    input:
        unpack(reads("data")),
    localrule: is_submitted("data")
    params:
        stage="data",
        launch=launched("data"),


use rule stage as sft with:
    pathvars:
        artifact="sft",
        config="sft",
    input:
        unpack(reads("sft")),
    localrule: is_submitted("sft")
    params:
        stage="sft",
        launch=launched("sft"),


use rule stage as reward with:
    pathvars:
        artifact="reward",
        config="reward",
    input:
        unpack(reads("reward")),
    localrule: is_submitted("reward")
    params:
        stage="reward",
        launch=launched("reward"),


# One artifact per policy; its method chooses the rule. (A rule's own wildcard_constraints do not reach pathvars.)
use rule stage as dpo with:
    pathvars:
        artifact=policies_by("dpo"),
        config="policies.{policy}",
    input:
        unpack(reads("dpo")),
    localrule: is_submitted("dpo")
    params:
        stage="dpo",
        launch=launched("dpo"),


use rule stage as ppo with:
    pathvars:
        artifact=policies_by("ppo"),
        config="policies.{policy}",
    input:
        unpack(reads("ppo")),
    localrule: is_submitted("ppo")
    params:
        stage="ppo",
        launch=launched("ppo"),


use rule stage as best_of_n with:
    pathvars:
        artifact=policies_by("best_of_n"),
        config="policies.{policy}",
    input:
        unpack(reads("best_of_n")),
    localrule: is_submitted("best_of_n")
    params:
        stage="best_of_n",
        launch=launched("best_of_n"),
