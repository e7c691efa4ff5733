"""The coefficient of the KL penalty: fixed, or steered towards a target (Ziegler et al. 2019, section 2.2)."""


class FixedKLController:
    """`value` never changes."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        pass


class AdaptiveKLController:
    """Proportional control in log space: value *= 1 + clip(KL/target - 1, -0.2, 0.2) * n_steps / horizon.

    Args:
        target: nats per episode.
        horizon: episodes.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Args: current_kl: nats per episode, measured on the last `n_steps` episodes."""
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon
