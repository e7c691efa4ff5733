"""One iteration of the PPO of TRL 1.12, the last version that had it: python -m tests.benchmarks.trl_ppo {fp32|bf16}

Runs in its own environment (`make bench` builds it), and prints what `workload.report` says.
"""

import contextlib
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.benchmarks.workload import EPISODES, EPOCHS, MODEL, RESPONSE_TOKENS, prompt_ids, report, tokenizer


def main(precision: str) -> None:
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    policy, reference = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=dtype, num_labels=1) for _ in range(2)
    )
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=8, gradient_accumulation_steps=EPISODES // 8, num_mini_batches=1,
            num_ppo_epochs=EPOCHS, total_episodes=EPISODES, response_length=RESPONSE_TOKENS, stop_token="eos",
            temperature=1.0, num_sample_generations=0, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
        processing_class=tokenizer("left"),
        model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompt_ids("rl", EPISODES)}),
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    report(seconds, EPISODES)


if __name__ == "__main__":
    main(sys.argv[1])
