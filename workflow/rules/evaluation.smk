# Text unrelated to the task: what must not be forgotten.
use rule stage as retention with:
    pathvars:
        artifact="retention",
        config="retention",
    input:
        unpack(reads("retention")),
    localrule: is_submitted("retention")
    params:
        stage="retention",
        launch=launched("retention"),


use rule stage as evaluation with:
    pathvars:
        artifact="evaluation/{subject}",
        config="evaluation.{subject}",
    input:
        unpack(reads("evaluation")),
    localrule: is_submitted("evaluation")
    params:
        stage="evaluation",
        launch=launched("evaluation"),


# Every model against every other.
use rule stage as head_to_head with:
    pathvars:
        artifact="head_to_head",
        config="head_to_head",
    input:
        unpack(reads("head_to_head")),
    localrule: is_submitted("head_to_head")
    params:
        stage="head_to_head",
        launch=launched("head_to_head"),


# Tasks of the evaluation harness, where the config names some.
# A single model: snakemake results/<run>/lm_eval/<subject>/manifest.json
use rule stage as lm_eval with:
    pathvars:
        artifact="lm_eval/{subject}",
        config="lm_eval.{subject}",
    input:
        unpack(reads("lm_eval")),
    localrule: is_submitted("lm_eval")
    params:
        stage="lm_eval",
        launch=launched("lm_eval"),
