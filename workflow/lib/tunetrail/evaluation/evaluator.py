"""One model under evaluation: its samples and their scores."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunetrail.config.evaluation import EvaluationConfig
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.evaluation.models import kl_divergences, logprobs_of, reward_scores
from tunetrail.evaluation.schema import Divergence, Interval
from tunetrail.evaluation.stats import best_of_n_kl, bootstrap, standard_error
from tunetrail.models.batching import encode
from tunetrail.models.loading import load_causal_lm, load_reward_model, load_tokenizer, with_adapter
from tunetrail.models.runtime import device, use_bf16
from tunetrail.models.sampling import decoding_weights, sample
from tunetrail.provenance.manifest import METRICS
from tunetrail.scorers.build import Completion, Scorer, build
from tunetrail.seeds import derive_seed

Example = tuple[list[int], list[int]]
"""(prompt ids, response ids)"""
REFERENCE_FREE = ("orpo", "simpo")
"""Methods whose rewards are log-probs per token."""
TRAINED = ("dpo", *REFERENCE_FREE, "kto", "ppo")
"""Methods that train a policy; its KL is measured to the model that it started from."""


@dataclass
class Samples:
    """K responses to each of N prompts, prompt by prompt: every column has N * K entries."""

    k: int
    examples: list[Example]
    texts: list[str]
    gold: list[float] | None = None
    """The gold scores; None if there is no gold scorer."""
    reward: list[float] | None = None
    """The reward model's score; None if there is no reward model."""
    kl: list[float] | None = None
    """[N]: KL to the SFT model along the first response to each prompt; None if it was not measured."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """The other gold scorers' scores, by name."""

    @property
    def lengths(self) -> list[int]:
        return [len(response) for _, response in self.examples]

    def means(self, name: str) -> Any:
        """[N]: the mean over each prompt's responses; None if the column was not measured."""
        return self.prompt_means(getattr(self, name))

    def prompt_means(self, values: list[float] | None) -> Any:
        """[N * K] -> [N]; None for None."""
        return None if values is None else np.reshape(values, (-1, self.k)).mean(1).tolist()

    def pick(self, rows: list[int], k: int) -> "Samples":
        """The responses in these rows, k per prompt."""
        columns = (self.examples, self.texts, self.gold, self.reward)
        kl = self.kl and [self.kl[i // self.k] for i in rows[::k]]
        others = {name: [values[i] for i in rows] for name, values in self.others.items()}
        return Samples(k, *(values and [values[i] for i in rows] for values in columns), kl=kl, others=others)  # type: ignore[misc,arg-type]

    def first(self, prompts: int) -> "Samples":
        """The responses to the first prompts."""
        return self.pick(list(range(prompts * self.k)), self.k)


class Evaluator:
    """The model under evaluation, its prompts, and the models and scorers that measure it."""

    def __init__(self, stage: Stage, rows: list[dict]):
        self.stage, self.config = stage, EvaluationConfig(**stage.config)
        self.precision, self.subject = stage.shared["precision"], stage.shared["subject"]
        self.made: dict[str, Any] = json.loads((stage.inputs["model"].folder / METRICS).read_text())
        """The metrics of the stage that made the model; if it was trained, `adapter` says how."""
        policy = stage.inputs["model"].folder / "policy.json"
        self.n = json.loads(policy.read_text())["n"] if policy.exists() else 1
        """Samples per prompt; above 1 the reward model keeps the best (best-of-n)."""
        self.folder = stage.inputs["sft" if self.n > 1 else "model"].folder / "model"
        self.tokenizer = load_tokenizer(self.folder)
        self.pad_id = self.tokenizer.pad_token_id
        self.model = load_causal_lm(self.folder).to(device()).eval()
        self.prompts = [encode(self.tokenizer, row["prompt"]) for row in rows]
        self.frontier_rows = rows[: self.config.frontier_prompts]
        """The prompts for the frontier and best-of-n: the first ones, since the file is shuffled and takes turns among
        groups."""
        self.lacking = sum("completion" not in row for row in rows)
        """How many prompts have no reference answer."""
        groups = [row["group"] for row in rows]
        self.groups: list[Any] = groups if len(set(groups)) > 1 else list(range(len(rows)))
        """The units to resample: each prompt's source group, or the prompts themselves if there is only one group."""
        self.seed = derive_seed(stage.seed, self.subject["name"])
        """Every model draws its own random numbers, see `stages.evaluation`."""
        self.bar = ProgressBar(f"evaluation of {self.subject['name']}", 6, "parts", every_seconds=5)

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """Gold scorers by name, the main one first. A scorer that needs reference answers is left out if any prompt
        lacks one."""
        scorers = {name: build(name, self.stage.shared.get("scorers", {})) for name in self.config.golds}
        return {name: scorer for name, scorer in scorers.items() if not (scorer.needs_reference and self.lacking)}

    @property
    def gold(self) -> str | None:
        """The main gold scorer; None if there is none or it cannot be measured, even if others can."""
        return next((name for name in self.config.golds[:1] if name in self.scorers), None)

    @property
    def not_measured(self) -> dict[str, Any] | None:
        """{"scorers", "prompts"}: gold scorers left out for lack of reference answers, and how many prompts lack
        one."""
        names = [name for name in self.config.golds if name not in self.scorers]
        return {"scorers": names, "prompts": self.lacking} if names else None

    def reference(self) -> Any:
        """The model that policies start from."""
        return load_causal_lm(self.stage.inputs["sft"].folder / "model").to(device()).eval()

    def kept(self, checkpoint: Path) -> Any:
        """A model kept along the way, of which only the adapter was saved with LoRA."""
        adapter = checkpoint / "adapter"
        start = self.stage.inputs["sft"].folder / "model"
        model = with_adapter(start, adapter) if adapter.exists() else load_causal_lm(checkpoint / "model")
        return model.to(device()).eval()

    def logprobs(self, model: Any, examples: list[Example]) -> list[torch.Tensor]:
        return logprobs_of(model, examples, self.pad_id, self.precision, 1.0, self.config.batch_tokens)

    def interval(self, values: Any, groups: Sequence[Hashable] | None = None) -> Interval | None:
        return bootstrap(values, self.config.bootstrap, self.stage.seed, groups) if values else None  # type: ignore[return-value]

    def over_prompts(self, values: Any) -> Interval | None:
        """The mean of one value for each of the first prompts, with its interval."""
        return values and self.interval(values, self.groups[: len(values)])

    def divergence(self, samples: Samples) -> Divergence | None:
        """The mean KL over one response to each of the first prompts, with its standard error."""
        if self.n > 1:
            bound = best_of_n_kl(self.n)
            return {
                "mean": bound,
                "low": 0.0,
                "high": bound,
                "n": len(self.prompts),
                "se": None,
                "estimator": "analytic bound",
            }
        if samples.kl is None:
            return None
        error = standard_error(np.array(samples.kl) - np.mean(samples.kl), self.groups[: len(samples.kl)])
        return (self.over_prompts(samples.kl) or {}) | {"se": error, "estimator": "rao-blackwell"}  # type: ignore[return-value,operator]

    def sampled(self, model: Any, rows: list[dict], k: int, greedy: bool = False) -> tuple[Samples, Samples | None]:
        """(K responses to each of the first prompts with their gold scores; if `greedy`, the greedy ones as well)."""
        config = self.config
        responses = sample(
            decoding_weights(model, use_bf16(self.precision)),
            self.prompts[: len(rows)],
            [row["id"] for row in rows],
            k=k + greedy,
            greedy_first=greedy,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=self.seed,
            batch_size=config.batch_size,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.pad_id,
        )
        drawn = self.scored([of_prompt[greedy:] for of_prompt in responses], rows)
        return drawn, self.scored([of_prompt[:1] for of_prompt in responses], rows) if greedy else None

    def scored(self, responses: list[list[list[int]]], rows: list[dict]) -> Samples:
        """Each prompt's responses with their texts and gold scores."""
        flat = [response for of_prompt in responses for response in of_prompt]
        owners = [i for i, of_prompt in enumerate(responses) for _ in of_prompt]
        texts = [text.strip() for text in self.tokenizer.batch_decode(flat, skip_special_tokens=True)]
        completions = [
            Completion(
                rows[i]["prompt"], text, rows[i].get("completion"), rows[i], ids[-1:] == [self.tokenizer.eos_token_id]
            )
            for text, i, ids in zip(texts, owners, flat, strict=True)
        ]
        scores = {name: scorer.scores(completions) for name, scorer in self.scorers.items()}
        gold = scores.pop(self.gold) if self.gold else None
        examples = [(self.prompts[i], response) for response, i in zip(flat, owners, strict=True)]
        return Samples(len(responses[0]), examples, texts, gold, others=scores)

    def reward(self, batches: list[Samples]) -> None:
        """Fills in the reward model's scores."""
        if "reward" not in self.stage.inputs or not batches:
            return
        reward_model = load_reward_model(self.stage.inputs["reward"].folder / "model").to(device()).eval()
        for samples in batches:
            samples.reward = reward_scores(
                reward_model, samples.examples, self.pad_id, self.precision, self.config.batch_tokens
            )

    def kl(self, batches: list[tuple[Samples, Path | None]]) -> None:
        """Fills in the KL to the SFT model, for samples of this model (None) or of one of its checkpoints.

        One response per prompt is enough, since whole distributions are compared, and two models must score all of it.
        """
        if "sft" not in self.stage.inputs or self.n > 1:
            return
        reference = self.reference()
        for samples, checkpoint in batches:
            model = self.model if checkpoint is None else self.kept(checkpoint)
            samples.kl = kl_divergences(
                model,
                reference,
                samples.examples[:: samples.k],
                self.pad_id,
                self.precision,
                self.config.temperature,
                self.config.batch_tokens,
            )

    def best(self, samples: Samples) -> Samples:
        """Keeps of every n samples of a prompt the one with the highest reward."""
        if self.n == 1 or samples.reward is None:
            return samples
        score = samples.reward.__getitem__
        best = [max(range(i, i + self.n), key=score) for i in range(0, len(samples.texts), self.n)]
        return samples.pick(best, samples.k // self.n)
