"""Evaluation of one model (base, sft or a policy) on prompts no stage has seen.

    python -m tunetrail.stages.evaluation --config C.json --input model=… --input data=… \
        [--input sft=… --input reward=… --input retention=… --input comparisons=…] …

Samples at the configured temperature and measures: gold score (the labeler's scorer, never the reward
model), reward-model score, KL to the SFT model, length, distinct-n, likelihood of unrelated text and a
multiple-choice task, log-probs of preferred and dispreferred responses, and the probes. The gold score is also
measured on greedy decoding, where a policy that only became surer of what it said before does not gain. Where no SFT
model was trained, the base model stands in its place. How models compare is what `stages.head_to_head` says.

The frontier: a policy's training may keep checkpoints at fixed steps (`policies.<name>.checkpoints`); each of them
answers the first `frontier_prompts` prompts here, as the final model did, so that all points of all policies are on
prompts that no stage has seen and none depends on when a save happened to be due. The yardstick is best-of-n on the
same prompts, from 16 samples each of the SFT model. The final model is the last one, whatever the curve says: a
point chosen by looking at the curve would need other prompts to be measured on.

All models but best-of-n answer a prompt with the same random numbers, so that two that are alike say the same and tie,
and a win rate is of answers that differ because the models do. Best-of-n draws others: with the same ones its choice
would hold the very sample that it is compared to, which it could then not lose to.

An interval is {"mean", "low", "high", "n"}, 95% by bootstrap over the source groups that prompts come from, or over
prompts where all are of one group; standard errors likewise. In metrics.json, null where not measured:

    kl_to_sft     interval with "se" and "estimator"; of best-of-n ("analytic bound") nothing is estimated: "mean" and
                  "high" are the upper bound, "low" is 0
    retention     {"nll", "perplexity": intervals; "choices": {"accuracy": interval, "chance"}}
    frontier      of dpo and ppo: {"prompts", "rule": how the final model was chosen, "points": [{"step", "chosen",
                  "kl": interval with "se", "reward", "gold": intervals}]}, one for each checkpoint the policy kept
                  and the final one, all on the same prompts
    best_of_n     of the model that policies start from: {"samples", "prompts", "points": [{"n", "kl_bound",
                  "reward", "gold": intervals}]}, n = 1, 2, 4, 8, 16, on the prompts of `frontier`

Writes `samples.jsonl` (a row a prompt), `probes.json`, `retention.jsonl` and `choices.jsonl` ({"id", "nll"} of a text,
{"id", "correct"} of a question), `pairs.jsonl` ({"id", "group", "chosen_logp", "rejected_logp"} of the held-out pairs).
"""

import json
import math
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunetrail.config.evaluation import EvaluationConfig
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.data.chat import render, with_system
from tunetrail.errors import DataError
from tunetrail.evaluation.models import (
    kl_divergences,
    logprobs_of,
    mean_nlls,
    reward_scores,
    right_choices,
    sentence_probe,
)
from tunetrail.evaluation.stats import best_of_n_kl, best_of_n_values, bootstrap, distinct_n, standard_error
from tunetrail.files import write_json, write_jsonl
from tunetrail.models.batching import encode, encode_comparison, encode_response
from tunetrail.models.loading import is_adapter, load_causal_lm, load_reward_model, load_tokenizer
from tunetrail.models.runtime import device, prepare, use_bf16
from tunetrail.models.sampling import decoding_weights, sample
from tunetrail.preferences.pairs import decided_pairs, preference_targets
from tunetrail.provenance.manifest import METRICS
from tunetrail.scorers.chrf import chrf
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start

Example = tuple[list[int], list[int]]

BEST_OF = (1, 2, 4, 8, 16)
"""n of the yardstick; the last is how many samples of a prompt are drawn."""
RULE = "the last step, fixed before training"
"""How the final model is chosen among the checkpoints."""


@dataclass
class Samples:
    """K responses to each of N prompts, in a row for each prompt."""

    examples: list[Example]
    """[N * K] (prompt ids, response ids)"""
    texts: list[str]
    """[N * K]"""
    gold: list[float] | None = None
    """[N * K]; None where there is no gold scorer."""
    reward: list[float] | None = None
    """[N * K], the reward model's score; None where there is no reward model."""
    kl: list[float] | None = None
    """[N * K], to the SFT model; None where it was not measured."""

    def __getitem__(self, rows: list[int]) -> "Samples":
        def pick(values: Any) -> Any:
            return values and [values[i] for i in rows]

        return Samples(*(pick(v) for v in (self.examples, self.texts, self.gold, self.reward, self.kl)))


