"""Prefix trees: common prefixes are computed once, without changing any value or gradient."""

import copy
import random
import weakref
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tunetrail.config.training import Lora
from tunetrail.models.batching import collate
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.loading import with_lora
from tunetrail.models.scoring import response_logprobs, response_values, reward_pooling, sequence_scores
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.models.tree import prefix_tree, share_prefixes, without_sharing
from tunetrail.reward.kwise import KWiseCollator, initialise, kwise_scores

PAD, VOCABULARY = 0, 30
START = [5, 6, 7, 8]
PROMPTS = [[*START, 9], [*START, 9], [*START, 9, 10, 11], START, [12, 13]]
RESPONSES = [[14, 15, 1], [14, 16], [17], [9, 10, 1], [18]]
BATCH = collate(PROMPTS, RESPONSES, PAD)


def llama(seed=0):
    return tiny_model(16, 2, 2, VOCABULARY, seed=seed).eval()


@contextmanager
def tokens_computed(model):
    """Counts the tokens that go through the embedding."""
    counted = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: counted.append(args[0].numel()))
    yield counted
    hook.remove()


def test_a_tree_by_hand():
    tree = prefix_tree([[5, 7], [5, 6, 8], [5, 6], [9]])
    # sorted: [5,6] [5,6,8] [5,7] [9]
    assert tree.input_ids.tolist() == [[5, 6, 8, 7, 9]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 1, 0]]
    assert tree.places == [[0, 3], [0, 1, 2], [0, 1], [4]]
    assert tree.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("row_tokens", [1, 12, 40, 1000])
