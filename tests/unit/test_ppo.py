"""PPO: estimators and losses against hand-computed numbers, brute force and finite differences; the trainer's invariants."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator

from tunetrail.config import Lora, PpoConfig
from tunetrail.models.loading import with_lora
from tunetrail.models.tiny import tiny_model
from tunetrail.ppo import (
    AdaptiveKLController,
    FixedKLController,
    gae,
    kl_penalty,
    masked_mean,
    masked_whiten,
    policy_loss,
    token_rewards,
    value_loss,
)
from tunetrail.ppo.trainer import PPOTrainer, prompt_batches
from tunetrail.stages.reward import initialise

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_masked_mean_leaves_padding_out():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
    assert masked_mean(x, MASK).item() == pytest.approx(3.0)


def test_masked_whiten_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])  # unmasked: mean 3, population variance 2
    expected = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 0.0]]) / math.sqrt(2)
    torch.testing.assert_close(masked_whiten(x, MASK), expected, atol=1e-5, rtol=0)
    kept = masked_whiten(x, MASK, shift_mean=False)
    torch.testing.assert_close(kept, (expected + 3) * MASK, atol=1e-5, rtol=0)


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=0.5, lam=0.5)
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375; A_0 = -0.375 + 0.25 * 0.75
    torch.testing.assert_close(advantages, torch.tensor([[-0.1875, 0.75]]))
    torch.testing.assert_close(returns, torch.tensor([[0.3125, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_equals_the_double_sum_of_its_definition(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    lengths = [7, 3, 1, 5]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    advantages, returns = gae(rewards * mask, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        v = [*values[b, :n].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert not advantages[b, n:].any()
        assert not returns[b, n:].any()


def test_kl_estimators_by_hand_and_in_expectation():
    d = torch.tensor([[math.log(2.0)]])
    zero = torch.zeros(1, 1)
    assert kl_penalty(d, zero, "k1").item() == pytest.approx(0.693147, abs=1e-6)
    assert kl_penalty(d, zero, "k2").item() == pytest.approx(0.240227, abs=1e-6)
    assert kl_penalty(d, zero, "k3").item() == pytest.approx(0.193147, abs=1e-6)  # 1/2 - 1 + log 2
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):  # unbiased: the expectation under p is the KL itself
        torch.testing.assert_close((p * kl_penalty(p.log(), q.log(), estimator)).sum(), exact)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(d, zero, "k4")


def test_score_lands_on_the_last_token_of_each_response():
    rewards = token_rewards(torch.tensor([10.0, 20.0]), torch.ones(2, 3), MASK, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.1, 9.9], [-0.1, 19.9, 0.0]]))


def test_policy_loss_by_hand():
    old = torch.zeros(1, 4)
    new = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.1), 99.0]])
    advantages = torch.tensor([[1.0, -1.0, 2.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss, clip_fraction, approx_kl = policy_loss(new, old, advantages, mask, clip_range=0.2)
    # min(1.5, 1.2) = 1.2; min(-0.5, -0.8) = -0.8; min(2.2, 2.2) = 2.2
    assert loss.item() == pytest.approx(-(1.2 - 0.8 + 2.2) / 3)
    assert clip_fraction.item() == pytest.approx(2 / 3)
    expected = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)) / 3
    assert approx_kl.item() == pytest.approx(expected, rel=1e-5)


def test_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, clip_fraction = value_loss(values, old, returns, mask, clip_range=0.2)
    # first: max((1-2)², (0.2-2)²) = 3.24; second: 0.01 either way
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.01) / 2)
    assert clip_fraction.item() == pytest.approx(0.5)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    x, old, target = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, target, MASK, 0.2)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, target, MASK, 0.2)[0], (x,))


def test_adaptive_controller_by_hand():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10000)
    controller.update(12.0, 64)  # error clipped to 0.2
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 64 / 10000))
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    controller.update(5.4, 50)  # error -0.1
    assert controller.value == pytest.approx(0.2 * (1 - 0.1 * 0.5))
    fixed = FixedKLController(0.3)
    fixed.update(100.0, 10)
    assert fixed.value == 0.3


def test_prompts_are_passed_over_before_they_repeat():
    batches = prompt_batches(n=6, batch_size=4, steps=3, seed=0)
    stream = list(itertools.chain(*batches))
    assert sorted(stream[:6]) == sorted(stream[6:12]) == list(range(6))
    assert batches == prompt_batches(6, 4, 3, 0) != prompt_batches(6, 4, 3, 1)


VOCABULARY, EOS, PAD = 20, 1, 0


def make_trainer(**changes):
    settings = {"method": "ppo", "steps": 4, "batch_size": 8, "epochs": 2, "max_new_tokens": 6, "learning_rate": 1e-3}
    config = PpoConfig(**(settings | changes))
    policy = with_lora(tiny_model(16, 2, 2, VOCABULARY, seed=0), config.lora, seed=0)
    classifier = initialise(tiny_model(16, 2, 2, VOCABULARY, seed=0), seed=1)
    prompts = [[2 + (i + j) % 18 for j in range(3 + i % 4)] for i in range(12)]
    return PPOTrainer(
        config, policy, classifier, prompts, [str(i) for i in range(12)],
        eos_id=EOS, pad_id=PAD, seed=7, accelerator=Accelerator(cpu=True),
    )  # fmt: skip


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("lora", [None, Lora(r=2, alpha=4)])
def test_first_ratio_is_one_and_reference_is_the_start(critic, lora):
    trainer = make_trainer(critic=critic, lora=lora, epochs=1)
    rollout = trainer.rollout()
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, atol=1e-5, rtol=0)
    result = trainer.update(rollout)
    assert result["clip_fraction"] == 0
    assert result["approx_kl"] < 1e-10
    # After an update the policy has moved and the reference has not.
    again = trainer.reference.logprobs(rollout.batch(list(range(8)), PAD), 1.0)
    torch.testing.assert_close(again, rollout.ref_logprobs * rollout.mask, atol=1e-5, rtol=0)
    moved = trainer.model(rollout.batch(list(range(8)), PAD), 1.0)[0]
    assert (moved - rollout.logprobs).abs().max() > 1e-4


def test_log_probs_use_the_sampling_temperature():
    rollout = make_trainer(temperature=0.5).rollout()
    assert not torch.allclose(rollout.logprobs, make_trainer().rollout().logprobs)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, atol=1e-5, rtol=0)


def test_cut_off_responses_get_the_fixed_score():
    rollout = make_trainer(missing_eos_score=-7.5).rollout()
    assert not rollout.finished.all()
    assert (rollout.scores[~rollout.finished] == -7.5).all()
    assert (rollout.scores[rollout.finished] != -7.5).all()
    for response, finished in zip(rollout.responses, rollout.finished, strict=True):
        assert (response[-1] == EOS) == finished
        assert finished or len(response) == 6


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_micro_batches_change_nothing_but_memory(critic):
    whole, split = make_trainer(critic=critic), make_trainer(critic=critic, micro_batch_size=2)
    a, b = whole.iterate(), split.iterate()
    for key in ("policy_loss", "value_loss", "approx_kl", "score"):
        assert a[key] == pytest.approx(b[key], abs=1e-5)
    for p, q in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"critic": "shared", "lora": Lora(r=2, alpha=4), "kl_target": 1.0}])
def test_resuming_gives_the_same_bytes(tmp_path, changes):
    straight = make_trainer(**changes)
    for _ in range(4):
        straight.iterate()
    first = make_trainer(**changes)
    first.iterate()
    first.iterate()
    first.save(tmp_path / "checkpoint-2")
    resumed = make_trainer(**changes)
    resumed.load(tmp_path / "checkpoint-2")
    while resumed.step < 4:
        resumed.iterate()
    assert resumed.history == straight.history
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_it_learns_to_please_a_known_reward(monkeypatch):
    """Reward: the share of token 5. The policy must make it far more frequent than it was."""
    monkeypatch.setattr(
        "tunetrail.ppo.trainer.sequence_scores",
        lambda model, batch: ((batch.responses == 5) & batch.response_mask).sum(1) / batch.response_mask.sum(1),
    )
    trainer = make_trainer(steps=30, batch_size=32, epochs=4, learning_rate=5e-3, kl_coef=0.0, missing_eos_score=None)
    scores = [trainer.iterate()["score"] for _ in range(30)]
    assert sum(scores[:3]) / 3 < 0.12  # about 1/20 at random
    assert sum(scores[-3:]) / 3 > 0.5
