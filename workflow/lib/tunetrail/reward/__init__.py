"""The K-wise reward model: its loss, its initialisation, and measures of how far its scores can be trusted."""
