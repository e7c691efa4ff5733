"""PPO: estimators and losses against hand-computed numbers, brute force and finite differences; the trainer's
invariants.
"""

import copy
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from trl.generation.vllm_generation import VLLMGeneration

from tunetrail.config.ppo import PpoConfig
from tunetrail.config.training import Lora
from tunetrail.errors import ConfigError, DataError
from tunetrail.models.loading import with_lora
from tunetrail.models.tiny import tiny_model
from tunetrail.models.tree import share_prefixes
from tunetrail.ppo import (
    AdaptiveKLController,
    FixedKLController,
    gae,
    grpo,
    masked_mean,
    masked_whiten,
    policy_loss,
    rloo,
    shaped_scores,
    token_rewards,
    value_loss,
)
from tunetrail.ppo.engines import VllmEngine
from tunetrail.ppo.trainer import PPOTrainer, prompt_batches
from tunetrail.reward.kwise import initialise

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


def test_the_log_ratio_in_the_reward_has_the_gradient_of_the_kl():
    """Over all tokens of a softmax: E[estimate * grad log p] is grad KL for k1, and hardly related to it for k2 and
    k3."""
    logits = torch.tensor([0.2, -0.3, 0.05], requires_grad=True)
    log_q = torch.tensor([0.0, 0.1, -0.2]).log_softmax(0)
    log_p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    d = (log_p - log_q).detach()
    shares = []
    for estimate in (d, d**2 / 2, torch.expm1(-d) + d):
        rewards = token_rewards(torch.zeros(3), estimate[:, None], torch.ones(3, 1, dtype=torch.bool), kl_coef=1.0)
        objective = (log_p.exp().detach() * -rewards[:, 0] * log_p).sum()
        (found,) = torch.autograd.grad(objective, logits, retain_graph=True)
        shares.append(float(found @ exact / (exact @ exact)))
    assert shares[0] == pytest.approx(1, abs=1e-5)
    assert max(abs(share) for share in shares[1:]) < 0.2


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


def test_all_prompts_are_used_before_any_repeats():
    batches = prompt_batches(n=6, batch_size=4, steps=3, seed=0)
    stream = list(itertools.chain(*batches))
    assert sorted(stream[:6]) == sorted(stream[6:12]) == list(range(6))
    assert batches == prompt_batches(6, 4, 3, 0) != prompt_batches(6, 4, 3, 1)


VOCABULARY, EOS, PAD = 20, 1, 0


def make_trainer(policy=None, demonstrations=(([5, 6], [7, 8, 1]),), gold=None, engine=None, scorers=None, **changes):
    settings = {"method": "ppo", "steps": 4, "batch_size": 8, "epochs": 2, "max_new_tokens": 6, "learning_rate": 1e-3}
    config = PpoConfig(**(settings | changes))
    policy = share_prefixes(policy or tiny_model(16, 2, 2, VOCABULARY, seed=0))
    policy = with_lora(policy, config.lora, seed=0)
    classifier = initialise(tiny_model(16, 2, 2, VOCABULARY, seed=0), seed=1)
    start = list(range(2, 10))  # their common prefix is computed once
    prompts = [start + [2 + (i + j) % 18 for j in range(3 + i % 4)] for i in range(12)]
    return PPOTrainer(
        config, policy, classifier if config.uses_reward_model else None, prompts, [str(i) for i in range(12)],
        eos_id=EOS, pad_id=PAD, seed=7, accelerator=Accelerator(cpu=True),
        demonstrations=demonstrations, gold=gold, engine=engine, scorers=scorers,
    )  # fmt: skip


def test_ppo_refuses_prompts_that_leave_no_room_before_it_starts():
    with pytest.raises(DataError, match="12 of 12 prompts leave no room for 4090 tokens in the model's 4096 positions"):
        make_trainer(max_new_tokens=4090)


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
    moved = trainer.model(rollout.batch(list(range(8)), PAD), 1.0, False)[0]
    assert (moved - rollout.logprobs).abs().max() > 1e-4


def test_log_probs_use_the_sampling_temperature():
    rollout = make_trainer(temperature=0.5).rollout()
    assert not torch.allclose(rollout.logprobs, make_trainer().rollout().logprobs)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, atol=1e-5, rtol=0)


def test_cut_off_responses_get_the_fixed_score():
    trainer = make_trainer(missing_eos_score=-7.5)
    rollout = trainer.rollout()
    rewards = trainer.rewards(rollout)
    assert not rollout.finished.all()
    assert (rewards[~rollout.finished] == -7.5).all()
    assert (rewards[rollout.finished] == rollout.scores[rollout.finished]).all()
    assert (rollout.scores != -7.5).all()
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


