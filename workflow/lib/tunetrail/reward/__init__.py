"""The K-wise reward model: its loss and initialisation, and how far its scores can be trusted."""
