"""PPO compared with the exact optimum of a model whose responses can all be listed (tests/optimum.py)."""

import math

import pytest
import torch

from tests.optimum import (
    LENGTH,
    REWARDS,
    VOCABULARY,
    best_of_n,
    best_reward_at,
    count_wanted,
    log_distribution,
    reference_model,
    reward_and_kl,
    share_of_optimum,
    tilted,
    train_ppo,
)
from tunetrail.evaluation.stats import best_of_n_kl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def log_ref():
    return log_distribution(reference_model())


@pytest.fixture(autouse=True)
def known_reward(monkeypatch):
    monkeypatch.setattr("tunetrail.ppo.trainer.sequence_scores", count_wanted)


def test_the_list_of_responses_is_complete(log_ref):
    assert len(REWARDS) == sum((VOCABULARY - 1) ** n for n in range(LENGTH + 1))
    assert log_ref.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_tilted_reference_is_optimal(log_ref):
    """No distribution near it has a higher E[r] - beta KL, and none has more reward at its KL."""
    beta = 0.7
    best = tilted(log_ref, beta)

    def objective(log_p):
        found, kl = reward_and_kl(log_p, log_ref)
        return found - beta * kl

    assert objective(best) == pytest.approx(beta * math.log(float((log_ref.exp() * (REWARDS / beta).exp()).sum())))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = (best + 0.1 * torch.randn(len(best), generator=generator, dtype=torch.float64)).log_softmax(0)
        assert objective(other) < objective(best)
    found, kl = reward_and_kl(best, log_ref)
    assert best_reward_at(kl, log_ref) == pytest.approx(found, abs=1e-6)
    assert share_of_optimum(best, log_ref) == pytest.approx(1, abs=1e-6)


def test_best_of_n_by_simulation(log_ref):
    log_q = best_of_n(log_ref, 4)
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
    draws = torch.multinomial(log_ref.exp(), 4 * 20000, True, generator=torch.Generator().manual_seed(0))
    simulated = REWARDS[draws].view(-1, 4).max(1).values
    error = simulated.std().item() / len(simulated) ** 0.5
    found, kl = reward_and_kl(log_q, log_ref)
    assert found == pytest.approx(simulated.mean().item(), abs=4 * error)
    assert kl < best_of_n_kl(4)  # an upper bound, since rewards tie


@pytest.mark.parametrize(
    "changes", [{"critic": "separate"}, {"critic": "shared"}, {"advantage": "rloo"}, {"advantage": "grpo"}]
)
def test_it_reaches_nine_tenths_of_the_best_reward_at_its_kl(log_ref, changes):
    trainer = train_ppo(steps=40, kl_coef=0.5, **changes)
    log_p = log_distribution(trainer.actor_critic.policy)
    assert reward_and_kl(log_p, log_ref)[1] > 0.3  # it has moved
    assert 0.9 <= share_of_optimum(log_p, log_ref) <= 1 + 1e-6


def test_the_adaptive_controller_settles_at_its_target():
    trainer = train_ppo(steps=80, kl_coef=0.5, kl_target=0.6, kl_horizon=500, schedule="constant")
    late = [row["kl"] for row in trainer.history[-20:]]
    assert sum(late) / len(late) == pytest.approx(0.6, rel=0.2)
