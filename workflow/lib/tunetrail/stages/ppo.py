"""A policy trained by PPO against the reward model, scorers or both. The algorithm is in `tunetrail.ppo`.

    python -m tunetrail.stages.ppo --config C.json --input policy=… --input data=… [--input reward=…] …

Writes `model/` (with LoRA also `adapter/`), `history.jsonl` and, if `checkpoints` is set, `checkpoints/<step>/model`,
or with LoRA `checkpoints/<step>/adapter`.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from tunetrail.config.ppo import REWARD_MODEL, PpoConfig
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl
from tunetrail.models.batching import encode, encode_response
from tunetrail.models.checkpoints import keep, keep_newest, kept_steps, latest_checkpoint, mark_complete, publish_kept
from tunetrail.models.fit import fit_ppo
from tunetrail.models.loading import (
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    trained_parameters,
    trained_weights,
    training_flops,
    with_lora,
)
from tunetrail.models.runtime import device, prepare, use_bf16
from tunetrail.models.saving import save_kept, save_trained
from tunetrail.models.trackers import accelerator_options, tracking
from tunetrail.models.training import bit_sums, check_learnt, warn_of_few_steps
from tunetrail.ppo.engines import VllmEngine
from tunetrail.ppo.scoring import Scoring, scoring
from tunetrail.ppo.sharding import gathered, whole_state
from tunetrail.ppo.trainer import PPOTrainer
from tunetrail.reward.kwise import initialise
from tunetrail.scorers.build import Scorer, build
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start


def save(stage: Stage, trainer: PPOTrainer) -> None:
    checkpoint = stage.state / f"checkpoint-{trainer.step}"
    trainer.save(checkpoint)
    if is_main_process():
        mark_complete(stage, checkpoint)
        keep_newest(stage.state)
    stage.stop.saved()


def parent_of(stage: Stage) -> Path:
    """The model that training starts from."""
    return stage.inputs["policy"].folder / "model"


def read_prompts(stage: Stage, config: PpoConfig) -> list[dict]:
    """The rows of the rl split. Raises DataError if there are fewer than one batch."""
    rows = [row for row in stage.rows("data", "rl.jsonl") if "prompt" in row]
    if len(rows) < config.prompts_per_batch:
        raise DataError(
            f"ppo: {len(rows)} prompts are fewer than one batch (batch_size: {config.batch_size}); raise data.shares.rl"
        )
    return rows


def scorers_of(
    stage: Stage, config: PpoConfig, rows: list[dict], tokenizer: Any
) -> tuple[dict[str, Scoring], Scoring | None]:
    """(the scorers to learn from, by name; the gold scorer, which is only logged).

    The gold scorer is None if there is none, or if it needs reference answers and rows lack them. Raises DataError if a
    scorer to learn from needs them.
    """
    lacking = sum(row.get("completion") is None for row in rows)

    def built(name: str) -> Scorer:
        return build(name, stage.shared.get("scorers", {}))

    learnt = {name: built(name) for name in config.reward if name != REWARD_MODEL}
    for name, scorer in learnt.items():
        if scorer.needs_reference and lacking:
            raise DataError(
                f"ppo: {lacking} of {len(rows)} prompts of the rl split have no completion, which the scorer {name} "
                "compares with; give demonstrations with completions, or learn from another scorer"
            )
    gold = built(config.gold) if config.gold else None
    can_score = gold and not (gold.needs_reference and lacking)
    return {name: scoring(scorer, rows, tokenizer) for name, scorer in learnt.items()}, (
        scoring(gold, rows, tokenizer) if gold and can_score else None
    )


def make_trainer(
    stage: Stage, config: PpoConfig, accelerator: Accelerator
) -> tuple[PPOTrainer, dict[str, int], dict[str, int]]:
    """(the trainer with its models, resumed from the latest checkpoint; the numbers of parameters; the policy's
    `bit_sums` before its first step)."""
    parent = parent_of(stage)
    tokenizer, rows = load_tokenizer(parent), read_prompts(stage, config)
    demonstrations = [
        (encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"]))
        for row in (stage.rows("data", "sft.jsonl") if config.ptx_coef else [])
        if "prompt" in row
    ]
    policy = with_lora(load_causal_lm(parent), config.lora, derive_seed(stage.seed, "lora"))
    counts, before = trained_parameters(policy), bit_sums(trained_weights(policy))
    engine = VllmEngine(config, policy, accelerator, tokenizer) if config.vllm else None
    scorers, gold = scorers_of(stage, config, rows, tokenizer)
    reward_model = critic = None
    if config.uses_reward_model:
        reward_model = load_reward_model(stage.inputs["reward"].folder / "model")
    elif config.has_separate_critic:
        head = np.zeros(policy.config.hidden_size, dtype=np.float32)
        critic = initialise(load_causal_lm(parent), stage.seed, head=head)
    trainer = PPOTrainer(
        config,
        policy,
        reward_model,
        [encode(tokenizer, row["prompt"]) for row in rows],
        [row["id"] for row in rows],
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=stage.seed,
        accelerator=accelerator,
        demonstrations=demonstrations,
        engine=engine,
        critic=critic,
        scorers=scorers,
        gold=gold,
    )
    fit_ppo(stage, config, trainer.trained_models, policy.config, max(map(len, trainer.prompts)))
    if checkpoint := latest_checkpoint(stage):
        trainer.load(checkpoint)
    return trainer, counts, before


def train(stage: Stage, config: PpoConfig, trainer: PPOTrainer, accelerator: Accelerator) -> None:
    """Trains to the end, saving and keeping models along the way. Raises Interrupted, after saving, if told to stop."""
    bar = ProgressBar("ppo", config.steps, "steps", done=trainer.step, every_seconds=1)
    with bar, tracking(accelerator, stage.output, stage.state):
        while trainer.step < config.steps:
            row = trainer.iterate()
            accelerator.log({f"ppo/{key}": value for key, value in row.items()}, trainer.step)
            if is_main_process():
                note = f"score {row['score']:.3f}  kl {row['kl']:.2f}  finished {row['finished']:.0%}"
                bar.advance(1, note, {"score": row["score"], "kl": row["kl"]})
            if trainer.step in kept_steps(config.steps, config.checkpoints):
                state = whole_state(trainer.model, "policy")  # all processes take part
                if is_main_process():
                    policy = trainer.actor_critic.policy
                    keep(stage, trainer.step, functools.partial(save_kept, policy, parent_of(stage), state=state))
            if stage.stop.save_due():
                save(stage, trainer)
                stage.stop.leave_if_requested(f"at step {trainer.step} of {config.steps}")


def run(stage: Stage) -> dict[str, Any]:
    config = PpoConfig(**stage.config)
    prepare(stage.seed, "ppo")
    accelerator = Accelerator(
        mixed_precision="bf16" if use_bf16(stage.shared["precision"]) else "no",
        cpu=device().type == "cpu",
        **accelerator_options(stage.state),
    )
    warn_of_few_steps(stage, config.optimizer_steps, config.more_steps)
    trainer, counts, before = make_trainer(stage, config, accelerator)

    train(stage, config, trainer, accelerator)
    stage.draft.training_flops = training_flops(counts, int(sum(row["tokens"] for row in trainer.history)))
    state = whole_state(trainer.model, "policy")
    if is_main_process():
        after = trained_weights(trainer.actor_critic.policy) if state is None else state.items()
        check_learnt(stage.name, before, bit_sums(after), config.optimizer_steps)
    with gathered(trainer.model):  # so that the main process can run the model alone
        if is_main_process():
            save_trained(stage, trainer.actor_critic.policy, parent_of(stage), trainer.prompts, state)
    if not is_main_process():
        return {}
    publish_kept(stage)
    write_jsonl(stage.work / "history.jsonl", trainer.history)
    last = trainer.history[-1]
    return {
        "steps": trainer.step,
        "optimizer_steps": config.optimizer_steps,
        "episodes": last["episodes"],
        "score": last["score"],
        "kl": last["kl"],
        "first_score": trainer.history[0]["score"],
    } | counts


if __name__ == "__main__":
    sys.exit(start("ppo", run))
