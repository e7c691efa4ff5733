"""A model so tiny that all its responses can be listed and the best policy is known.

The policy that maximises E[r] - beta KL(policy || reference) is the reference tilted by exp(r / beta)
(Ziegler et al. 2019; Rafailov et al. 2023, eq. 4). With all responses listed, its reward and KL, and
those of any trained policy, are sums and not estimates.
"""

from itertools import product

import torch
from accelerate import Accelerator

from tunetrail.config.ppo import PpoConfig
from tunetrail.models.scoring import map_batches, response_logprobs
from tunetrail.models.tiny import tiny_model
from tunetrail.ppo.trainer import PPOTrainer
from tunetrail.reward.kwise import initialise

VOCABULARY, PAD, EOS, WANTED = 6, 0, 1, 3
LENGTH = 4
"""Tokens of a response that does not end with EOS."""
PROMPT = [2, 4]


def reference_model():
    return tiny_model(16, 2, 2, VOCABULARY, seed=0).eval()


def all_responses() -> list[list[int]]:
    """All possible responses: ending with EOS, or cut off at LENGTH."""
    others = [token for token in range(VOCABULARY) if token != EOS]
    closed = [[*tokens, EOS] for n in range(LENGTH) for tokens in product(others, repeat=n)]
    return closed + [list(tokens) for tokens in product(others, repeat=LENGTH)]


RESPONSES = all_responses()


def reward(response: list[int]) -> float:
    """How often the wanted token occurs."""
    return float(response.count(WANTED))


REWARDS = torch.tensor([reward(response) for response in RESPONSES], dtype=torch.float64)


def count_wanted(model, batch) -> torch.Tensor:
    """The same reward for a batch, to replace `models.scoring.sequence_scores`."""
    return ((batch.responses == WANTED) & batch.response_mask).sum(1).float()


def train_ppo(steps: int, **changes) -> PPOTrainer:
    """Runs PPO on the single prompt, against the reward model that the caller has put in place."""
    settings = {
        "method": "ppo", "steps": steps, "batch_size": 128, "completions_per_prompt": 128, "minibatch_size": 64,
        "max_new_tokens": LENGTH, "learning_rate": 5e-3, "missing_eos_score": None, "schedule": "linear",
    }  # fmt: skip
    trainer = PPOTrainer(
        PpoConfig(**(settings | changes)), reference_model(), initialise(reference_model(), seed=1), [PROMPT], ["only"],
        eos_id=EOS, pad_id=PAD, seed=3, accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    while trainer.step < steps:
        trainer.iterate()
    return trainer


def log_distribution(model) -> torch.Tensor:
    """[S] float64: the log-probability of every response."""
    prompts = [PROMPT] * len(RESPONSES)
    rows = map_batches(lambda b: response_logprobs(model, b), prompts, RESPONSES, PAD, torch.device("cpu"), 4096)
    return torch.stack([row.double().sum() for row in rows])


def reward_and_kl(log_p: torch.Tensor, log_ref: torch.Tensor) -> tuple[float, float]:
    """(expected reward, KL to the reference in nats) of a distribution over all responses."""
    p = log_p.exp()
    return float((p * REWARDS).sum()), float((p * (log_p - log_ref)).sum())


def tilted(log_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """[S]: log of the reference times exp(r / beta), normalised."""
    return (log_ref + REWARDS / beta).log_softmax(0)


def best_of_n(log_ref: torch.Tensor, n: int) -> torch.Tensor:
    """[S]: log of the distribution of best-of-n, with a random choice among equals; exact even with ties.

    P(best has reward r) = F(r)^n - F(r-)^n, shared among its responses as the reference shares it.
    """
    p = log_ref.exp()
    log_q = torch.empty_like(log_ref)
    for r in REWARDS.unique():
        level = r == REWARDS
        below, upto = p[r > REWARDS].sum(), p[r >= REWARDS].sum()
        log_q[level] = log_ref[level] - p[level].sum().log() + (upto**n - below**n).log()
    return log_q


def best_reward_at(kl: float, log_ref: torch.Tensor) -> float:
    """The highest reward of any policy at this KL: that of the tilt with this KL, found by bisection on beta."""
    low, high = 1e-3, 1e3  # KL falls as beta rises
    for _ in range(100):
        beta = (low * high) ** 0.5
        if reward_and_kl(tilted(log_ref, beta), log_ref)[1] > kl:
            low = beta
        else:
            high = beta
    return reward_and_kl(tilted(log_ref, high), log_ref)[0]


def share_of_optimum(log_p: torch.Tensor, log_ref: torch.Tensor) -> float:
    """Gain in reward over the reference, as a share of the best gain at the same KL."""
    start = reward_and_kl(log_ref, log_ref)[0]
    found, kl = reward_and_kl(log_p, log_ref)
    return (found - start) / (best_reward_at(kl, log_ref) - start)
