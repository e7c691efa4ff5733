"""Our side of each comparison, and the stock side if it can run in our environment.

    python -m tests.benchmarks.peers {ppo|sampling|sft|reward|dpo} {ours|stock} {fp32|bf16}

Prints what `workload.report` says. A stock trainer gets its own defaults except for what decides how much is to be
done: rows, batch size, one epoch, precision, activations kept. Our side also gets what every stage sets
(`runtime.prepare`): freed memory is kept, kernels are deterministic. Loading models and data is not timed.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset

from tests.benchmarks import workload
from tests.benchmarks.workload import Arithmetic, ranked, report
from tunetrail.models.batching import encode, encode_response
from tunetrail.models.loading import load_causal_lm, load_tokenizer
from tunetrail.models.runtime import prepare

SEED = 0


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Keeps what trainers print off standard output; yields a function that returns the seconds spent inside."""
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        end: list[float] = []
        yield lambda: end[0] - start
        end.append(time.perf_counter())


def arguments(batch_size: int, bf16: bool) -> dict[str, Any]:
    """The arguments of both sides' trainers."""
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch_size, "num_train_epochs": 1,
        "bf16": bf16,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-5,
        "gradient_checkpointing": False,  # TRL's default computes activations twice and is even slower
    }  # fmt: skip


def ours(batch_size: int, bf16: bool) -> dict[str, Any]:
    """The arguments as in `training.trainer_arguments`."""
    return arguments(batch_size, bf16) | {
        "optim": "adamw_torch_fused", "logging_steps": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip


def ppo(_: bool, bf16: bool) -> None:
    from accelerate import Accelerator

    from tunetrail.config.ppo import PpoConfig
    from tunetrail.ppo.trainer import PPOTrainer
    from tunetrail.reward.kwise import initialise

    tokenizer = load_tokenizer(workload.MODEL)
    prompts = workload.prompt_ids("rl", workload.EPISODES)
    config = PpoConfig(
        method="ppo", critic="separate", steps=1, batch_size=workload.EPISODES, minibatch_size=workload.EPISODES,
        epochs=workload.EPOCHS, max_new_tokens=workload.RESPONSE_TOKENS, micro_batch_size=8,
    )  # fmt: skip
    classifier = initialise(load_causal_lm(workload.MODEL), SEED)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    trainer = PPOTrainer(
        config, load_causal_lm(workload.MODEL), classifier, prompts, list(map(str, range(len(prompts)))),
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, seed=SEED,
        accelerator=Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=True),
    )  # fmt: skip
    arithmetic = Arithmetic(trainer.actor_critic.policy)
    with timed() as rolled_out:
        rollout = trainer.rollout()
    with timed() as updated:
        trainer.update(rollout)
    scored = sum(map(len, rollout.responses))
    tokens = sum(map(len, prompts)) + scored
    policy, trunk = arithmetic.forward(tokens, scored), arithmetic.forward(tokens)  # the trunk: critic or reward model
    update = workload.EPOCHS * 3 * (policy + trunk)
    report(
        rolled_out() + updated(), workload.EPISODES,
        flops=update + policy + (policy + trunk) + policy + trunk,  # sampling; policy and critic; reference; reward
        update_seconds=updated(), update_flops=update, response_tokens=scored,
    )  # fmt: skip


def sampling(by_us: bool, bf16: bool) -> None:
    from tunetrail.models.sampling import decoding_weights, sample

    tokenizer = load_tokenizer(workload.MODEL)
    tokenizer.padding_side = "left"
    texts = [row["prompt"] for row in workload.rows("sft", workload.SAMPLED_AT_ONCE)]
    model = load_causal_lm(workload.MODEL).eval()
    arithmetic = Arithmetic(model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    weights = sum(p.numel() for p in model.parameters()) * (2 if bf16 else 4)
    if by_us:
        prompts = [encode(tokenizer, text) for text in texts]
        with timed() as took:
            model = decoding_weights(model, bf16)
            found = sample(
                model, prompts, list(map(str, range(len(prompts)))), k=1, temperature=1.0,
                max_new_tokens=workload.RESPONSE_TOKENS, seed=SEED, batch_size=len(prompts), eos_id=eos, pad_id=pad,
            )  # fmt: skip
        lengths = [len(response) for [response] in found]
    else:
        torch.manual_seed(SEED)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        model = model.to(torch.bfloat16) if bf16 else model
        with timed() as took:
            output = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=pad,
                max_new_tokens=workload.RESPONSE_TOKENS,
            )  # fmt: skip
        responses = output[:, inputs["input_ids"].shape[1] :]
        lengths = [int((row == eos).nonzero()[0]) + 1 if (row == eos).any() else len(row) for row in responses]
    flops = arithmetic.forward(sum(len(encode(tokenizer, text)) for text in texts) + sum(lengths), sum(lengths))
    report(took(), sum(lengths), flops=flops, weight_bytes=weights, longest=max(lengths))


