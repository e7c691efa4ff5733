# From the base model and the data to every policy.
use rule stage as base with:
    input:
        unpack(reads("base")),
    pathvars:
        artifact="base",
    localrule: is_submitted("base")


use rule stage as data with:
    input:
        unpack(reads("data")),
    pathvars:
        artifact="data",
    localrule: is_submitted("data")


use rule stage as sft with:
    input:
        unpack(reads("sft")),
    pathvars:
        artifact="sft",
    localrule: is_submitted("sft")


use rule stage as reward with:
    input:
        unpack(reads("reward")),
    pathvars:
        artifact="reward",
    localrule: is_submitted("reward")


# One artifact per policy; its method selects the rule. (A rule's wildcard_constraints do not apply to pathvars.)
use rule stage as dpo with:
    input:
        unpack(reads("dpo")),
    pathvars:
        artifact=policies_by("dpo"),
    localrule: is_submitted("dpo")


use rule stage as orpo with:
    input:
        unpack(reads("orpo")),
    pathvars:
        artifact=policies_by("orpo"),
    localrule: is_submitted("orpo")


use rule stage as simpo with:
    input:
        unpack(reads("simpo")),
    pathvars:
        artifact=policies_by("simpo"),
    localrule: is_submitted("simpo")


use rule stage as kto with:
    input:
        unpack(reads("kto")),
    pathvars:
        artifact=policies_by("kto"),
    localrule: is_submitted("kto")


use rule stage as ppo with:
    input:
        unpack(reads("ppo")),
    pathvars:
        artifact=policies_by("ppo"),
    localrule: is_submitted("ppo")


use rule stage as best_of_n with:
    input:
        unpack(reads("best_of_n")),
    pathvars:
        artifact=policies_by("best_of_n"),
    localrule: is_submitted("best_of_n")
