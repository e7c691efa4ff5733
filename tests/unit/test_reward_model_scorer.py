"""The scorer `reward_model`: any classifier, used as published, and what it refuses."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from tunetrail.config.comparisons import SimulatedLabeler
from tunetrail.config.loading import check_files, parse
from tunetrail.contract.scorers import hub_scorers, own_scorers
from tunetrail.contract.stage import Attempt, Request, Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.labeling import simulated
from tunetrail.models.batching import token_batches
from tunetrail.models.loading import load_reward_model
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.ppo.scoring import scoring
from tunetrail.preferences.ranks import ranks_from_scores
from tunetrail.provenance.manifest import DigestCache
from tunetrail.scorers.build import Completion, build
from tunetrail.scorers.reward_model import encode
from tunetrail.stages.registry import stage_config

from .test_config import GOOD

MESSAGES = [{"role": "user", "content": "Hi"}]
PROMPT = "<|user|>Hi<|eos|><|assistant|>"
TEXTS = [("a", True), ("a much longer answer", True), ("bb", False), ("ccc", True)]


@pytest.fixture
def classifier(tmp_path):
    """A function (num_labels, chat template, **config) -> folder of a tiny sequence classifier."""

    def make(num_labels=1, pad_token_id=0, template=None, **extra):
        folder = tmp_path / f"classifier-{len(list(tmp_path.iterdir()))}"
        torch.manual_seed(0)
        shape = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 261,
        }
        options = {"num_labels": num_labels, "pad_token_id": pad_token_id, "max_position_embeddings": 64} | extra
        model = LlamaForSequenceClassification(LlamaConfig(**shape, **options))
        torch.nn.init.normal_(model.score.weight, std=3.0)
        model.save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def scorer(folder):
    return build("mine", {"mine": {"scorer": "reward_model", "path": str(folder)}})


def completions(prompt=PROMPT, texts=TEXTS, row_id="r0"):
    row = {"id": row_id, "messages": MESSAGES}
    return [Completion(prompt, text, None, row, finished) for text, finished in texts]


@torch.no_grad()
def logits_of(folder, texts: list[str]) -> np.ndarray:
    """[n, labels]: unpadded forward passes."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer()
    return np.array([model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].tolist() for text in texts])


def rendered(prompt=PROMPT) -> list[str]:
    return [prompt + text + ("<|eos|>" if finished else "") for text, finished in TEXTS]


@pytest.mark.parametrize("pad", [0, None])
def test_scores_equal_the_models_own_forward_with_and_without_padding(classifier, pad):
    folder = classifier(pad_token_id=pad)
    expected = logits_of(folder, rendered())[:, 0]
    assert scorer(folder).scores(completions()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(np.round(expected, 3))) == len(TEXTS)


def test_it_uses_its_own_template_and_not_the_policys(classifier):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eos|>\n{% endfor %}"
    folder = classifier(template=template)
    own = ["[user]Hi<|eos|>\n[assistant]" + text + ("<|eos|>\n" if ended else "") for text, ended in TEXTS]
    found = scorer(folder).scores(completions())
    assert found == pytest.approx(logits_of(folder, own)[:, 0].tolist(), abs=1e-5)
    assert found != pytest.approx(logits_of(folder, rendered())[:, 0].tolist(), abs=1e-2)
    plain = scorer(folder).scores(completions(prompt="Hi"))  # data.chat: false
    assert plain == pytest.approx(logits_of(folder, rendered("Hi"))[:, 0].tolist(), abs=1e-5)


def test_with_two_labels_the_score_is_their_difference(classifier):
    folder = classifier(num_labels=2)
    logits = logits_of(folder, rendered())
    expected = (logits[:, 1] - logits[:, 0]).tolist()
    assert scorer(folder).scores(completions()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("config", [
    {"reward_bias": 0.25, "reward_pooling": "mean"},
    {"reward_bias": 0.25, "reward_pooling": "last"},
    {"reward_bias": 1},
])  # fmt: skip
def test_a_model_of_this_pipeline_is_scored_as_in_the_pipeline(classifier, config):
    folder = classifier(**config)
    model, tokenizer = load_reward_model(folder).eval(), tiny_tokenizer()
    prompt, expected = tokenizer(PROMPT)["input_ids"], []
    for text, finished in TEXTS:
        ids = prompt + tokenizer(text + ("<|eos|>" if finished else ""))["input_ids"]
        with torch.no_grad():
            states = model.model(torch.tensor([ids])).last_hidden_state[0, len(prompt) :]
        scores = model.score(states)[:, 0].tolist()
        pooled = np.mean(scores) if config.get("reward_pooling") == "mean" else scores[-1]
        expected.append(pooled - config["reward_bias"])
    assert scorer(folder).scores(completions()) == pytest.approx(expected, abs=1e-5)


def test_labelers_ppo_and_sums_use_it(classifier, tmp_path):
    folder = classifier()
    definitions = {
        "mine": {"scorer": "reward_model", "path": str(folder)},
        "both": {"scorer": "sum", "of": {"mine": 2.0, "length": -0.5}},
    }
    expected = logits_of(folder, rendered())[:, 0].tolist()
    stage = Stage(
        Request("comparisons", {}, {"seed": 0, "scorers": definitions}, tmp_path / "out"),
        {},
        Attempt(tmp_path, tmp_path, None),  # type: ignore[arg-type]
    )
    row = {
        "id": "r0", "group": "r0", "split": "reward", "prompt": PROMPT, "messages": MESSAGES, "reference": None,
        "completions": [text for text, _ in TEXTS], "finished": [finished for _, finished in TEXTS],
    }  # fmt: skip

    def ranking(**options):
        config = SimulatedLabeler(labeler="simulated", scorer="mine", **options)
        return simulated.rank([row], config, stage).rankings[0]  # type: ignore[list-item]

    (first,) = ranking()
    assert first["scores"] == pytest.approx(expected, abs=1e-5)
    assert first["ranks"] == ranks_from_scores(expected)
    assert ranking(tie=1e6)[0]["ranks"] == [1, 1, 1, 1]
    noisy = ranking(labelers=2, noise=50.0)
    assert noisy[0]["scores"] != noisy[1]["scores"]

    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text + ("<|eos|>" if finished else ""))["input_ids"] for text, finished in TEXTS]
    both = scoring(build("both", definitions), [row], tokenizer)([0] * len(ids), ids)
    words = [len(text.split()) for text, _ in TEXTS]
    assert both == pytest.approx([2 * e - 0.5 * n for e, n in zip(expected, words, strict=True)], abs=1e-4)


