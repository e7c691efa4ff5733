"""Scorers: functions that score a completion without a trained reward model of this pipeline.

A scorer is a small pure function (completion, reference) -> float in a module of its own, with its range and its paper
in the docstring. It needs no model, no GPU and no network, so that evaluation, PPO without a reward model and simulated
labelers can all call it. Scores by models belong to `tunetrail.models.scoring`.
"""
