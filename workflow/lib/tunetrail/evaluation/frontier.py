"""Reward and gold score against KL: a policy's checkpoints, and best-of-n from the model it started from.

Training a policy may keep checkpoints at fixed steps (`policies.<name>.checkpoints`). Each of them answers the first
`frontier_prompts` prompts once, the final model `evaluation.samples` times. So all points of all policies are on
prompts that no stage has trained on, and none depends on when a save happened to be due. The yardstick is best-of-n on
the same prompts, from 8 samples per prompt of the SFT model. The final model is always the last one: a point chosen by
looking at the curve would have to be measured on other prompts.
Early stopping chooses by the held-out split instead.

A point's interval is that of its own mean, by bootstrap over source groups. Since points share their prompts, the
difference between two of them is less uncertain than their two intervals suggest.
"""

from pathlib import Path

import numpy as np

from tunetrail.evaluation.evaluator import TRAINED, Evaluator, Samples
from tunetrail.evaluation.schema import BestOfNCurve, BestOfNPoint, Frontier, FrontierPoint
from tunetrail.evaluation.stats import best_of_n_kl, best_of_n_values

BEST_OF = (1, 2, 4, 8)
"""The yardstick's n; the last is the number of samples per prompt."""
RULE = "the last step, fixed before training"
BEST_RULE = "the lowest held-out loss"
"""How the final model is chosen among the checkpoints."""


def kept_checkpoints(artifact: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints that training kept."""
    folders = sorted((artifact / "checkpoints").glob("*"), key=lambda path: int(path.name))
    return {int(path.name): path for path in folders}


def sample_checkpoints(evaluator: Evaluator, kept: dict[int, Path]) -> dict[int, Samples]:
    """Step -> one response to each of the frontier's prompts."""
    return {
        step: evaluator.sampled(evaluator.kept(folder), evaluator.frontier_rows, 1)[0] for step, folder in kept.items()
    }


def sample_yardstick(evaluator: Evaluator) -> Samples | None:
    """Samples for best-of-n from the model that policies start from; None for other models or without a reward
    model."""
    if "sft" in evaluator.stage.inputs or "reward" not in evaluator.stage.inputs:
        return None
    return evaluator.sampled(evaluator.model, evaluator.frontier_rows, max(BEST_OF))[0]


def point(evaluator: Evaluator, step: int, chosen: bool, samples: Samples) -> FrontierPoint:
    return {
        "step": step,
        "chosen": chosen,
        "kl": evaluator.divergence(samples),
        "reward": evaluator.over_prompts(samples.means("reward")),
        "gold": evaluator.over_prompts(samples.means("gold")),
    }


def frontier(evaluator: Evaluator, samples: Samples, checkpoints: dict[int, Samples]) -> Frontier | None:
    """The checkpoints of a trained policy and its final model; None for any other model."""
    if evaluator.subject["method"] not in TRAINED:
        return None
    prompts = len(evaluator.frontier_rows)
    points = [point(evaluator, step, False, of_step) for step, of_step in checkpoints.items()]
    best = evaluator.made.get("kept_step")
    final = point(evaluator, best or evaluator.made["steps"], True, samples.first(prompts))
    return {"prompts": prompts, "rule": BEST_RULE if best else RULE, "points": [*points, final]}


def best_of_n(evaluator: Evaluator, samples: Samples | None) -> BestOfNCurve | None:
    """Best-of-n of the yardstick's samples, for every n of `BEST_OF`."""
    if samples is None or samples.reward is None:
        return None
    proxy = np.reshape(samples.reward, (-1, max(BEST_OF)))
    gold = None if samples.gold is None else np.reshape(samples.gold, proxy.shape)
    points: list[BestOfNPoint] = [
        {
            "n": n,
            "kl_bound": best_of_n_kl(n),
            "reward": evaluator.over_prompts(best_of_n_values(proxy, proxy, n).tolist()),
            "gold": None if gold is None else evaluator.over_prompts(best_of_n_values(proxy, gold, n).tolist()),
        }
        for n in BEST_OF
    ]
    return {"samples": max(BEST_OF), "prompts": len(evaluator.frontier_rows), "points": points}
