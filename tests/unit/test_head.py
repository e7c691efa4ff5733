"""Log-probs from the head in chunks against the softmax of the model's own logits, values and gradients."""

import copy

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tunetrail.models.batching import collate
from tunetrail.models.head import (
    head_logprobs,
    head_weight,
    mark_plain_head,
    narrow_products,
)
from tunetrail.models.loading import with_full_precision_head
from tunetrail.models.scoring import comparable_logprobs, policy_pass, sequence_scores

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
BATCH = collate([[5, 6, 7, 8], [9, 10]], [[11, 12, 2], [13, 14, 15, 16, 2]], 0)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | {"tie_word_embeddings": True} | changes))).eval()
    with torch.no_grad():  # weights of 1 and small scores would hide errors
        for name, p in model.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else torch.randn_like(p) * 0.3)
    return model


def values_and_gradients(function, *inputs):
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = function(*inputs)
    torch.manual_seed(1)
    return output, *torch.autograd.grad(
        (output * torch.randn_like(output)).sum(), [x for x in inputs if x.requires_grad]
    )


def assert_alike(ours, plain, *inputs):
    for a, b in zip(values_and_gradients(ours, *inputs), values_and_gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_logprobs_are_those_of_a_softmax_over_all_chunks(temperature, monkeypatch):
    monkeypatch.setattr("tunetrail.models.head.SCORED_AT_ONCE", 3)
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(8, 4), torch.randn(20, 4), torch.randint(20, (8,))

    def plain(x, w):
        return ((x @ w.T) / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    assert_alike(lambda x, w: head_logprobs(x, w, tokens, temperature)[0], plain, hidden, weight)
    _, entropy = head_logprobs(hidden, weight, tokens, temperature, with_entropy=True)
    expected = torch.distributions.Categorical(logits=hidden @ weight.T / temperature).entropy()
    torch.testing.assert_close(entropy, expected)


def test_an_almost_certain_token_keeps_its_gradient_in_bf16():
    hidden = torch.tensor([[9.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head_logprobs(hidden, weight, torch.tensor([0]))[0].sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[1 - torch.sigmoid(torch.tensor(9.0))]]), rtol=2e-2, atol=0)


def passes(model, bf16):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logprobs = policy_pass(model, BATCH, 0.8)[0]
    logprobs.sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.1)])
def test_chunked_log_probs_are_those_of_the_models_logits(bf16, tolerance):
    chunked = mark_plain_head(llama())
    assert head_weight(chunked) is not None
    assert head_weight(llama()) is None
    found, gradients = passes(chunked, bf16)
    expected, expected_gradients = passes(llama(), False)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= tolerance * expected_gradients[name].norm(), name


def test_comparable_log_probs_use_a_float32_head_under_autocast():
    model = mark_plain_head(llama())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, coarse = comparable_logprobs(model, BATCH), policy_pass(model, BATCH, 1.0)[0]
        hidden = model.base_model(**BATCH.inputs).last_hidden_state[:, -BATCH.response_mask.shape[1] - 1 : -1]
    logits = hidden.float() @ model.get_output_embeddings().weight.T
    expected = (
        logits.log_softmax(-1).gather(-1, BATCH.responses[..., None])[..., 0].masked_fill(~BATCH.response_mask, 0)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(coarse, expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_a_plain_product_is_left_to_the_model():
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    expected = policy_pass(copy.deepcopy(model), BATCH, 1.0)[0]
    assert head_weight(mark_plain_head(model)) is None
    torch.testing.assert_close(policy_pass(model, BATCH, 1.0)[0], expected)


def test_narrow_products_change_no_score_under_autocast():
    torch.manual_seed(0)
    plain = with_full_precision_head(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval())
    narrow = narrow_products(copy.deepcopy(plain), torch.bfloat16)
    assert narrow.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert narrow.score.weight.dtype == narrow.model.embed_tokens.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sequence_scores(narrow, BATCH), sequence_scores(plain, BATCH), atol=0, rtol=0)
