"""Evaluation of one model (base, sft or a policy) on prompts no stage has seen.

    python -m tunetrail.stages.evaluation --config C.json --input model=… --input data=… \
        [--input sft=… --input sft_evaluation=… --input reward=… --input retention=… --input comparisons=…] …

Samples at the configured temperature and measures: gold score (the labeler's scorer, never the reward
model), reward-model score, win rate against the SFT model on the same prompts, KL to it, length,
distinct-n, likelihood of unrelated text, log-probs of preferred and dispreferred responses, and the
probes. Gold score and win rate are also measured on greedy decoding, where a policy that only became surer
of what it said before does not gain. Where no SFT model was trained, the base model stands in its place.

An interval is {"mean", "low", "high", "n"}, 95% by bootstrap over prompts. In metrics.json, null where not measured:

    win_rate_vs_sft, greedy_win_rate_vs_sft
                  interval with "wins", "ties", "losses", and "group_low", "group_high", "groups" by bootstrap over
                  source groups
    kl_to_sft     interval with "se" and "estimator"
    retention     {"nll", "perplexity", "change_vs_base": intervals; "choices": {"accuracy", "change_vs_base":
                  intervals, "chance"}}
    frontier      of dpo and ppo: {"prompts", "rule": how the final model was chosen, "points": [{"step", "chosen",
                  "kl": interval with "se", "reward", "gold": intervals}]}, one for each checkpoint the policy kept
                  and the final one, all on the same prompts
    best_of_n     of the model that policies start from: {"samples", "prompts", "points": [{"n", "kl_bound",
                  "reward", "gold": intervals}]}, n = 1, 2, 4, 8, 16, on the prompts of `frontier`

Writes `samples.jsonl` (a row a prompt), `probes.json`, `retention.jsonl` and `choices.jsonl` (a row a text, a row a
question, each beside the base model's), `pairs.jsonl` ({"id", "group", "chosen_logp", "rejected_logp"} of the
held-out pairs).
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from tunetrail.config import EvaluationConfig
from tunetrail.contract import Stage, main, write_json, write_jsonl
from tunetrail.data.chat import render, with_system
from tunetrail.errors import DataError
from tunetrail.evaluation.models import logprobs_of, mean_nlls, reward_scores, sentence_probe
from tunetrail.evaluation.stats import best_of_n_kl, bootstrap, distinct_n, win_rate
from tunetrail.models.batching import encode, encode_comparison, encode_response
from tunetrail.models.comparisons import decided_pairs, preference_targets
from tunetrail.models.loading import is_adapter, load_causal_lm, load_reward_model, load_tokenizer
from tunetrail.models.sampling import decoding_weights, sample_with_logprobs
from tunetrail.progress import ProgressBar
from tunetrail.runtime import device, prepare, use_bf16

Example = tuple[list[int], list[int]]


@dataclass
class Samples:
    """One response to each of N prompts."""

    examples: list[Example]
    """(prompt ids, response ids)"""
    logprobs: list[torch.Tensor] | None
    """Of each response's tokens, at the temperature they were sampled at; None of best-of-n, whose KL is known."""
    reward: list[float] | None
    """The reward model's score; None where there is no reward model."""
    greedy: list[list[int]] | None
    """The greedy response; None for best-of-n, which has none, and where no gold score would be taken of it."""