class Evaluator:
    """One model under evaluation, with what it is compared to."""

    def __init__(self, stage: Stage, rows: list[dict]):
        self.stage, self.config = stage, EvaluationConfig(**stage.config)
        self.precision, self.subject = stage.shared["precision"], stage.shared["subject"]
        policy = stage.inputs["model"].folder / "policy.json"
        self.n = json.loads(policy.read_text())["n"] if policy.exists() else 1
        """Samples a prompt; above 1 the reward model keeps the best (best-of-n)."""
        self.folder = stage.inputs["sft" if self.n > 1 else "model"].folder / "model"
        self.tokenizer = load_tokenizer(self.folder)
        self.pad_id = self.tokenizer.pad_token_id
        self.model = load_causal_lm(self.folder).to(device()).eval()
        self.prompts = [encode(self.tokenizer, row["prompt"]) for row in rows]
        self.some = rows[: self.config.frontier_prompts]
        """The prompts of frontier and best-of-n: the file is in random order."""
        groups = [row["group"] for row in rows]
        self.groups: list[Any] = groups if len(set(groups)) > 1 else list(range(len(rows)))
        """What is resampled: the source group of each prompt."""
        self.seed = derive_seed(stage.seed, self.subject["name"]) if self.n > 1 else stage.seed
        self.bar = ProgressBar(f"evaluation of {self.subject['name']}", 6, "parts", every_seconds=5)

    def logprobs(self, model: Any, examples: list[Example]) -> list[torch.Tensor]:
        return logprobs_of(model, examples, self.pad_id, self.precision, 1.0, self.config.batch_tokens)

    def interval(self, values: Any, groups: Sequence[Hashable] | None = None) -> dict | None:
        return bootstrap(values, self.config.bootstrap, self.stage.seed, groups) if values else None

    def over_prompts(self, values: Any) -> dict | None:
        """Of a value each of the first prompts."""
        return values and self.interval(values, self.groups[: len(values)])

    def divergence(self, samples: Samples) -> dict | None:
        """The mean KL of a response each of the first prompts, with its standard error."""
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
        if not samples.kl:
            return None
        error = standard_error(np.array(samples.kl) - np.mean(samples.kl), self.groups[: len(samples.kl)])
        return (self.over_prompts(samples.kl) or {}) | {"se": error, "estimator": "rao-blackwell"}

    # ------------------------------------------------------------------------- samples

    def sampled(self, model: Any, rows: list[dict], k: int, greedy: bool = False) -> tuple[Samples, Samples | None]:
        """K responses to each of the first prompts with their gold scores; also the greedy ones."""
        config = self.config
        found = sample(
            decoding_weights(model, use_bf16(self.precision)), self.prompts[: len(rows)], [row["id"] for row in rows],
            k=k + greedy, greedy_first=greedy, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=self.seed, batch_size=config.batch_size, eos_id=self.tokenizer.eos_token_id, pad_id=self.pad_id,
        )  # fmt: skip
        drawn = self.scored([responses[greedy:] for responses in found], rows)
        return drawn, self.scored([responses[:1] for responses in found], rows) if greedy else None

    def scored(self, responses: list[list[list[int]]], rows: list[dict]) -> Samples:
        flat = [response for of_prompt in responses for response in of_prompt]
        owners = [i for i, of_prompt in enumerate(responses) for _ in of_prompt]
        texts = [text.strip() for text in self.tokenizer.batch_decode(flat, skip_special_tokens=True)]
        gold = self.config.gold and [chrf(t, rows[i]["completion"]) for t, i in zip(texts, owners, strict=True)]
        return Samples([(self.prompts[i], r) for r, i in zip(flat, owners, strict=True)], texts, gold or None)

    def reward(self, several: list[Samples]) -> None:
        """Fills in the reward model's scores."""
        if "reward" not in self.stage.inputs or not several:
            return
        reward_model = load_reward_model(self.stage.inputs["reward"].folder / "model").to(device()).eval()
        for samples in several:
            samples.reward = reward_scores(
                reward_model, samples.examples, self.pad_id, self.precision, self.config.batch_tokens
            )

    def kl(self, several: list[tuple[Samples, Path | None]]) -> None:
        """Fills in the KL to the SFT model, of samples of this model (None) or of that in a folder."""
        if "sft" not in self.stage.inputs or self.n > 1:
            return
        reference = load_causal_lm(self.stage.inputs["sft"].folder / "model").to(device()).eval()
        for samples, folder in several:
            model = self.model if folder is None else load_causal_lm(folder).to(device()).eval()
            samples.kl = kl_divergences(
                model, reference, samples.examples, self.pad_id, self.precision, self.config.temperature,
                self.config.batch_tokens,
            )  # fmt: skip

    # ------------------------------------------------------------------------- frontier

    def kept(self) -> dict[int, Path]:
        """Step -> model folder of the checkpoints that training kept."""
        folder = self.stage.inputs["model"].folder / "checkpoints"
        return {int(path.name): path / "model" for path in sorted(folder.glob("*"), key=lambda path: int(path.name))}

    def point(self, samples: Samples) -> dict:
        return {
            "kl": self.divergence(samples),
            "reward": self.over_prompts(samples.reward),
            "gold": self.over_prompts(samples.gold),
        }

    def frontier(self, samples: Samples, kept: dict[int, Samples]) -> dict | None:
        """See the module's docstring."""
        if self.subject["method"] not in ("dpo", "ppo"):
            return None
        last = json.loads((self.stage.inputs["model"].folder / METRICS).read_text())["steps"]
        points = [{"step": step, "chosen": False} | self.point(found) for step, found in kept.items()]
        final = self.point(samples[list(range(len(self.some)))])
        return {"prompts": len(self.some), "rule": RULE, "points": [*points, {"step": last, "chosen": True} | final]}

    def best_of_n(self, samples: Samples | None) -> dict | None:
        """See the module's docstring."""
        if samples is None or samples.reward is None:
            return None
        proxy = np.reshape(samples.reward, (-1, max(BEST_OF)))
        gold = None if samples.gold is None else np.reshape(samples.gold, proxy.shape)
        points = [
            {
                "n": n,
                "kl_bound": best_of_n_kl(n),
                "reward": self.over_prompts(best_of_n_values(proxy, proxy, n).tolist()),
                "gold": None if gold is None else self.over_prompts(best_of_n_values(proxy, gold, n).tolist()),
            }
            for n in BEST_OF
        ]
        return {"samples": max(BEST_OF), "prompts": len(self.some), "points": points}

    # ------------------------------------------------------------------------- what else it knows

    def retention(self) -> dict | None:
        """Loss on unrelated text and a multiple-choice task."""
        if "retention" not in self.stage.inputs:
            return None
        rows, questions = (self.stage.rows("retention", name) for name in ("retention.jsonl", "choices.jsonl"))
        texts = [(row["prompt_ids"], row["response_ids"]) for row in rows]
        nlls = mean_nlls(self.model, texts, self.pad_id, self.precision, self.config.batch_tokens)
        correct = right_choices(self.model, questions, self.pad_id, self.precision, self.config.batch_tokens)
        for name, key, values, of in (("retention", "nll", nlls, rows), ("choices", "correct", correct, questions)):
            table = [{"id": row["id"], key: value} for row, value in zip(of, values, strict=True)]
            write_jsonl(self.stage.work / f"{name}.jsonl", table)
        nll = self.interval(nlls)
        choices = {
            "accuracy": self.interval([float(c) for c in correct]),
            "chance": sum(1 / len(row["choices"]) for row in questions) / len(questions),
        } if questions else None  # fmt: skip
        return {
            "nll": nll,
            "perplexity": nll and nll | {end: math.exp(nll[end]) for end in ("mean", "low", "high")},
            "choices": choices,
        }

    def comparisons(self) -> dict | None:
        """Log-probs of chosen and rejected responses on held-out pairs, and how often chosen is the likelier."""
        if "comparisons" not in self.stage.inputs:
            return None
        chosen, rejected, rows = [], [], []
        for row in self.stage.rows("comparisons", "comparisons.jsonl"):
            pairs = decided_pairs(preference_targets(row["rankings"]))
            if row["split"] != "heldout" or not pairs:
                continue
            prompt, responses = encode_comparison(self.tokenizer, row)
            winner, loser = ((prompt, responses[i]) for i in pairs[0])
            chosen.append(winner)
            rejected.append(loser)
            rows.append(row)
        logps = [float(row.sum()) for row in self.logprobs(self.model, chosen + rejected)]
        chosen_logps, rejected_logps = logps[: len(rows)], logps[len(rows) :]
        write_jsonl(
            self.stage.work / "pairs.jsonl",
            [
                {"id": row["id"], "group": row["group"], "chosen_logp": c, "rejected_logp": r}
                for row, c, r in zip(rows, chosen_logps, rejected_logps, strict=True)
            ],
        )
        groups = [row["group"] for row in rows] if len({row["group"] for row in rows}) > 1 else None
        return {
            "chosen_logps": self.interval(chosen_logps, groups),
            "rejected_logps": self.interval(rejected_logps, groups),
            "accuracy": self.interval(
                [float(c > r) for c, r in zip(chosen_logps, rejected_logps, strict=True)], groups
            ),
        }

    def probes(self) -> dict:
        """Next-token probabilities of the sentence, and log-probs of the two responses of each preference probe."""

        system = self.stage.shared["data.system"]
        as_chat = self.stage.shared["data.chat"] and self.tokenizer.chat_template
        preferences = []
        for probe in self.config.preferences:
            messages = with_system([{"role": "user", "content": probe.prompt}], system)
            prompt = encode(self.tokenizer, render(self.tokenizer, messages) if as_chat else probe.prompt)
            examples = [
                (prompt, encode_response(self.tokenizer, text)) for text in (probe.preferred, probe.dispreferred)
            ]
            preferred, dispreferred = (
                float(row.sum()) for row in logprobs_of(self.model, examples, self.pad_id, "fp32")
            )
            preferences.append(probe.model_dump() | {"preferred_logp": preferred, "dispreferred_logp": dispreferred})
        return {
            "sentence": sentence_probe(self.model, self.tokenizer, self.config.sentence),
            "preferences": preferences,
        }


