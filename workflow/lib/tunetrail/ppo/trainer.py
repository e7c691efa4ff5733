"""The PPO loop: roll out, score, estimate advantages, update; read it top to bottom.

Runs on accelerate: one process or several run the same code. Every process rolls out its share of the
prompts; the episodes are then gathered, so that all see the same advantages, and each takes its share
of every minibatch. All randomness is derived from (seed, step), so a resumed run repeats the bytes of
one that never stopped.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from tunetrail.config.ppo import REWARD_MODEL, PpoConfig
from tunetrail.errors import DataError
from tunetrail.models.batching import Batch, collate
from tunetrail.models.head import narrow_products
from tunetrail.models.lengths import check_room
from tunetrail.models.scoring import map_batches, sequence_scores
from tunetrail.ppo.controllers import AdaptiveKLController, FixedKLController
from tunetrail.ppo.engines import Engine, LocalEngine
from tunetrail.ppo.estimators import (
    gae,
    grpo,
    masked_mean,
    masked_whiten,
    rloo,
    shaped_scores,
    token_rewards,
)
from tunetrail.ppo.losses import policy_loss, value_loss
from tunetrail.ppo.models import ActorCritic, Reference
from tunetrail.ppo.rollout import Rollout, concatenate, pad_rows
from tunetrail.ppo.scoring import Scoring
from tunetrail.ppo.sharding import gathered, is_sharded, load_shards, save_shards, shard
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
        reward_model: sequence-classification model; None if the config's reward has scorers alone.
        critic: sequence-classification model that a separate critic starts from; None: the reward model.
        prompts: token ids of the prompts; `keys` names them, for the random streams.
        accelerator: decides device, precision and processes.
        demonstrations: (prompt ids, response ids), for `ptx_coef`.
        engine: samples the episodes; None: our own decoder.
        scorers: what scores responses, by the names in the config's reward.
        gold: the scorer that is logged and not learnt from; None: there is none.
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
        demonstrations: Sequence[tuple[list[int], list[int]]] = (),
        engine: Engine | None = None,
        critic: Any = None,
        scorers: Mapping[str, Scoring] | None = None,
        gold: Scoring | None = None,
    ):
        if config.ptx_coef and not demonstrations:
            raise DataError("ppo: ptx_coef needs demonstrations, and the sft split has none; set it to 0")
        check_room(policy.config, prompts, config.max_new_tokens)
        self.demonstrations, self.scorers, self.gold = demonstrations, scorers or {}, gold
        self.config, self.prompts, self.keys, self.seed = config, prompts, keys, seed
        self.eos_id, self.pad_id, self.accelerator = eos_id, pad_id, accelerator
        self.minibatch_size = config.minibatch_size or config.batch_size
        world = accelerator.num_processes
        if self.minibatch_size % world:
            raise DataError(f"ppo: minibatch_size ({self.minibatch_size}) must be a multiple of the {world} processes")
        self.micro_batch_size = min(config.micro_batch_size or self.minibatch_size, self.minibatch_size // world)
        self.batches = prompt_batches(len(prompts), config.prompts_per_batch, config.steps, seed)
        layers = policy._no_split_modules
        self.reference = Reference(policy)
        kind = config.critic if config.advantage == "gae" else None
        model = ActorCritic(
            policy, reward_model if critic is None else critic, kind
        ).eval()  # no dropout: the first ratio must be 1
        self.reward_model = None
        if reward_model is not None:
            self.reward_model = self._place(reward_model.requires_grad_(False).eval(), reward_model._no_split_modules)
        model = self._place(model, layers)
        if not self.reference.has_adapter:
            self._place(self.reference.model, layers)
        frozen = [self.reward_model, None if self.reference.has_adapter else self.reference.model]
        for frozen_model in frozen if accelerator.mixed_precision == "bf16" else ():
            if frozen_model is not None and not is_sharded(frozen_model):
                narrow_products(frozen_model, torch.bfloat16)  # it only scores, and only under autocast
        self.optimizer = accelerator.prepare_optimizer(self._optimizer(model))
        self.model = accelerator.prepare_model(model, evaluation_mode=is_sharded(model))  # else DDP would wrap it
        self.engine = engine or LocalEngine(config, self.actor_critic.policy, accelerator, eos_id, pad_id)
        if config.kl_target is None:
            self.kl_controller: FixedKLController | AdaptiveKLController = FixedKLController(config.kl_coef)
        else:
            self.kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.step = 0
        self.history: list[dict] = []

    def _place(self, model: Any, layers: Any) -> Any:
        """Puts a model, or this process's shard of it, on the device."""
        if self.config.sharded and self.accelerator.num_processes > 1:
            return shard(model, layers, self.accelerator.device)
        return model.to(self.accelerator.device)

    def _optimizer(self, model: ActorCritic) -> torch.optim.Optimizer:
        policy = [p for p in model.policy.parameters() if p.requires_grad]
        critic = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("policy.")]
        critic_rate = self.config.critic_learning_rate or self.config.learning_rate
        self.peak_rates = [self.config.learning_rate, critic_rate]
        groups = [{"params": policy, "lr": self.config.learning_rate}, {"params": critic, "lr": critic_rate}]
        return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)

    @property
    def actor_critic(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    @property
    def trained_models(self) -> list[Any]:
        """The policy, and the critic where it is a model of its own."""
        return [self.actor_critic.policy, *([self.actor_critic.critic] if self.actor_critic.critic else [])]

    # ------------------------------------------------------------------------- one iteration

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """The episodes of this iteration, from all processes."""
        config, accelerator = self.config, self.accelerator
        local_prompts = self.batches[self.step][accelerator.process_index :: accelerator.num_processes]
        # A prompt may occur twice in a batch, so the key includes its position.
        keys = [
            f"{self.keys[i]}-{n * accelerator.num_processes + accelerator.process_index}"
            for n, i in enumerate(local_prompts)
        ]
        k = config.completions_per_prompt
        with gathered(self.model):
            sampled = self.engine(
                [self.prompts[i] for i in local_prompts], keys, k, derive_seed(self.seed, "rollout", self.step)
            )
        places = [i for i in local_prompts for _ in range(k)]
        prompts = [self.prompts[i] for i in places]
        responses = [response for completions in sampled for response in completions]
        finished = torch.tensor([r[-1] == self.eos_id for r in responses])

        def over(function: Callable[[Batch], torch.Tensor]) -> list[torch.Tensor]:
            return map_batches(function, prompts, responses, self.pad_id, accelerator.device)

        with accelerator.autocast():  # only one model is gathered at a time
            with gathered(self.model):
                actor = over(lambda batch: torch.stack(self.actor_critic(batch, config.temperature, True), -1))
            with gathered(self.model if self.reference.has_adapter else self.reference.model):
                ref_logprobs = over(lambda batch: self.reference.logprobs(batch, config.temperature))
            terms = {}
            if self.reward_model is not None:
                with gathered(self.reward_model):
                    terms[REWARD_MODEL] = torch.stack(over(lambda batch: sequence_scores(self.reward_model, batch)))
        terms |= {name: torch.tensor(score(places, responses)) for name, score in self.scorers.items()}
        columns = torch.stack([terms[name].cpu() for name in config.reward], 1).float()
        local = Rollout(
            prompts=prompts,
            responses=responses,
            logprobs=pad_rows([row[:, 0] for row in actor]),
            ref_logprobs=pad_rows(ref_logprobs),
            values=pad_rows([row[:, 1] for row in actor]),
            entropy=pad_rows([row[:, 2] for row in actor]),
            scores=columns @ torch.tensor(list(config.reward.values())),
            terms=columns,
            finished=finished,
            gold=torch.tensor(self.gold(places, responses) if self.gold else []),
        )
        return concatenate(gather_object([local])) if accelerator.num_processes > 1 else local

    def rewards(self, rollout: Rollout) -> torch.Tensor:
        """[N]: the scores as the config shapes them."""
        config = self.config
        return shaped_scores(
            rollout.scores,
            rollout.lengths,
            rollout.finished,
            normalise=config.normalize_scores,
            clip=config.score_clip,
            missing_eos_score=config.missing_eos_score,
            missing_eos_penalty=config.missing_eos_penalty,
            length_penalty=config.length_penalty,
        )

    def advantages(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """(advantages, returns), both [N, R]; whitened for GAE, one value per episode for RLOO and GRPO."""
        config, mask = self.config, rollout.mask
        kl, scores, kl_coef = rollout.kl, self.rewards(rollout), self.kl_controller.value
        rewards = token_rewards(scores, kl, mask, kl_coef)
        if config.advantage != "gae":
            k = config.completions_per_prompt
            advantages = rloo(rewards.sum(1), k) if config.advantage == "rloo" else grpo(scores, kl_coef * kl.sum(1), k)
            return advantages[:, None] * mask, torch.zeros_like(rewards)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        return masked_whiten(advantages, mask), returns

    def learning_rate_scale(self) -> float:
        """Share of the peak learning rate in this iteration; if it decays, from 1 to 1/steps."""
        return 1 - self.step / self.config.steps if self.config.schedule == "linear" else 1.0

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Makes `epochs` passes over the episodes, or fewer if `stop_kl` ends them.

        Returns means of losses and diagnostics over all minibatches, the number of minibatches, and their tokens."""
        advantages, returns = self.advantages(rollout)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * self.learning_rate_scale()
        results: list[dict[str, float]] = []
        done: list[list[int]] = []
        for rows in self._minibatches(len(rollout.responses)):
            done.append(rows)
            ptx_loss = self._ptx(len(results)) if self.config.ptx_coef else 0.0
            results.append(self._minibatch(rollout, advantages, returns, rows) | {"ptx_loss": ptx_loss})
            if self.config.stop_kl is not None and results[-1]["approx_kl"] > self.config.stop_kl:
                break
        means = {key: sum(result[key] for result in results) / len(results) for key in results[0]}
        tokens = sum(len(rollout.prompts[i]) + len(rollout.responses[i]) for rows in done for i in rows)
        return means | {"minibatches": len(results), "tokens": tokens}

    def _minibatches(self, n: int) -> Iterator[list[int]]:
        """Episodes of each optimizer step: every epoch shuffles again."""
        for epoch in range(self.config.epochs):
            rows = list(range(n))
            random.Random(derive_seed(self.seed, "minibatches", self.step, epoch)).shuffle(rows)
            for start in range(0, n, self.minibatch_size):
                yield rows[start : start + self.minibatch_size]

    def _micro_batches(self, minibatch: list[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
        """This process's share of a minibatch in the order of `key`, cut to what goes through the model at once."""
        share = sorted(minibatch, key=key)[self.accelerator.process_index :: self.accelerator.num_processes]
        return [share[i : i + self.micro_batch_size] for i in range(0, len(share), self.micro_batch_size)]

    def _ptx(self, minibatch: int) -> float:
        """Adds the gradient of `ptx_coef` times the loss on demonstrations to the next minibatch's; returns the loss.

        Ouyang et al. 2022, eq. 2, in nats per token.
        """
        accelerator = self.accelerator
        drawn = random.Random(derive_seed(self.seed, "ptx", self.step, minibatch)).choices(
            self.demonstrations, k=self.minibatch_size
        )
        total_tokens = sum(len(response) for _, response in drawn)
        loss_sum = torch.zeros((), device=accelerator.device)
        for part in self._micro_batches(drawn, lambda e: len(e[0]) + len(e[1])):
            prompts, responses = zip(*part, strict=True)
            batch = collate(prompts, responses, self.pad_id).to(accelerator.device)
            with accelerator.no_sync(self.model), accelerator.autocast():  # the minibatch itself sums over processes
                logprobs, _, _ = self.model(batch, 1.0, False)
                loss = -logprobs.sum() / total_tokens
                accelerator.backward(self.config.ptx_coef * loss * accelerator.num_processes)
            loss_sum += loss.detach()
        return float(accelerator.reduce(loss_sum, "sum"))

    def _minibatch(
        self, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor, rows: list[int]
    ) -> dict[str, float]:
        """One optimizer step, in micro-batches of similar length."""
        config, accelerator = self.config, self.accelerator
        total_tokens = sum(len(rollout.responses[i]) for i in rows)
        parts = self._micro_batches(rows, lambda i: (len(rollout.prompts[i]) + len(rollout.responses[i]), i))
        sums = torch.zeros(4, device=accelerator.device)
        for n, part in enumerate(parts):
            batch = rollout.batch(part, self.pad_id).to(accelerator.device)
            mask, r = batch.response_mask, batch.response_mask.shape[1]

            def cut(x: torch.Tensor, part: list[int] = part, r: int = r) -> torch.Tensor:
                return x[part, :r].to(accelerator.device)

            # Micro-batches are weighted by their tokens, so that their size changes nothing but memory.
            weight = mask.sum() / total_tokens
            with accelerator.no_sync(self.model) if n < len(parts) - 1 else nullcontext(), accelerator.autocast():
                logprobs, values, entropy = self.model(batch, config.temperature, config.entropy_coef > 0)
                pg_loss, clip_fraction, approx_kl = policy_loss(
                    logprobs, cut(rollout.logprobs), cut(advantages), mask, config.clip_range
                )
                v_loss, _ = value_loss(values, cut(rollout.values), cut(returns), mask, config.value_clip_range)
                loss = pg_loss + config.value_coef * v_loss
                if entropy is not None:
                    loss = loss - config.entropy_coef * masked_mean(entropy, mask)
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
        kl_coef, learning_rate = self.kl_controller.value, self.config.learning_rate * self.learning_rate_scale()
        kl = rollout.kl.sum(1)
        result = self.update(rollout)
        self.kl_controller.update(float(kl.mean()), len(rollout.responses))
        self.step += 1
        row = {
            "step": self.step,
            "episodes": self.step * self.config.batch_size,
            "score": float(rollout.scores.mean()),
            "reward": float((self.rewards(rollout) - kl_coef * kl).mean()),
            "kl": float(kl.mean()),
            "kl_coef": kl_coef,
            "entropy": float(masked_mean(rollout.entropy, mask)),
            "length": float(rollout.lengths.float().mean()),
            "finished": float(rollout.finished.float().mean()),
            "learning_rate": learning_rate,
        } | result
        if len(self.config.reward) > 1:
            row |= {
                f"score_{name}": float(term)
                for name, term in zip(self.config.reward, rollout.terms.mean(0), strict=True)
            }
        if len(rollout.gold):
            row["gold"] = float(rollout.gold.mean())
        if not all(abs(value) < float("inf") for value in row.values()):
            raise DataError(
                f"ppo: a loss became infinite or NaN at step {self.step}; lower learning_rate or raise kl_coef"
            )
        self.history.append(row)
        return row

    # ------------------------------------------------------------------------- state

    def save(self, folder: Path) -> None:
        """Saves everything that `load` needs to continue exactly."""
        if is_sharded(self.model):
            save_shards(self.model, self.optimizer.optimizer, folder)
        else:
            self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            torch.save(
                {"step": self.step, "kl_coef": self.kl_controller.value, "history": self.history}, folder / "trainer.pt"
            )
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        if is_sharded(self.model):
            load_shards(self.model, self.optimizer.optimizer, folder)
        else:
            self.accelerator.load_state(str(folder))
        state = torch.load(folder / "trainer.pt", weights_only=True)
        self.step, self.kl_controller.value, self.history = state["step"], state["kl_coef"], state["history"]
