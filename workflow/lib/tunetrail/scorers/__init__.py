"""Scorers: functions that score a completion without a trained model.

A scorer is a small pure function (completion, reference) -> float in a module of its own; the docstring names its range
and its source. It needs no model, no GPU and no network, so that evaluation, PPO's monitoring and simulated labelers
can all call it. Scores by models belong to `tunetrail.models.scoring`.
"""