def test_every_token_attends_only_to_its_own_sequence(row_tokens):
    rng = random.Random(row_tokens)
    sequences = [[rng.choice([1, 1, 1, 2]) for _ in range(rng.randint(1, 15))] for _ in range(40)]
    tree = prefix_tree(sequences, row_tokens)
    rows, length = tree.input_ids.shape
    assert length <= max(row_tokens, max(map(len, sequences)))
    assert rows * length <= sum(map(len, sequences))
    ids, positions = tree.input_ids.flatten(), tree.position_ids.flatten()
    for sequence, places in zip(sequences, tree.places, strict=True):
        assert ids[places].tolist() == sequence
        assert positions[places].tolist() == list(range(len(sequence)))
        for depth, place in enumerate(places):
            seen = tree.attention_mask[place // length, 0, place % length].nonzero()[:, 0] + place // length * length
            assert sorted(seen.tolist()) == sorted(places[: depth + 1])


def test_rows_have_similar_lengths():
    sequences = [[n, *range(9)] for n in range(9)]
    assert prefix_tree(sequences, row_tokens=80).input_ids.shape == (2, 50)  # not 80 and 10


@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_sharing_changes_no_value_and_no_gradient(side):
    joined = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    empty = [[]] * len(joined)
    right = collate([ids[:1] for ids in joined], [ids[1:] for ids in joined], PAD)
    batch = {"both": BATCH, "left": collate(joined, empty, PAD), "right": right}[side]
    classifier = initialise(llama(), seed=1).eval()
    results = []
    for shared in (False, True):
        found = []
        for function, model in (
            (response_logprobs, llama()),
            (sequence_scores, copy.deepcopy(classifier)),
            (sequence_scores, initialise(llama(), seed=1, pooling="mean").eval()),
            (response_values, copy.deepcopy(classifier)),
        ):
            if shared:
                share_prefixes(model)
            else:
                without_sharing(model)
            # There is no response.
            if side == "left" and (function is not sequence_scores or reward_pooling(model) == "mean"):
                continue
            with tokens_computed(model) as counted:
                values = function(model, batch)
            if values.dim() == 2:
                values = values * batch.response_mask  # values on padding do not matter
            assert (counted[0] < batch.input_ids.numel()) == shared
            (values * torch.linspace(1, 2, values.numel()).view_as(values)).sum().backward()
            found += [values.detach()] + [p.grad for p in model.parameters() if p.grad is not None]
        results.append(found)
    for plain, tree in zip(*results, strict=True):
        torch.testing.assert_close(tree, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_trainers_share_prefixes_too(lora, tmp_path):
    """Through the whole models that the trainers call, which pass additional arguments to their trunks."""
    examples = [
        {"prompt": p, "responses": [[9, 1], [10, 1]], "targets": torch.full((2, 2), 0.5).tolist()} for p in PROMPTS
    ]
    classifier = initialise(llama(), seed=1)
    classifier.config.pad_token_id = PAD
    classifier = with_lora(classifier, lora, seed=0, extra_modules=["score"])
    comparisons = KWiseCollator(PAD)(examples)
    with tokens_computed(classifier) as counted:
        kwise_scores(classifier, comparisons)
    assert counted[0] < comparisons["input_ids"].numel()

    trainer = SFTTrainer(
        model=with_lora(share_prefixes(llama()), lora, seed=0),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[],
            dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    score_labels_only(trainer.model)
    ids = collate([[]] * 4, [[*START, *START, 9 + i, 1] for i in range(4)], PAD).input_ids
    labels = ids.clone()
    labels[:, :8] = -100
    with tokens_computed(trainer.model) as counted:
        trainer.compute_loss(
            trainer.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        )
    assert counted[0] < ids.numel()


def test_an_adapter_added_later_works_and_can_be_switched_off():
    model = with_lora(share_prefixes(llama()), Lora(r=4), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shared = response_logprobs(model, BATCH)
        with model.disable_adapter():
            without = response_logprobs(model, BATCH)
        without_sharing(model.get_base_model())
        torch.testing.assert_close(shared, response_logprobs(model, BATCH), atol=1e-5, rtol=0)
        torch.testing.assert_close(without, response_logprobs(llama(), BATCH), atol=1e-5, rtol=0)
    assert (shared - without).abs().max() > 1e-3


def test_a_copy_runs_its_own_weights():
    model = share_prefixes(llama())
    other = copy.deepcopy(model)
    other.load_state_dict(llama(seed=1).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(response_logprobs(other, BATCH), response_logprobs(llama(1), BATCH))
        torch.testing.assert_close(response_logprobs(model, BATCH), response_logprobs(llama(0), BATCH))


def test_an_unused_model_is_freed_at_once():
    model = share_prefixes(llama())
    trunk = weakref.ref(model.base_model)
    del model
    assert trunk() is None


def test_no_tree_is_built_that_saves_too_little():
    assert prefix_tree([[1, 2], [3, 4]], worth=3.6) is None
    assert prefix_tree([[1, 2], [1, 4]], worth=3.6).input_ids.tolist() == [[1, 2, 4]]


def mistral(window, attention="sdpa"):
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCABULARY, sliding_window=window, pad_token_id=PAD, attn_implementation=attention,
        )
    )  # fmt: skip


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=VOCABULARY))


def granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(
        GraniteConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCABULARY, logits_scaling=8.0, embedding_multiplier=3.0, pad_token_id=PAD,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shares"),
    [
        (llama, True),
        (granite, True),
        (lambda: mistral(None), True),
        (lambda: mistral(3), False),
        (lambda: mistral(4096), False),
        (lambda: mistral(None, "eager"), False),
        (bloom, False),
    ],
)
def test_other_architectures_share_only_where_it_changes_nothing(make, shares):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        expected = response_logprobs(model, BATCH)
        share_prefixes(model)
        with tokens_computed(model) as counted:
            found = response_logprobs(model, BATCH)
    assert (counted[0] < BATCH.input_ids.numel()) == shares
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": True},
        {"position_ids": BATCH.position_ids + 3},
        {"position_ids": None},  # positions then count columns, while prompts are padded on the left
        {"input_ids": torch.arange(5)[:, None] + torch.arange(10), "attention_mask": None, "position_ids": None},
    ],
)
def test_requests_that_a_tree_cannot_serve_run_without_one(change):
    inputs = BATCH.inputs | change
    expected = llama()(**inputs)
    model = share_prefixes(llama())
    with tokens_computed(model) as counted:
        found = model(**inputs)
    assert counted == [inputs["input_ids"].numel()]
    torch.testing.assert_close(found.logits, expected.logits)
    assert (found.past_key_values is None) == (expected.past_key_values is None)
