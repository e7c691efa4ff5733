"""Attention by plain products gives the same values and gradients as torch's fused attention."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tunetrail.models.cpu.attention import LONGEST, PLAIN, attention, plain_attention, product_attention
from tunetrail.models.sampling import PackedLinear, can_pack, decoding_weights
from tunetrail.models.tiny import tiny_model
from tunetrail.models.tree import share_prefixes, shares_prefixes


class Layer(torch.nn.Module):
    """The layer that transformers passes to attention."""

    is_causal = True
    num_key_value_groups = 3


def parts(t: int, s: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 6, t, 8), (2, 2, s, 8), (2, 2, s, 8))
    return tuple(torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes)


def test_two_tokens_by_hand():
    query = key = torch.tensor([[[[0.0], [1.0]]]])
    value = torch.tensor([[[[1.0], [3.0]]]])
    seen = torch.tensor([[True, False], [True, True]])[None, None]
    found = product_attention(query, key, value, seen, 2.0)
    share = torch.tensor(2.0).sigmoid()  # scores of the second token: 0 and 2
    torch.testing.assert_close(found.flatten(), torch.stack([torch.tensor(1.0), 1 + 2 * share]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("t", "s"), [(5, 5), (3, 7)])
def test_values_and_gradients_are_those_of_the_fused_attention(t, s, masked):
    seen = (torch.rand(2, 1, t, s, generator=torch.Generator().manual_seed(1)) < 0.6) | torch.eye(t, s).bool()
    mask = seen if masked or t != s else None  # without a mask: causal
    found = []
    for function in (attention, sdpa_attention_forward):
        inputs = parts(t, s)
        output, _ = function(Layer(), *inputs, mask, scaling=0.3)
        (output**2).sum().backward()
        found.append((output.detach(), *(x.grad for x in inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_token_that_attends_to_nothing_affects_no_other():
    """As left padding of a prompt, whose rows are not used."""
    query, key, value = parts(4, 4)
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    seen[0, :, :2] = False
    found = product_attention(query, key, value, seen, 0.3)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :, 0], value[0].mean(1).repeat_interleave(3, 0))


@pytest.mark.parametrize(
    ("t", "s", "options"),
    [(1, 9, {}), (4, LONGEST + 1, {}), (4, 4, {"dropout": 0.5}), (4, 4, {"is_causal": False})],
)
def test_other_cases_are_left_to_the_fused_attention(monkeypatch, t, s, options):
    asked = []
    monkeypatch.setattr(
        "tunetrail.models.cpu.attention.sdpa_attention_forward", lambda *a, **k: asked.append(k) or (0, None)
    )
    attention(Layer(), *parts(t, s), None, scaling=0.3, **options)
    assert len(asked) == 1
    assert options.items() <= asked[0].items()


def test_a_model_gives_the_same_log_probs():
    fused, plain = (tiny_model(48, 2, 4, 300, seed=0) for _ in range(2))
    share_prefixes(plain_attention(plain))
    assert plain.config._attn_implementation == PLAIN
    assert shares_prefixes(plain)
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for seen in (None, mask):
        places = torch.ones_like(ids).bool() if seen is None else seen.bool()
        logits = [model(input_ids=ids, attention_mask=seen, use_cache=False).logits[places] for model in (fused, plain)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not can_pack(), reason="this processor has no packed bf16 products")
def test_packed_weights_give_the_same_products():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 300, dtype=torch.bfloat16)
    x = torch.randn(5, 3, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=0, rtol=2**-7)


def test_a_decoder_in_bf16_leaves_the_model_unchanged():
    model = tiny_model(48, 2, 4, 300, seed=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    decoder = decoding_weights(model, bf16=True)
    assert type(decoder.lm_head) is (PackedLinear if can_pack() else torch.nn.Linear)
    assert type(model.lm_head) is torch.nn.Linear
    assert all(
        weight.dtype == torch.float32 and weight.equal(before[name]) for name, weight in model.state_dict().items()
    )
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        gap = decoder(input_ids=ids).logits.float() - model(input_ids=ids).logits
    assert gap.norm() < 0.02 * model(input_ids=ids).logits.norm()
