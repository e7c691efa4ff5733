# Text unrelated to the task, to measure forgetting.
use rule stage as retention with:
    input:
        unpack(reads("retention")),
    pathvars:
        artifact="retention",
    localrule: is_submitted("retention")


# Compares methods of fine-tuning the base model, if the config names any.
use rule stage as methods with:
    input:
        unpack(reads("methods")),
    pathvars:
        artifact="methods",
    localrule: is_submitted("methods")


use rule stage as evaluation with:
    input:
        unpack(reads("evaluation")),
    pathvars:
        artifact="evaluation/{subject}",
    localrule: is_submitted("evaluation")


# Compares every model with every other.
use rule stage as head_to_head with:
    input:
        unpack(reads("head_to_head")),
    pathvars:
        artifact="head_to_head",
    localrule: is_submitted("head_to_head")


# Tasks of the evaluation harness, if the config names any.
# For a single model: snakemake results/<run>/lm_eval/<subject>/manifest.json
use rule stage as lm_eval with:
    input:
        unpack(reads("lm_eval")),
    pathvars:
        artifact="lm_eval/{subject}",
    localrule: is_submitted("lm_eval")
