"""What scores a completion. Evaluation, PPO and simulated labelers find scorers here."""