@pytest.mark.parametrize("lora", [None, Lora(r=2, alpha=4)])
def test_checkpointing_changes_no_bit(lora, monkeypatch):
    plain, less = make_trainer(lora=lora), make_trainer(lora=lora)
    calls, checkpoint = [], transformers.modeling_utils.checkpoint
    counted = lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)
    for model in less.trained_models:
        model.activation_checkpointing_enable()
    for _ in range(2):  # the second samples after an update
        assert plain.iterate() == less.iterate()
    assert len(calls) == 2 * 2 * 2 * 2  # iterations, epochs, models, layers: in updates alone
    for p, q in zip(plain.model.parameters(), less.model.parameters(), strict=True):
        assert torch.equal(p, q)


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


# ----------------------------------------------------------------------------- what else a reward and an update can be


def test_leave_one_out_and_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2; then three that agree
    torch.testing.assert_close(rloo(rewards, 3), torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))
    deviation = math.sqrt((4 + 1 + 9) / 3)  # mean 3
    expected = torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]) / deviation
    torch.testing.assert_close(grpo(rewards, torch.zeros(6), 3), expected, atol=1e-5, rtol=0)
    # the KL penalty is subtracted from that, less the mean of the prompt's others: 0.1 - (0.2+0.6)/2, ...
    penalties = torch.tensor([0.1, 0.2, 0.6, 0.0, 0.0, 0.3])
    less = torch.tensor([-0.3, -0.15, 0.45, -0.15, -0.15, 0.3])
    torch.testing.assert_close(grpo(rewards, penalties, 3), expected - less, atol=1e-5, rtol=0)


def test_grpo_does_not_turn_noise_of_the_kl_into_advantages_if_scores_tie():
    """Four cut-off responses to a prompt, with the KLs of a fresh policy: there is nothing to learn from them."""
    trainer = make_trainer(advantage="grpo", completions_per_prompt=4, missing_eos_score=-1.0, kl_coef=0.05)
    rollout = trainer.rollout()
    rollout.finished[:4] = False
    noise = torch.randn(rollout.ref_logprobs.shape, generator=torch.Generator().manual_seed(0))
    rollout.ref_logprobs += 0.1 * noise
    advantages, _ = trainer.advantages(rollout)
    kl = rollout.kl[:4].sum(1)
    assert kl.std() > 0.05
    torch.testing.assert_close(advantages[:4, 0], -0.05 * rloo(kl, 4), atol=1e-5, rtol=0)
    assert advantages[:4].abs().max() < 0.05