class Evaluator:
    """One model under evaluation, with what it is compared to."""

    def __init__(self, stage: Stage):
        self.stage, self.config = stage, EvaluationConfig(**stage.config)
        self.precision, self.subject = stage.shared["precision"], stage.shared["subject"]
        policy = stage.inputs["model"] / "policy.json"
        self.n = json.loads(policy.read_text())["n"] if policy.exists() else 1
        """Samples a prompt; above 1 the reward model keeps the best (best-of-n)."""
        self.folder = stage.inputs["sft" if self.n > 1 else "model"] / "model"
        self.tokenizer = load_tokenizer(self.folder)
        self.pad_id = self.tokenizer.pad_token_id
        self.model = load_causal_lm(self.folder).to(device()).eval()
        self.bar = ProgressBar(f"evaluation of {self.subject['name']}", 6, "parts", every_seconds=5)

    def logprobs(self, model: Any, examples: list[Example], temperature: float = 1.0) -> list[torch.Tensor]:
        return logprobs_of(model, examples, self.pad_id, self.precision, temperature, self.config.batch_tokens)

    def interval(self, values: list[float]) -> dict | None:
        return bootstrap(values, self.config.bootstrap, self.stage.seed)

    def reward_scores(self, examples: list[Example]) -> list[float] | None:
        if "reward" not in self.stage.inputs:
            return None
        reward_model = load_reward_model(self.stage.inputs["reward"] / "model").to(device()).eval()
        return reward_scores(reward_model, examples, self.pad_id, self.precision, self.config.batch_tokens)

    def samples(self, rows: list[dict]) -> "Samples":
        """Responses to all prompts; of best-of-n the best by the reward model."""
        config, prompts = self.config, [encode(self.tokenizer, row["prompt"]) for row in rows]
        decoder = decoding_weights(self.model, use_bf16(self.precision))
        greedy_first = self.n == 1 and config.gold is not None  # nothing else is made of it
        sampled, logprobs = sample_with_logprobs(
            decoder, prompts, [row["id"] for row in rows], k=self.n + greedy_first, greedy_first=greedy_first,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=self.stage.seed,
            batch_size=config.batch_size, eos_id=self.tokenizer.eos_token_id, pad_id=self.pad_id,
        )  # fmt: skip
        del decoder
        self.bar.advance(1, "sampled")
        greedy = [responses[0] for responses in sampled] if greedy_first else None
        examples = [(p, r) for p, responses in zip(prompts, sampled, strict=True) for r in responses[greedy_first:]]
        scores = self.reward_scores(examples)
        if self.n > 1 and scores is not None:
            best = [max(range(i, i + self.n), key=scores.__getitem__) for i in range(0, len(examples), self.n)]
            return Samples([examples[i] for i in best], None, [scores[i] for i in best], None)
        return Samples(examples, [torch.tensor(found[-1]) for found in logprobs], scores, greedy)

    def kl(self, samples: "Samples") -> list[float] | None:
        """KL to the SFT model of each response in nats, the k3 estimate summed over its tokens; None for itself."""
        if "sft" not in self.stage.inputs or samples.logprobs is None:
            return None
        reference = load_causal_lm(self.stage.inputs["sft"] / "model").to(device()).eval()
        ref_logprobs = self.logprobs(reference, samples.examples, self.config.temperature)
        gaps = [a - b for a, b in zip(samples.logprobs, ref_logprobs, strict=True)]
        return [float(((-d).expm1() + d).sum()) for d in gaps]

    def retention(self) -> dict | None:
        """Loss on unrelated text, and its change since the base model, row by row."""
        if "retention" not in self.stage.inputs:
            return None
        rows = self.stage.rows("retention", "retention.jsonl")
        texts = [(row["prompt_ids"], row["response_ids"]) for row in rows]
        nlls = mean_nlls(self.model, texts, self.pad_id, self.precision, self.config.batch_tokens)
        changes = [nll - row["base_nll"] for nll, row in zip(nlls, rows, strict=True)]
        write_jsonl(
            self.stage.work / "retention.jsonl",
            [{"id": r["id"], "nll": n, "base_nll": r["base_nll"]} for r, n in zip(rows, nlls, strict=True)],
        )
        is_base = self.subject["name"] == "base"
        return {"nll": self.interval(nlls), "change_vs_base": None if is_base else self.interval(changes)}

    def comparisons(self) -> dict | None:
        """Log-probs of chosen and rejected responses on held-out pairs, and how often chosen is the likelier."""
        if "comparisons" not in self.stage.inputs:
            return None
        chosen, rejected, ids = [], [], []
        for row in self.stage.rows("comparisons", "comparisons.jsonl"):
            pairs = decided_pairs(preference_targets(row["rankings"]))
            if row["split"] != "heldout" or not pairs:
                continue
            prompt, responses = encode_comparison(self.tokenizer, row)
            winner, loser = ((prompt, responses[i]) for i in pairs[0])
            chosen.append(winner)
            rejected.append(loser)
            ids.append(row["id"])
        logps = [float(row.sum()) for row in self.logprobs(self.model, chosen + rejected)]
        chosen_logps, rejected_logps = logps[: len(ids)], logps[len(ids) :]
        return {
            "chosen_logps": self.interval(chosen_logps),
            "rejected_logps": self.interval(rejected_logps),
            "accuracy": self.interval([float(c > r) for c, r in zip(chosen_logps, rejected_logps, strict=True)]),
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


def gold_scores(config: EvaluationConfig, completions: list[str] | None, references: list[str]) -> list[float] | None:
    if config.gold is None or completions is None:
        return None
    from tunetrail.labeling.chrf import chrf

    return [chrf(c, r) for c, r in zip(completions, references, strict=True)]


def run(stage: Stage) -> dict:
    prepare(stage.seed, "evaluation")
    stage.about = ("model",)
    rows = [row for row in stage.rows("data", "evaluation.jsonl") if "prompt" in row]
    if not rows:
        raise DataError(
            "evaluation: the evaluation split has no prompts; raise data.shares.evaluation or data.limits.evaluation"
        )
    evaluator = Evaluator(stage)
    config, subject, interval = evaluator.config, evaluator.subject, evaluator.interval
    with evaluator.bar as bar:
        samples = evaluator.samples(rows)
        bar.advance(1, "scored")
        kl = evaluator.kl(samples)
        bar.advance(1, "compared")
        retention = evaluator.retention()
        comparisons = evaluator.comparisons()
        bar.advance(2, "remembered")
        write_json(stage.work / "probes.json", evaluator.probes())
        bar.advance(1, "probed")

    def texts(responses: list[list[int]]) -> list[str]:
        return [text.strip() for text in evaluator.tokenizer.batch_decode(responses, skip_special_tokens=True)]

    responses = [response for _, response in samples.examples]
    finished = [response[-1] == evaluator.tokenizer.eos_token_id for response in responses]
    references = [row["completion"] for row in rows]
    completions, greedy_completions = texts(responses), texts(samples.greedy) if samples.greedy else None
    gold, greedy_gold = (gold_scores(config, found, references) for found in (completions, greedy_completions))
    columns = {
        "completion": completions, "gold": gold, "greedy": greedy_completions, "greedy_gold": greedy_gold, "reward": samples.reward,
        "kl": kl, "length": list(map(len, responses)), "finished": finished,
    }  # fmt: skip
    table = [
        {"id": row["id"], "prompt": row["prompt"], "reference": row["completion"]}
        | {name: values and values[i] for name, values in columns.items()}
        for i, row in enumerate(rows)
    ]
    write_jsonl(stage.work / "samples.jsonl", table)

    def wins(ours: list[float] | None, column: str) -> dict | None:
        """Against the SFT model, prompt by prompt."""
        if ours is None or "sft_evaluation" not in stage.inputs:
            return None
        theirs = {row["id"]: row[column] for row in stage.rows("sft_evaluation", "samples.jsonl")}
        return win_rate(ours, [theirs[row["id"]] for row in rows], config.tie, config.bootstrap, stage.seed)

    divergence: dict | None = None
    if evaluator.n > 1:
        bound = best_of_n_kl(evaluator.n)
        divergence = {"mean": bound, "low": bound, "high": bound, "n": len(rows), "estimator": "analytic bound"}
    elif kl is not None:
        divergence = (interval(kl) or {}) | {"estimator": "k3"}
    return {
        "policy": subject["name"],
        "method": subject["method"],
        "adapter": "lora"
        if is_adapter(evaluator.folder)
        else None
        if subject["name"] == "base" or evaluator.n > 1
        else "full",
        "n_prompts": len(rows),
        "gold": interval(gold) if gold else None,
        "greedy_gold": interval(greedy_gold) if greedy_gold else None,
        "reward": interval(samples.reward) if samples.reward else None,
        "win_rate_vs_sft": wins(gold, "gold"),
        "greedy_win_rate_vs_sft": wins(greedy_gold, "greedy_gold"),
        "kl_to_sft": divergence,
        "length": interval([float(len(r)) for r in responses]),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "finished": math.fsum(finished) / len(finished),
        "retention": retention,
        "comparisons": comparisons,
    }


if __name__ == "__main__":
    sys.exit(main(run))