def test_batches_keep_order_and_size():
    sequences = [[5] * length for length in (9, 3, 10, 30)]
    assert list(token_batches(sequences, [[]] * 4, 20)) == [[1, 0], [2], [3]]
    assert list(token_batches(sequences[:2], [[]] * 2, 0)) == [
        [1],
        [0],
    ]  # a model that cannot pad gets one text at a time


def test_bos_is_encoded_once():
    class Tokenizer:
        bos_token, eos_token, chat_template = "<s>", "</s>", None

        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": (["<s>"] if add_special_tokens else []) + [text]}

    assert encode(Tokenizer(), Completion("<s>Q", "a", None, {})) == ["<s>Qa</s>"]
    assert encode(Tokenizer(), Completion("Q", "a", None, {}, finished=False)) == ["<s>", "Qa"]


def test_the_error_for_a_model_that_cannot_score_is_one_line(classifier, tmp_path):
    language_model, empty, broken = tmp_path / "lm", tmp_path / "empty", classifier()
    tiny_model(16, 1, 2, 261, seed=0).save_pretrained(language_model)
    tiny_tokenizer().save_pretrained(language_model)
    empty.mkdir()
    model = LlamaForSequenceClassification.from_pretrained(broken)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(broken)
    long = completions(texts=[("a", True), ("b" * 70, True)], row_id="long-one")
    for folder, asked, message in (
        (language_model, completions(), r"scorers.mine: .*lm holds no trained score.weight; give a sequence-class"),
        (classifier(num_labels=3), completions(), "has 3 labels; a reward model has 1 or 2"),
        (empty, completions(), "scorers.mine: cannot load .*empty as a sequence-classification model: "),
        (broken, completions(), "scores a completion of row r0 nan; the model is broken"),
        (classifier(), long, r"1 of 2 completions have more .* reads \(64\), first that of row long-one \(76\)"),
    ):
        with pytest.raises(DataError, match=message) as error:
            scorer(folder).scores(asked)
        assert "\n" not in str(error.value)


def test_changed_weights_cause_reruns_and_are_refused_until_then(classifier, tmp_path):
    folder = classifier()
    scorers = {"mine": {"scorer": "reward_model", "path": str(folder), "licence": "MIT"}}
    raw = GOOD | {"scorers": scorers, "evaluation": {"gold": ["chrf", "mine"]}}
    raw["policies"] = {"p": {"method": "ppo", "steps": 1, "reward": {"mine": 1}, "missing_eos_score": -9}}
    config = parse(raw, "c.yaml")
    check_files(config)
    names = ("evaluation.base", "policies.p")
    before = [stage_config(config, name)["scorers"]["mine"] for name in names]
    assert before[0] == before[1]
    (found,) = own_scorers({"mine": before[0]}, DigestCache(None))
    assert found["digest"]["sha256"] == before[0]["sha256"]
    assert found["annotations"]["licence"] == "MIT"
    assert any(path.endswith("model.safetensors") for path in found["annotations"]["files"])

    model = LlamaForSequenceClassification.from_pretrained(folder)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(folder)
    assert stage_config(config, names[0])["scorers"]["mine"]["sha256"] != before[0]["sha256"]
    with pytest.raises(DataError, match=r"scorers.mine: .* differs from what it was when this run was planned; run"):
        own_scorers({"mine": before[0]}, DigestCache(None))


def test_a_model_from_the_hub_is_in_the_record_by_its_revision():
    scorers = {"mine": {"scorer": "reward_model", "repo": "a/b", "revision": "v1", "licence": None, "path": None}}
    assert own_scorers(scorers, DigestCache(None)) == []
    (found,) = hub_scorers(scorers)
    assert found["uri"] == "pkg:huggingface/a/b@v1"


@pytest.mark.parametrize(("changes", "message"), [
    ({"scorers": {"a": {"scorer": "reward_model"}}}, r"scorers.a: give either path \(a local folder\) or repo"),
    ({"scorers": {"a": {"scorer": "reward_model", "repo": "a/b"}}}, r"scorers.a: revision is needed with repo"),
    ({"scorers": {"a": {"scorer": "reward_model", "path": "x", "revision": "v1"}}}, r"revision goes with repo; remove"),
    ({"comparisons": {"labeler": "reward_model", "path": "x"}},
     r"comparisons.labeler: reward_model is now a scorer: name one under scorers, .* `labeler: simulated`"),
])  # fmt: skip
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(GOOD | changes, "c.yaml")
    assert "\n" not in str(error.value)


def test_a_scorer_in_a_file_is_no_model(tmp_path):
    (tmp_path / "file").write_text("")
    config = parse(GOOD | {"scorers": {"a": {"scorer": "reward_model", "path": str(tmp_path / "file")}}}, "c.yaml")
    with pytest.raises(ConfigError, match=r"scorers.a.path: must be a folder, not a file"):
        check_files(config, "c.yaml")
