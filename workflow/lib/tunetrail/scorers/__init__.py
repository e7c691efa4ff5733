"""Scorers: what a completion is worth.

A scorer is a function of (prompt, completion, reference or None, row) with a range and a direction. Simulated labelers
rank by one, PPO can learn from them (verifiable rewards), evaluation measures them, and over-optimisation is watched
with them; the config calls them by the same names everywhere. A model of the user's own is one of them
(`reward_model`); the run's own reward model is read by `tunetrail.models.scoring`.

To add one, write its function here, its block in `tunetrail.config.scorers`, and its line in `scorers.build`.
"""
