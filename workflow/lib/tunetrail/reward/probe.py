"""A linear probe: how well rankings can be predicted from the language model's hidden states before any training.

The probe is a Bradley-Terry regression on pooled hidden states. It is a baseline that the reward model must beat, and
optionally the head that the reward model starts from.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from tunetrail.evaluation.stats import members
from tunetrail.models.batching import collate, token_batches
from tunetrail.models.runtime import autocast, device
from tunetrail.models.scoring import SCORING_TOKENS, pooled_states

RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Candidates for cross-validation, the weakest first; the last one is used if there is too little data for that."""
FOLDS = 5


@torch.no_grad()
def frozen_states(model: Any, examples: list[dict], pad_id: int, precision: str, pooling: str) -> list[np.ndarray]:
    """The pooled last hidden states of each example's K responses, [K, d] float64.

    Args:
        model: a causal language model.
        examples: with "prompt" and "responses", token ids (`kwise.tokenize`).
    """
    prompts = [example["prompt"] for example in examples for _ in example["responses"]]
    responses = [response for example in examples for response in example["responses"]]
    states = np.empty((len(prompts), model.config.hidden_size))
    for rows in token_batches(prompts, responses, SCORING_TOKENS):
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id).to(device())
        with autocast(precision):
            hidden = model.base_model(**batch.inputs).last_hidden_state
        states[rows] = pooled_states(hidden, batch, pooling).double().cpu().numpy()
    return np.split(states, np.cumsum([len(example["responses"]) for example in examples])[:-1])


def bradley_terry(differences: np.ndarray, targets: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """[d]: the w that minimises the weighted mean cross-entropy of sigmoid(differences w) plus ridge |w|² / 2 (L-BFGS).

    Args:
        differences: [n, d], the features of the first response less those of the second.
        targets: [n] in [0, 1], the share of labelers who prefer the first.
        weights: [n], of the pairs; they add up to 1.
    """

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = differences @ w
        losses = np.logaddexp(0, margins) - targets * margins
        gradient = differences.T @ (weights * (expit(margins) - targets)) + ridge * w
        return float(weights @ losses + ridge * w @ w / 2), gradient

    return minimize(objective, np.zeros(differences.shape[1]), jac=True, method="L-BFGS-B").x


def fit_probe(states: Sequence[np.ndarray], targets: Sequence[Any], groups: Sequence[Hashable]) -> np.ndarray:
    """[d]: weights of the states, fitted to all pairs of each prompt's responses; all prompts have equal weight.

    States are scaled to a standard deviation of 1; the ridge minimises the cross-entropy on held-out source groups.

    Args:
        states: [K, d] of each prompt.
        targets: [K, K] of each prompt, the share of labelers who ranked i above j.
        groups: the source group of each prompt.
    """
    scale = np.concatenate(list(states)).std(0) + 1e-8
    pairs = [(n, i, j) for n, of_prompt in enumerate(states) for i, j in combinations(range(len(of_prompt)), 2)]
    prompt = np.array([n for n, _, _ in pairs])
    x = np.stack([(states[n][i] - states[n][j]) / scale for n, i, j in pairs])
    y = np.array([targets[n][i][j] for n, i, j in pairs])
    weight = 1 / np.bincount(prompt)[prompt]
    fold = members(groups)[prompt] % FOLDS

    def fitted(rows: np.ndarray, ridge: float) -> np.ndarray:
        return bradley_terry(x[rows], y[rows], weight[rows] / weight[rows].sum(), ridge)

    def left_out_loss(ridge: float) -> float:
        total = 0.0
        for held in range(FOLDS):
            margins = x[fold == held] @ fitted(fold != held, ridge)
            total += weight[fold == held] @ (np.logaddexp(0, margins) - y[fold == held] * margins)
        return total

    ridge = min(RIDGES, key=left_out_loss) if len(set(fold)) == FOLDS else RIDGES[-1]
    return fitted(np.full(len(x), True), ridge) / scale
