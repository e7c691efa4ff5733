"""Reward against KL of PPO, DPO and best-of-n, and the exact optimum: python -m tests.benchmarks.frontier FILE.svg

The world of tests/optimum.py: every response can be listed, so every number here is a sum over all of
them. DPO learns from pairs of reference samples whose labels follow the Bradley-Terry model of the
reward, for which its optimum is the tilt too. Takes some minutes; prints the numbers it draws.
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import altair as alt
import pandas as pd
import torch
import vl_convert
from datasets import Dataset
from trl import DPOConfig

from tests.optimum import (
    PROMPT,
    RESPONSES,
    REWARDS,
    best_of_n,
    count_wanted,
    log_distribution,
    reference_model,
    reward_and_kl,
    share_of_optimum,
    tilted,
    train_ppo,
)
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.tiny import tiny_tokenizer
from tunetrail.stages.dpo import PretokenizedDpoTrainer

BETAS = (2.0, 1.0, 0.7, 0.5, 0.35, 0.25)
PAIRS = 16384


def preference_pairs(log_ref: torch.Tensor) -> Dataset:
    """Pairs of reference samples; the one with reward r wins against s with probability sigmoid(r - s)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(log_ref.exp(), 2 * PAIRS, True, generator=generator).view(-1, 2)
    wins = torch.rand(PAIRS, generator=generator) < torch.sigmoid(REWARDS[drawn[:, 0]] - REWARDS[drawn[:, 1]])
    ordered = torch.where(wins[:, None], drawn, drawn.flip(1)).tolist()
    rows = [{"prompt_ids": PROMPT, "chosen_ids": RESPONSES[a], "rejected_ids": RESPONSES[b]} for a, b in ordered]
    return Dataset.from_list(rows)


def train_dpo(pairs: Dataset, beta: float) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        reference_model().save_pretrained(folder)
        trainer = PretokenizedDpoTrainer(
            model=type(reference_model()).from_pretrained(folder),
            args=DPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
                gradient_checkpointing=False, per_device_train_batch_size=256, learning_rate=5e-3, num_train_epochs=2,
                beta=beta, precompute_ref_log_probs=True, max_length=None, logging_strategy="no", seed=0,
            ),
            train_dataset=pairs,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        score_labels_only(trainer.model)
        trainer.train()
        return trainer.model.eval()


def points() -> pd.DataFrame:
    """Rows of method, setting, kl, reward and the share of the best gain at that KL."""
    log_ref = log_distribution(reference_model())
    pairs = preference_pairs(log_ref)
    found = [("best of n", n, best_of_n(log_ref, n)) for n in (2, 4, 8, 16, 64)]
    for beta in BETAS:
        with mock.patch("tunetrail.ppo.trainer.sequence_scores", count_wanted):
            for method, changes in (("PPO", {}), ("RLOO", {"advantage": "rloo"})):
                trainer = train_ppo(steps=60, kl_coef=beta, **changes)
                found.append((method, beta, log_distribution(trainer.actor_critic.policy)))
        found.append(("DPO", beta, log_distribution(train_dpo(pairs, beta))))
    rows = []
    for method, setting, log_p in found:
        reward, kl = reward_and_kl(log_p, log_ref)
        rows.append(
            {
                "method": method,
                "setting": setting,
                "kl": kl,
                "reward": reward,
                "share": share_of_optimum(log_p, log_ref),
            }
        )
    return pd.DataFrame(rows).sort_values(["method", "kl"], ignore_index=True)


def picture(table: pd.DataFrame) -> str:
    log_ref = log_distribution(reference_model())
    betas = torch.logspace(2, -0.75, 120).tolist()
    curve = pd.DataFrame([reward_and_kl(tilted(log_ref, b), log_ref) for b in betas], columns=["reward", "kl"])
    curve = curve[curve.kl <= 1.05 * table.kl.max()]
    x = alt.X("kl:Q", title="KL to the reference, nats", scale=alt.Scale(type="sqrt"))
    y = alt.Y("reward:Q", title="expected reward (wanted tokens per response)", scale=alt.Scale(zero=False))
    line = alt.Chart(curve).mark_line(color="#888", strokeWidth=2).encode(x=x, y=y, order="kl:Q")
    dots = alt.Chart(table).mark_point(size=70, filled=True, opacity=0.85)
    dots = dots.encode(x=x, y=y, color=alt.Color("method:N", title=None), shape=alt.Shape("method:N", title=None))
    chart = (line + dots).properties(width=520, height=320, title="The line is the best that any policy can do")
    return vl_convert.vegalite_to_svg(chart.to_json())


def main() -> None:
    table = points()
    print(table.round(3).to_string())
    Path(sys.argv[1]).write_text(picture(table), encoding="utf-8")


if __name__ == "__main__":
    main()
