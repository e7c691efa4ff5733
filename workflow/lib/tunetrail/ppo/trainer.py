"""The PPO loop: roll out, score, estimate advantages, update; read it top to bottom.

Runs on accelerate: one process or several run the same code. Every process rolls out its share of the
prompts; the episodes are then gathered, so that all see the same advantages, and each takes its share
of every minibatch. All randomness is derived from (seed, step), so a resumed run repeats the bytes of
one that never stopped.
"""

import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from tunetrail.config import PpoConfig
from tunetrail.errors import DataError
from tunetrail.models.batching import Batch
from tunetrail.models.sampling import decoding_weights, sample
from tunetrail.models.scoring import map_batches, sequence_scores
from tunetrail.ppo.controllers import AdaptiveKLController, FixedKLController
from tunetrail.ppo.estimators import gae, kl_penalty, masked_mean, masked_whiten, token_rewards
from tunetrail.ppo.losses import policy_loss, value_loss
from tunetrail.ppo.models import ActorCritic, Reference
from tunetrail.ppo.rollout import Rollout, concatenate, pad_rows
from tunetrail.seeds import derive_seed

log = logging.getLogger("tunetrail")


def prompt_batches(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which prompts each iteration rolls out: shuffled passes over all n, one after the other."""
    stream: list[int] = []
    epoch = 0
    while len(stream) < batch_size * steps:
        rows = list(range(n))
        random.Random(derive_seed(seed, "prompts", epoch)).shuffle(rows)
        stream += rows
        epoch += 1
    return [stream[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


class PPOTrainer:
    """Proximal policy optimisation of a language model against a reward model (Ziegler 2019; Ouyang 2022).

    Args:
        config: the hyperparameters; `batch_size` and `minibatch_size` count all processes together.
        policy: causal language model, plain or with a LoRA adapter. Its weights now are the reference.
        reward_model: sequence-classification model; also the critic's origin.
        prompts: token ids of the prompts; `keys` names them, for the random streams.
        accelerator: decides device, precision and processes.
    """

    def __init__(
        self,
        config: PpoConfig,
        policy: Any,
        reward_model: Any,
        prompts: list[list[int]],
        keys: list[str],
        *,
        eos_id: int,
        pad_id: int,
        seed: int,
        accelerator: Accelerator,
    ):
        self.config, self.prompts, self.keys, self.seed = config, prompts, keys, seed
        self.eos_id, self.pad_id, self.accelerator = eos_id, pad_id, accelerator
        self.minibatch_size = config.minibatch_size or config.batch_size
        world = accelerator.num_processes
        if self.minibatch_size % world:
            raise DataError(f"ppo: minibatch_size ({self.minibatch_size}) must be a multiple of the {world} processes")
        self.micro_batch_size = min(config.micro_batch_size or self.minibatch_size, self.minibatch_size // world)
        self.batches = prompt_batches(len(prompts), config.batch_size, config.steps, seed)
        self.reward_model = reward_model.requires_grad_(False).eval().to(accelerator.device)
        self.reference = Reference(policy.to(accelerator.device))
        model = ActorCritic(policy, reward_model, shared=config.critic == "shared").to(accelerator.device)
        model.eval()  # nothing in it may drop out, and the first ratio must be 1
        self.model, self.optimizer = accelerator.prepare(model, self._optimizer(model))
        if config.kl_target is None:
            self.kl_controller: FixedKLController | AdaptiveKLController = FixedKLController(config.kl_coef)
        else:
            self.kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.step = 0
        self.history: list[dict] = []

    def _optimizer(self, model: ActorCritic) -> torch.optim.Optimizer:
        policy = [p for p in model.policy.parameters() if p.requires_grad]
        critic = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("policy.")]
        critic_rate = self.config.critic_learning_rate or self.config.learning_rate
        groups = [{"params": policy, "lr": self.config.learning_rate}, {"params": critic, "lr": critic_rate}]
        return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)

    @property
    def actor_critic(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    # ------------------------------------------------------------------------- one iteration

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """The episodes of this iteration, of all processes."""
        config, accelerator = self.config, self.accelerator
        rows = self.batches[self.step][accelerator.process_index :: accelerator.num_processes]
        prompts = [self.prompts[i] for i in rows]
        # A prompt may come twice in one batch, hence its place in the key.
        keys = [
            f"{self.keys[i]}-{n * accelerator.num_processes + accelerator.process_index}" for n, i in enumerate(rows)
        ]
        decoder = decoding_weights(self.actor_critic.policy, accelerator.mixed_precision == "bf16")
        sampled = sample(
            decoder, prompts, keys, k=1, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=derive_seed(self.seed, "rollout", self.step), batch_size=max(len(rows), 1), eos_id=self.eos_id, pad_id=self.pad_id,
        )  # fmt: skip
        del decoder  # a copy: its memory is wanted for scoring
        responses = [completions[0] for completions in sampled]
        finished = torch.tensor([r[-1] == self.eos_id for r in responses])

        def over(function: Callable[[Batch], torch.Tensor]) -> list[torch.Tensor]:
            return map_batches(function, prompts, responses, self.pad_id, accelerator.device)

        with accelerator.autocast():
            actor = over(lambda batch: torch.stack(self.actor_critic(batch, config.temperature), -1))
            ref_logprobs = over(lambda batch: self.reference.logprobs(batch, config.temperature))
            scores = torch.stack(over(lambda batch: sequence_scores(self.reward_model, batch)))
        if config.missing_eos_score is not None:
            scores = torch.where(finished, scores, config.missing_eos_score)
        local = Rollout(
            prompts=prompts,
            responses=responses,
            logprobs=pad_rows([row[:, 0] for row in actor]),
            ref_logprobs=pad_rows(ref_logprobs),
            values=pad_rows([row[:, 1] for row in actor]),
            entropy=pad_rows([row[:, 2] for row in actor]),
            scores=scores,
            finished=finished,
        )
        return concatenate(gather_object([local])) if accelerator.num_processes > 1 else local

    def advantages(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """(advantages whitened, returns), both [N, R]."""
        mask = rollout.mask
        kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, "k1")
        rewards = token_rewards(rollout.scores, kl, mask, self.kl_controller.value)
        if self.config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, self.config.gamma, self.config.lam)
        return masked_whiten(advantages, mask), returns

    def update(self, rollout: Rollout) -> dict[str, float]:
        """`epochs` passes over the episodes. Returns means over all minibatches of the losses and diagnostics."""
        advantages, returns = self.advantages(rollout)
        n, totals, count = (
            len(rollout.responses),
            dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm"), 0.0),
            0,
        )
        for epoch in range(self.config.epochs):
            rows = list(range(n))
            random.Random(derive_seed(self.seed, "minibatches", self.step, epoch)).shuffle(rows)
            for start in range(0, n, self.minibatch_size):
                result = self._minibatch(rollout, advantages, returns, rows[start : start + self.minibatch_size])
                totals = {key: totals[key] + value for key, value in result.items()}
                count += 1
        return {key: value / count for key, value in totals.items()}

    def _minibatch(
        self, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor, rows: list[int]
    ) -> dict[str, float]:
        """One optimizer step, in micro-batches of similar length."""
        config, accelerator = self.config, self.accelerator
        lengths = [len(rollout.prompts[i]) + len(rollout.responses[i]) for i in range(len(rollout.responses))]
        total_tokens = sum(len(rollout.responses[i]) for i in rows)
        mine = sorted(rows, key=lambda i: (lengths[i], i))[accelerator.process_index :: accelerator.num_processes]
        parts = [mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size)]
        sums = torch.zeros(4, device=accelerator.device)
        for n, part in enumerate(parts):
            batch = rollout.batch(part, self.pad_id).to(accelerator.device)
            mask, r = batch.response_mask, batch.response_mask.shape[1]

            def cut(x: torch.Tensor, part: list[int] = part, r: int = r) -> torch.Tensor:
                return x[part, :r].to(accelerator.device)

            # Each micro-batch weighs as its tokens do, so that its size changes nothing but memory.
            weight = mask.sum() / total_tokens
            with accelerator.no_sync(self.model) if n < len(parts) - 1 else nullcontext(), accelerator.autocast():
                logprobs, values, _ = self.model(batch, config.temperature)
                pg_loss, clip_fraction, approx_kl = policy_loss(
                    logprobs, cut(rollout.logprobs), cut(advantages), mask, config.clip_range
                )
                v_loss, _ = value_loss(values, cut(rollout.values), cut(returns), mask, config.value_clip_range)
                loss = pg_loss + config.value_coef * v_loss
                # DDP averages gradients over the processes; the weights already add up to 1 over all of them.
                accelerator.backward(loss * weight * accelerator.num_processes)
            sums += torch.stack([pg_loss, v_loss, clip_fraction, approx_kl]).detach() * weight
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums = accelerator.reduce(sums, "sum")
        return dict(zip(("policy_loss", "value_loss", "clip_fraction", "approx_kl"), sums.tolist(), strict=True)) | {
            "grad_norm": float(grad_norm)
        }

    def iterate(self) -> dict[str, float]:
        """One iteration: rollout and update. Appends to `history` and returns its row."""
        rollout = self.rollout()
        mask = rollout.mask
        kl_coef = self.kl_controller.value
        kl = (kl_penalty(rollout.logprobs, rollout.ref_logprobs, "k1") * mask).sum(1)
        result = self.update(rollout)
        self.kl_controller.update(float(kl.mean()), len(rollout.responses))
        self.step += 1
        row = {
            "step": self.step,
            "episodes": self.step * self.config.batch_size,
            "score": float(rollout.scores.mean()),
            "reward": float((rollout.scores - kl_coef * kl).mean()),
            "kl": float(kl.mean()),
            "kl_coef": kl_coef,
            "entropy": float(masked_mean(rollout.entropy, mask)),
            "length": float(rollout.lengths.float().mean()),
            "finished": float(rollout.finished.float().mean()),
            "learning_rate": self.config.learning_rate,
        } | result
        if not all(abs(value) < float("inf") for value in row.values()):
            raise DataError(
                f"ppo: a loss became infinite or NaN at step {self.step}; lower learning_rate or raise kl_coef"
            )
        self.history.append(row)
        return row

    # ------------------------------------------------------------------------- state

    def save(self, folder: Path) -> None:
        """Everything `load` needs to go on with the same bytes."""
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            torch.save(
                {"step": self.step, "kl_coef": self.kl_controller.value, "history": self.history}, folder / "trainer.pt"
            )
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
        state = torch.load(folder / "trainer.pt", weights_only=True)
        self.step, self.kl_controller.value, self.history = state["step"], state["kl_coef"], state["history"]
