"""Tasks of the language-model evaluation harness (Gao et al. 2021) on one model, where its package is installed.

    python -m tunetrail.stages.lm_eval --config C.json --input model=… --output … --state …

The artifact lm_eval/<subject> is an input of the report under the role `lm_eval.<subject>`. metrics.json:

    subject, version   of the package
    tasks              [{"task", "metric", "value", "stderr": null where the harness gives none, "n", "higher_is_better"}]
"""
