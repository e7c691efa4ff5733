"""The fused parts of a trunk against the plain formulas and transformers' own layers, values and gradients."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tunetrail.models.batching import collate
from tunetrail.models.fused import (
    fuse,
    head_logprobs,
    head_weight,
    narrow_products,
    pack,
    rms_norm,
    rotary_attention,
    swiglu,
)
from tunetrail.models.loading import with_full_precision_head
from tunetrail.models.scoring import policy_pass, sequence_scores

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


def test_rms_norm_is_the_formula():
    def plain(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-2).rsqrt() * weight

    assert_alike(lambda x, w: rms_norm(x, w, 1e-2, torch.float32), plain, torch.randn(2, 3, 8), torch.randn(8))


def test_swiglu_is_the_formula():
    assert_alike(swiglu, lambda g, u: g * g.sigmoid() * u, torch.randn(3, 8), torch.randn(3, 8))


def test_attention_is_that_of_repeated_heads_after_rotation():
    torch.manual_seed(0)
    b, t, h, k, d = 2, 5, 4, 2, 6
    angles = torch.rand(b, t, d // 2).repeat(1, 1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    mask = torch.ones(t, t, dtype=torch.bool).tril().repeat(b, 1, 1, 1)
    mask[1, 0, 1:, 0] = False

    def turn(x):
        turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    def plain(q, key, v):
        q, key = turn(q), turn(key)
        key, v = (x.repeat_interleave(h // k, 2) for x in (key, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, key) * 0.7
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, t, h * d)

    inputs = torch.randn(b, t, h, d), torch.randn(b, t, k, d), torch.randn(b, t, k, d)
    assert_alike(lambda q, key, v: rotary_attention(q, key, v, cos, sin, mask, 0.7), plain, *inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_logprobs_are_those_of_a_softmax_over_all_chunks(temperature, monkeypatch):
    monkeypatch.setattr("tunetrail.models.fused.SCORED_AT_ONCE", 3)
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(8, 4), torch.randn(20, 4), torch.randint(20, (8,))

    def plain(x, w):
        return ((x @ w.T) / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    assert_alike(lambda x, w: head_logprobs(x, w, tokens, temperature)[0], plain, hidden, weight)
    _, entropy = head_logprobs(hidden, weight, tokens, temperature, with_entropy=True)
    expected = torch.distributions.Categorical(logits=hidden @ weight.T / temperature).entropy()
    torch.testing.assert_close(entropy, expected)


def test_a_token_that_is_almost_certain_keeps_its_gradient_in_bf16():
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
def test_a_fused_model_is_the_plain_one(bf16, tolerance):
    fused = fuse(llama())
    assert type(fused.model.layers[0].mlp) is not type(llama().model.layers[0].mlp)
    assert type(fused.model.layers[0].self_attn) is not type(llama().model.layers[0].self_attn)
    assert head_weight(fused) is not None
    assert head_weight(llama()) is None
    found, gradients = passes(fused, bf16)
    expected, expected_gradients = passes(llama(), False)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= tolerance * expected_gradients[name].norm(), name


def test_logits_that_are_more_than_a_product_are_left_to_the_model():
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    expected = policy_pass(copy.deepcopy(model), BATCH, 1.0)[0]
    assert head_weight(fuse(model)) is None
    torch.testing.assert_close(policy_pass(model, BATCH, 1.0)[0], expected)


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
        lambda: llama(attention_bias=True, mlp_bias=True),
        lambda: llama(hidden_act="gelu"),
        lambda: llama(num_key_value_heads=4, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    ],
    ids=["gpt2", "biases", "gelu", "rope"],
)
def test_other_models_say_the_same_as_before(model):
    model = model().eval()
    plain, fused = copy.deepcopy(model), fuse(model)
    torch.testing.assert_close(passes(fused, False)[0], passes(plain, False)[0], atol=1e-4, rtol=1e-4)
    expected = passes(plain, True)[0]
    assert (passes(fused, True)[0] - expected).norm() <= 5e-2 * expected.norm()


def test_a_trunk_with_an_unknown_part_between_is_left_as_it_was():
    model = llama()
    attention = type(model.model.layers[0].self_attn)
    odd = type("OddAttention", (attention,), {"forward": lambda self, **kw: (attention.forward(self, **kw)[0] * 2, None)})  # fmt: skip
    for layer in model.model.layers:
        layer.self_attn.__class__ = odd
    fuse(model)
    assert all(type(layer.self_attn) is odd for layer in model.model.layers)


def test_narrow_products_change_no_score_under_autocast():
    torch.manual_seed(0)
    plain = with_full_precision_head(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval())
    narrow = narrow_products(copy.deepcopy(plain), torch.bfloat16)
    assert narrow.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert narrow.score.weight.dtype == narrow.model.embed_tokens.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sequence_scores(narrow, BATCH), sequence_scores(plain, BATCH), atol=0, rtol=0)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="weights are packed on CPUs with bf16 only")
def test_packed_weights_give_the_same_logits():
    model = fuse(llama()).to(torch.bfloat16)
    packed = pack(copy.deepcopy(model))
    assert not isinstance(packed.lm_head, torch.nn.Linear)
    with torch.inference_mode():
        expected, found = (m(BATCH.input_ids, use_cache=True).logits.float() for m in (model, packed))
    assert (found - expected).norm() <= 1e-2 * expected.norm()
