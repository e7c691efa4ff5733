"""Scorers rate completions.

A scorer is a function of (prompt, completion, reference or None, row) with a range; higher is better. Simulated
labelers rank by one, PPO can learn from them (verifiable rewards), evaluation reports them, and they reveal
over-optimisation. The config uses the same names for them everywhere. `reward_model` is a model that the user names;
the run's own reward model is read by `tunetrail.models.scoring`.

To add a scorer, write its function here, its block in `tunetrail.config.scorers`, and its line in `scorers.build`.
"""