def test_scores_are_shaped_by_hand():
    scores, lengths = torch.tensor([3.0, -9.0, 0.5]), torch.tensor([2, 4, 6])
    finished = torch.tensor([True, True, False])
    assert shaped_scores(scores, lengths, finished).tolist() == [3.0, -9.0, 0.5]
    assert shaped_scores(scores, lengths, finished, clip=2.0).tolist() == [2.0, -2.0, 0.5]
    assert shaped_scores(scores, lengths, finished, length_penalty=0.5).tolist() == [2.0, -11.0, -2.5]
    assert shaped_scores(scores, lengths, finished, missing_eos_penalty=4.0).tolist() == [3.0, -9.0, -3.5]
    # the fixed score replaces everything, including penalties
    assert shaped_scores(scores, lengths, finished, missing_eos_score=-1.0, length_penalty=0.5).tolist() == [
        2.0,
        -11.0,
        -1.0,
    ]
    normalised = shaped_scores(torch.tensor([1.0, 3.0]), lengths[:2], finished[:2], normalise=True)
    torch.testing.assert_close(normalised, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_critic_episodes_of_a_prompt_are_compared_with_each_other(advantage):
    trainer = make_trainer(advantage=advantage, completions_per_prompt=4, missing_eos_score=None, kl_coef=0.0)
    assert trainer.actor_critic.critic is None
    assert trainer.actor_critic.value_head is None
    rollout = trainer.rollout()
    assert len(rollout.responses) == 8
    assert rollout.prompts[0] == rollout.prompts[3] != rollout.prompts[4]
    assert len({tuple(r) for r in rollout.responses[:4]}) > 1
    advantages, _ = trainer.advantages(rollout)
    for group in (slice(0, 4), slice(4, 8)):
        first, scores = advantages[group, 0], rollout.scores[group]
        assert first.sum().item() == pytest.approx(0, abs=1e-5)
        assert first.argsort().tolist() == scores.argsort().tolist()
    for row, length in zip(advantages, rollout.lengths, strict=True):
        assert (row[:length] == row[0]).all()
        assert not row[length:].any()
    result = trainer.update(rollout)
    assert result["value_loss"] == 0
    assert result["grad_norm"] > 0


@pytest.mark.parametrize("changes", [
    {"advantage": "rloo", "completions_per_prompt": 4, "missing_eos_score": None},
    {"advantage": "grpo", "completions_per_prompt": 4, "schedule": "linear", "missing_eos_score": None},
    {"critic": "shared", "completions_per_prompt": 2, "ptx_coef": 0.5, "normalize_scores": True, "entropy_coef": 0.01,
        "stop_kl": 1e-5},
])  # fmt: skip
def test_resuming_with_options_gives_the_same_bytes(tmp_path, changes):
    test_resuming_gives_the_same_bytes(tmp_path, changes)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_it_learns_without_a_critic(monkeypatch, advantage):
    monkeypatch.setattr(
        "tunetrail.ppo.trainer.sequence_scores",
        lambda model, batch: ((batch.responses == 5) & batch.response_mask).sum(1) / batch.response_mask.sum(1),
    )
    trainer = make_trainer(
        steps=30, batch_size=32, completions_per_prompt=4, advantage=advantage, learning_rate=5e-3, kl_coef=0.0,
        missing_eos_score=None,
    )  # fmt: skip
    scores = [trainer.iterate()["score"] for _ in range(30)]
    assert sum(scores[:3]) / 3 < 0.12
    assert sum(scores[-3:]) / 3 > 0.5


def test_the_linear_schedule_ends_near_zero():
    trainer = make_trainer(schedule="linear", critic_learning_rate=4e-3)
    rates = [(trainer.iterate()["learning_rate"], trainer.optimizer.param_groups[1]["lr"]) for _ in range(4)]
    for (policy, critic), share in zip(rates, (1, 0.75, 0.5, 0.25), strict=True):
        assert policy == pytest.approx(1e-3 * share)
        assert critic == pytest.approx(4e-3 * share)


def test_an_update_ends_once_the_policy_has_moved_far_enough():
    free = make_trainer(minibatch_size=2, learning_rate=1e-2)
    assert free.iterate()["minibatches"] == 8
    stopped = make_trainer(minibatch_size=2, learning_rate=1e-2, stop_kl=1e-6)
    assert (
        stopped.iterate()["minibatches"] == 2
    )  # before the first minibatch nothing has moved, before the second it has


def test_the_entropy_bonus_keeps_the_entropy_high(monkeypatch):
    monkeypatch.setattr("tunetrail.ppo.trainer.sequence_scores", lambda model, batch: torch.zeros(len(batch.input_ids)))
    sharp = tiny_model(16, 2, 2, VOCABULARY, seed=0)
    torch.nn.init.normal_(sharp.model.embed_tokens.weight, std=0.4, generator=torch.Generator().manual_seed(0))
    entropies = []
    for entropy_coef in (0.0, 20.0):  # large, so that it outweighs the noise of a reward that is always 0
        trainer = make_trainer(
            policy=copy.deepcopy(sharp),
            entropy_coef=entropy_coef,
            kl_coef=0.0,
            missing_eos_score=None,
            learning_rate=5e-3,
            steps=8,
        )
        entropies.append([trainer.iterate()["entropy"] for _ in range(8)][-1])
    assert entropies[1] > entropies[0] + 1


def test_ptx_keeps_the_demonstrations_likely():
    demonstrations = [([5, 6], [7, 8, EOS]), ([9], [7, 7, EOS])]
    with pytest.raises(DataError, match="ptx_coef needs demonstrations"):
        make_trainer(ptx_coef=1.0, demonstrations=[])
    trainer = make_trainer(ptx_coef=1.0, demonstrations=demonstrations, learning_rate=1e-2, steps=8)
    losses = [trainer.iterate()["ptx_loss"] for _ in range(8)]
    assert losses[0] > 2.5  # a random model has about log 20 = 3.0
    assert losses[-1] < losses[0] / 2
    assert make_trainer().iterate()["ptx_loss"] == 0


def test_ptx_adds_the_gradient_of_the_demonstrations_loss():
    """The gradient after `_ptx`, compared with autograd on plain forward passes."""
    demonstrations = [([5, 6], [7, 8, EOS])]
    trainer = make_trainer(ptx_coef=0.25, demonstrations=demonstrations, micro_batch_size=2)
    loss = trainer._ptx(0)
    ours = {n: p.grad.clone() for n, p in trainer.actor_critic.policy.named_parameters()}
    plain = tiny_model(16, 2, 2, VOCABULARY, seed=0)
    logprobs = plain(torch.tensor([[5, 6, 7, 8, EOS]])).logits[0].log_softmax(-1)
    expected = -(logprobs[1, 7] + logprobs[2, 8] + logprobs[3, EOS]) / 3
    (0.25 * expected).backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=0)