def run(stage: Stage) -> dict:
    prepare(stage.seed, "evaluation")
    stage.draft.about = ("model",)
    rows = [row for row in stage.rows("data", "evaluation.jsonl") if "prompt" in row]
    if not rows:
        raise DataError(
            "evaluation: the evaluation split has no prompts; raise data.shares.evaluation or data.limits.evaluation"
        )
    evaluator = Evaluator(stage, rows)
    config, subject, interval = evaluator.config, evaluator.subject, evaluator.over_prompts
    is_reference, kept = "sft" not in stage.inputs, evaluator.kept()
    with evaluator.bar as bar:
        # The greedy response is compared by its gold score alone; best-of-n has none.
        samples, greedy = evaluator.sampled(evaluator.model, rows, evaluator.n, evaluator.n == 1 and bool(config.gold))
        many = (
            evaluator.sampled(evaluator.model, evaluator.some, max(BEST_OF))[0]
            if is_reference and "reward" in stage.inputs
            else None
        )
        along = {
            step: evaluator.sampled(load_causal_lm(folder).to(device()).eval(), evaluator.some, 1)[0]
            for step, folder in kept.items()
        }
        bar.advance(1, "sampled")
        evaluator.reward([samples, *along.values(), *([many] if many else [])])
        if evaluator.n > 1 and samples.reward is not None:
            score = samples.reward.__getitem__
            samples = samples[
                [max(range(i, i + evaluator.n), key=score) for i in range(0, len(samples.texts), evaluator.n)]
            ]
        bar.advance(1, "scored")
        evaluator.kl([(samples, None), *((along[step], folder) for step, folder in kept.items())])
        bar.advance(1, "compared")
        retention = evaluator.retention()
        comparisons = evaluator.comparisons()
        bar.advance(2, "remembered")
        write_json(stage.work / "probes.json", evaluator.probes())
        bar.advance(1, "probed")

    responses = [response for _, response in samples.examples]
    finished = [response[-1] == evaluator.tokenizer.eos_token_id for response in responses]
    columns = {
        "completion": samples.texts, "gold": samples.gold, "greedy": greedy and greedy.texts,
        "greedy_gold": greedy and greedy.gold, "reward": samples.reward, "kl": samples.kl,
        "length": list(map(len, responses)), "greedy_length": greedy and [len(r) for _, r in greedy.examples],
        "finished": finished,
    }  # fmt: skip
    table = [
        {
            "id": row["id"],
            "group": row["group"],
            "prompt": row["prompt"],
            "messages": row["messages"],
            "reference": row["completion"],
        }
        | {name: values and values[i] for name, values in columns.items()}
        for i, row in enumerate(rows)
    ]
    write_jsonl(stage.work / "samples.jsonl", table)

    return {
        "policy": subject["name"],
        "method": subject["method"],
        "adapter": "lora"
        if is_adapter(evaluator.folder)
        else None
        if subject["name"] == "base" or evaluator.n > 1
        else "full",
        "n_prompts": len(rows),
        "gold": interval(samples.gold),
        "greedy_gold": interval(greedy.gold) if greedy else None,
        "reward": interval(samples.reward),
        "kl_to_sft": evaluator.divergence(samples),
        "frontier": evaluator.frontier(samples, along),
        "best_of_n": evaluator.best_of_n(many),
        "length": interval([float(len(r)) for r in responses]),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "finished": math.fsum(finished) / len(finished),
        "retention": retention,
        "comparisons": comparisons,
    }


if __name__ == "__main__":
    sys.exit(start("evaluation", run))