def sft(by_us: bool, bf16: bool) -> None:
    from trl import SFTConfig, SFTTrainer

    from tunetrail.models.cpu.label_head import score_labels_only
    from tunetrail.models.training import epoch_order
    from tunetrail.stages.sft import tokenize

    tokenizer = load_tokenizer(workload.MODEL)
    rows, batch_size = workload.rows("sft", workload.ROWS), 8
    examples = tokenize(rows, tokenizer, max_length=1024)
    tokens = sum(len(e["input_ids"]) for e in examples)
    labels = sum(label != -100 for e in examples for label in e["labels"])
    if by_us:
        model = load_causal_lm(workload.MODEL)
        order = epoch_order([len(e["input_ids"]) for e in examples], batch_size, 1, SEED)
        settings = ours(batch_size, bf16) | {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        data = [examples[i] for i in order]
    else:
        model, settings = stock_model(), arguments(batch_size, bf16) | {"completion_only_loss": True}
        data = [{"prompt": r["prompt"], "completion": r["completion"] + tokenizer.eos_token} for r in rows]
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**settings), train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    if by_us:
        score_labels_only(trainer.model)
    with timed() as took:
        trainer.train()
    report(took(), tokens, flops=3 * Arithmetic(model).forward(tokens, labels))


def reward(by_us: bool, bf16: bool) -> None:
    """All six pairs of each prompt's four completions: ours with K sequences per prompt, stock with two per pair."""
    from transformers import AutoModelForSequenceClassification, TrainingArguments
    from trl import RewardConfig, RewardTrainer

    from tunetrail.reward.kwise import KWiseCollator, KWiseTrainer, initialise

    tokenizer = load_tokenizer(workload.MODEL)
    prompts = ranked(workload.ROWS // 4)
    examples = [
        {
            "prompt": encode(tokenizer, prompt),
            "responses": [encode_response(tokenizer, c) for c in completions],
            "targets": torch.ones(4, 4).triu(1).tolist(),
        }
        for prompt, completions in prompts
    ]
    if by_us:
        model = initialise(load_causal_lm(workload.MODEL), SEED)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer: Any = KWiseTrainer(
            model=model, args=TrainingArguments(**ours(4, bf16), remove_unused_columns=False),
            train_dataset=Dataset.from_list(examples), data_collator=KWiseCollator(tokenizer.pad_token_id),
        )  # fmt: skip
    else:
        model = AutoModelForSequenceClassification.from_pretrained(workload.MODEL, num_labels=1, dtype=torch.float32)
        pairs = [
            {"prompt": prompt, "chosen": completions[i], "rejected": completions[j]}
            for prompt, completions in prompts for i in range(4) for j in range(i + 1, 4)
        ]  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=RewardConfig(**arguments(24, bf16)), processing_class=tokenizer,
            train_dataset=Dataset.from_list(pairs),
        )  # fmt: skip
    with timed() as took:
        trainer.train()
    tokens = sum(len(e["prompt"]) + len(r) for e in examples for r in e["responses"])
    report(took(), tokens, flops=3 * Arithmetic(model).forward(tokens))


def dpo(by_us: bool, bf16: bool) -> None:
    """The best against the worst of each prompt's completions, including the reference's pass."""
    from trl import DPOConfig, DPOTrainer

    from tunetrail.stages.dpo import PretokenizedDpoTrainer

    tokenizer = load_tokenizer(workload.MODEL)
    batch_size = 8
    pairs = [(prompt, completions[0], completions[-1]) for prompt, completions in ranked(workload.ROWS // 2)]
    examples = [
        {
            "prompt_ids": encode(tokenizer, prompt),
            "chosen_ids": encode_response(tokenizer, chosen),
            "rejected_ids": encode_response(tokenizer, rejected),
        }
        for prompt, chosen, rejected in pairs
    ]
    if by_us:
        model = load_causal_lm(workload.MODEL)
        start = time.perf_counter()  # making the trainer runs the reference's pass
        trainer: Any = PretokenizedDpoTrainer(
            model=model, args=DPOConfig(**ours(batch_size, bf16), max_length=None, precompute_ref_log_probs=True),
            train_dataset=Dataset.from_list(examples), processing_class=tokenizer,
        )  # fmt: skip
    else:
        model = stock_model()
        data = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
        trainer = DPOTrainer(
            model=model, args=DPOConfig(**arguments(batch_size, bf16)), train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )  # fmt: skip
        start = time.perf_counter()
    with timed():
        trainer.train()
    seconds = time.perf_counter() - start
    scored = sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
    tokens = scored + 2 * sum(len(e["prompt_ids"]) for e in examples)
    report(seconds, tokens, flops=4 * Arithmetic(model).forward(tokens, scored))


def stock_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(workload.MODEL, dtype=torch.float32)


CASES: dict[str, Callable[[bool, bool], None]] = {
    "ppo": ppo, "sampling": sampling, "sft": sft, "reward": reward, "dpo": dpo,
}  # fmt: skip

if __name__ == "__main__":
    case, side, precision = sys.argv[1:]
    if side == "ours":
        prepare(SEED, "benchmark")
    CASES[case](side == "ours", precision == "bf16")