def test_the_gold_score_is_logged_and_changes_nothing():
    seen = []

    def gold(prompts: list[int], responses: list[list[int]]) -> list[float]:
        seen.extend(prompts)
        return [float(len(response)) for response in responses]

    watched, plain = make_trainer(gold=gold, completions_per_prompt=2), make_trainer(completions_per_prompt=2)
    for step in range(2):
        seen.clear()
        row, expected = watched.iterate(), plain.iterate()
        assert row.pop("gold") == pytest.approx(row["length"])
        assert row == expected
        assert seen == [i for i in watched.batches[step] for _ in range(2)]


def test_it_learns_from_scorers_and_the_reward_model_by_their_weights():
    def length(_: list[int], responses: list[list[int]]) -> list[float]:
        return [float(len(response)) for response in responses]

    both = make_trainer(reward={"reward_model": 2.0, "length": -0.5}, scorers={"length": length})
    plain = make_trainer()
    ours, theirs = both.rollout(), plain.rollout()
    assert ours.responses == theirs.responses
    expected = 2 * theirs.scores - 0.5 * theirs.lengths
    torch.testing.assert_close(ours.scores, expected)
    torch.testing.assert_close(ours.terms[:, 0], theirs.scores)
    row = make_trainer(reward={"reward_model": 2.0, "length": -0.5}, scorers={"length": length}).iterate()
    assert row["score_length"] == pytest.approx(row["length"])
    assert row["score"] == pytest.approx(2 * row["score_reward_model"] - 0.5 * row["score_length"], abs=1e-5)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_it_learns_from_scorers_without_a_reward_model(advantage):
    """Short responses are rewarded, and responses get shorter."""

    def brevity(_: list[int], responses: list[list[int]]) -> list[float]:
        return [-float(len(response)) for response in responses]

    trainer = make_trainer(
        scorers={"brevity": brevity}, reward={"brevity": 1.0}, advantage=advantage,
        completions_per_prompt=4, batch_size=32, steps=25, learning_rate=1e-2, kl_coef=0.0, missing_eos_score=None,
    )  # fmt: skip
    lengths = [trainer.iterate()["length"] for _ in range(25)]
    assert sum(lengths[-3:]) < 0.8 * sum(lengths[:3])


class StandIn:
    """Replaces TRL's VLLMGeneration: returns prompts as responses, each with its own number."""

    REAL = VLLMGeneration

    def __init__(self, *args, **settings):
        inspect.signature(self.REAL).bind(*args, **settings)
        self.settings, self.syncs = settings, 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, *args, **kwargs):
        call = inspect.signature(self.REAL.generate).bind(self, *args, **kwargs).arguments
        prompts, num_generations = call["prompts"], call["num_generations"]
        assert all(prompts[i] == prompts[i - i % num_generations] for i in range(len(prompts)))
        return prompts, [(p[-1], 2 + i % 18, EOS) for i, p in enumerate(prompts)], None, None


def test_episodes_can_come_from_vllm(monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", StandIn)
    settings = {"method": "ppo", "steps": 1, "batch_size": 8, "completions_per_prompt": 2, "max_new_tokens": 6}
    config = PpoConfig(**settings, temperature=0.7, vllm={"server": "http://node1:8000"})
    tokenizer = SimpleNamespace(eos_token_id=EOS)
    engine = VllmEngine(config, None, Accelerator(cpu=True), tokenizer)
    told = engine.generation.settings
    assert (told["mode"], told["server_base_url"]) == ("server", "http://node1:8000")
    assert (told["temperature"], told["max_completion_length"], told["gpu_memory_utilization"]) == (0.7, 6, 0.3)
    assert told["generation_kwargs"] == {"stop_token_ids": [EOS], "ignore_eos": True}
    trainer = make_trainer(**settings, engine=engine)
    rollout = trainer.rollout()
    assert engine.generation.syncs == 1
    assert rollout.responses == [[p[-1], 2 + i, EOS] for i, p in enumerate(rollout.prompts)]
    assert rollout.finished.all()
    assert torch.isfinite(torch.tensor(list(trainer.update(rollout).values()))).all()
    alone = VllmEngine(PpoConfig(**settings, vllm={}), None, Accelerator(cpu=True), tokenizer)
    assert alone.generation.settings["mode"] == "colocate"


def test_the_error_for_missing_vllm_is_one_line(monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: False)
    config = PpoConfig(method="ppo", steps=1, vllm={})
    with pytest.raises(
        ConfigError, match=r"vllm is set but cannot be imported \(.*\); pip install vllm, or set vllm to null"
    ):
        VllmEngine(config, None, Accelerator(cpu=True), SimpleNamespace(eos_token_id=EOS))
