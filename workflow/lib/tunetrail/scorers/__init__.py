"""Scorers: what a completion is worth, without a trained model.

A scorer is a function of (prompt, completion, reference or None, row) with a range and a direction. Simulated labelers
rank by one, PPO can learn from them (verifiable rewards), evaluation measures them, and over-optimisation is watched
with them; the config calls them by the same names everywhere. They need no GPU and no network. Scores by models belong
to `tunetrail.models.scoring`.

To add one, write its function here, its block in `tunetrail.config.scorers`, and its line in `scorers.build`.
"""
