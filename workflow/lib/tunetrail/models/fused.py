"""Parts of a Llama-like trunk computed as a whole on a CPU: norms, rotary attention, and log-probs from its head.

Between the matrix products of a layer stand some twenty steps on whole activations. On a CPU with fast products these,
and what autograd keeps of each, cost more than the arithmetic does (`make bench`). Here each part is one function with
a gradient of its own, which keeps what that needs and nothing else. The numbers are those of transformers' layers up to
rounding: `fuse` tries a model before it believes so.
"""

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

MATERIALIZED_COLUMNS = 512
"""Of attention: longer sequences would keep too many weights [T, T], and run transformers' way."""
SCORED_AT_ONCE = 512
"""Rows of the vocabulary's logits that are held at once."""


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """That of matrix products here: autocast's where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ----------------------------------------------------------------------------- products


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b: [N, m], [N, n] -> [m, n]; a in bf16 is laid out anew first, which products in it are faster with."""
    return (a.T.contiguous() if a.dtype == torch.bfloat16 else a.T) @ b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with _no_autocast(x.device):
            x, w = x.to(dtype), weight.to(dtype)
            ctx.save_for_backward(x, w)
            return torch.nn.functional.linear(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        with _no_autocast(x.device):
            grad_x = grad @ w if ctx.needs_input_grad[0] else None
            grad_w = transposed_product(grad.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


# ----------------------------------------------------------------------------- norm


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        with _no_autocast(x.device):
            wide = x.float()
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            ctx.save_for_backward(x, weight, scale)
            return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        with _no_autocast(x.device):
            normed = x.float() * scale
            grad = grad.float()
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad = grad * weight
            along = (grad * normed).mean(-1, keepdim=True)
            return grad.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x over its root mean square, times weight: [..., d], [d] -> [..., d] in `dtype`, computed in float32."""
    return _RmsNorm.apply(x, weight, eps, dtype)


# ----------------------------------------------------------------------------- attention


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """x and out [..., d], cos and sin as wide: x turned by its position's angles, times scale, written to out."""
    (x1, x2), (c1, c2), (s1, s2) = x.float().chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1)
    half = x.shape[-1] // 2
    out[..., :half] = (x1 * c1).addcmul_(x2, s1, value=-1).mul_(scale)
    out[..., half:] = (x2 * c2).addcmul_(x1, s2).mul_(scale)
    return out


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        mask: torch.Tensor, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        b, t, h, d = query.shape
        k = key.shape[2]
        with _no_autocast(query.device):
            cos, sin = cos.float()[:, None, None], sin.float()[:, None, None]  # [1 or B, 1, 1, T, d]
            q = _rotated(
                query.view(b, t, k, h // k, d).permute(0, 2, 3, 1, 4), cos, sin, scaling,
                query.new_empty(b, k, h // k, t, d),
            ).flatten(2, 3)  # fmt: skip
            rotated = _rotated(key[:, :, :, None].permute(0, 2, 3, 1, 4), cos, sin, 1.0, key.new_empty(b, k, 1, t, d))
            rotated, v = rotated[:, :, 0], value.transpose(1, 2).contiguous()
            scores = (q @ rotated.transpose(2, 3)).view(b, h, t, t)
            weights = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min).softmax(-1)
            ctx.save_for_backward(q, rotated, v, weights, cos, sin)
            ctx.scaling = scaling
            return (weights.view(b, k, -1, t) @ v).view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, key, v, weights, cos, sin = ctx.saved_tensors
        b, h, t, _ = weights.shape
        k, d = v.shape[1], v.shape[3]
        with _no_autocast(grad.device):
            grad = grad.view(b, t, h, d).transpose(1, 2).reshape(b, k, -1, d)
            weights = weights.view(b, k, -1, t)
            grad_v = (weights.transpose(2, 3) @ grad).transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad @ v.transpose(2, 3), weights, -1, weights.dtype)
            grad_q = _turned_back(
                (grad_scores @ key).view(b, k, -1, t, d), cos, sin, ctx.scaling, q.new_empty(b, t, k, h // k, d)
            )
            grad_k = _turned_back(
                (grad_scores.transpose(2, 3) @ q).view(b, k, 1, t, d), cos, sin, 1.0, q.new_empty(b, t, k, 1, d)
            )
        return grad_q.view(b, t, h, d), grad_k.view(b, t, k, d), grad_v, None, None, None, None


def _turned_back(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """The gradient of `_rotated`: grad [B, K, R, T, d] -> out [B, T, K, R, d]."""
    (g1, g2), (c1, c2), (s1, s2) = grad.float().chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1)
    half, target = grad.shape[-1] // 2, out.permute(0, 2, 3, 1, 4)
    target[..., :half] = (g1 * c1).addcmul_(g2, s2).mul_(scale)
    target[..., half:] = (g2 * c2).addcmul_(g1, s1, value=-1).mul_(scale)
    return out


def rotary_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    mask: torch.Tensor, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of h heads over k <= h heads of keys and values, which are not repeated, after rotating by position.

    Args:
        query: [B, T, h, d], before the rotation; `key` and `value`: [B, T, k, d].
        cos, sin: [1 or B, T, d].
        mask: [1 or B, 1, T, T] bool, True where token i may see token j.

    Returns:
        [B, T, h * d]
    """
    return _RotaryAttention.apply(query, key, value, cos, sin, mask, scaling)


# ----------------------------------------------------------------------------- gated unit


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), torch.nn.functional.silu(gate).mul_(grad)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020), all of one shape; silu is computed again for the gradient, and not kept."""
    return _Swiglu.apply(gate, up)


# ----------------------------------------------------------------------------- log-probs


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        ctx.dtype, ctx.temperature = compute_dtype(hidden), temperature
        with _no_autocast(hidden.device):
            narrow, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            logprobs, entropies = [], []
            for x, y in zip(narrow.split(SCORED_AT_ONCE), tokens.split(SCORED_AT_ONCE), strict=True):
                logits = x @ w.T
                log_p = (logits.float().div_(temperature) if temperature != 1 else logits).log_softmax(
                    -1, torch.float32
                )
                logprobs.append(log_p.gather(1, y[:, None])[:, 0])
                if with_entropy:
                    entropies.append(-torch.linalg.vecdot(log_p.exp(), log_p))
            found = torch.cat(logprobs)
            ctx.save_for_backward(narrow, weight, tokens, found)
            entropy = torch.cat(entropies) if with_entropy else None
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, tokens, logprobs = ctx.saved_tensors
        with _no_autocast(hidden.device):
            w = weight.to(ctx.dtype)
            grad = grad / ctx.temperature
            grad_hidden = torch.empty_like(hidden)
            grad_weight = None
            for start in range(0, len(hidden), SCORED_AT_ONCE):
                part = slice(start, start + SCORED_AT_ONCE)
                logits = hidden[part] @ w.T
                if ctx.temperature != 1:
                    logits = logits.float().div_(ctx.temperature)
                p = logits.softmax(-1).mul_(-grad[part, None])
                # Of the tokens themselves 1 - p, exactly: where p is close to 1 bf16 would lose it.
                p.scatter_(1, tokens[part, None], (grad[part] * -torch.expm1(logprobs[part]))[:, None].to(p.dtype))
                p = p.to(ctx.dtype)
                grad_hidden[part] = p @ w
                if ctx.needs_input_grad[1]:
                    more = transposed_product(p, hidden[part])
                    grad_weight = more.to(weight.dtype) if grad_weight is None else grad_weight.add_(more)
        return grad_hidden, grad_weight, None, None, None


def head_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each token under softmax(hidden weight^T / temperature), without keeping logits for the gradient.

    Args:
        hidden: [N, d].
        weight: [V, d].
        tokens: [N] int64.

    Returns:
        ([N] float32; the distributions' entropies [N] float32 without a gradient, or None).
    """
    return _HeadLogprobs.apply(hidden, weight, tokens, temperature, with_entropy)


# ----------------------------------------------------------------------------- modules


class _Norm(torch.nn.Module):
    weight: torch.nn.Parameter
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return rms_norm(x, self.weight, self.variance_epsilon, compute_dtype(x))


def narrow_products(model: Any, dtype: torch.dtype) -> Any:
    """The model with the weights of its plain linear layers in `dtype`, in place, for use under autocast to `dtype`.

    Autocast would cast them at each pass: the numbers are the same. What autocast leaves in float32 stays so, and so
    does an embedding that shares its weight with the head.
    """
    for module in model.modules():
        if type(module) in (torch.nn.Linear, _fused(_Projection, torch.nn.Linear)):
            module.weight = torch.nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    return model


class PackedLinear(torch.nn.Module):
    """A linear layer for inference, its weight laid out once as oneDNN's products want it, and not for each of them."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: Any) -> Any:
    """The bf16 model, on a CPU that computes in bf16, with its linear layers packed, in place; any other as it is.

    A packed model cannot be saved, trained or moved.
    """
    if (
        next(model.parameters()).device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
    ):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Linear) and child.weight.dtype == torch.bfloat16:
                    setattr(module, name, PackedLinear(child))
    return model


class _Projection(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or compute_dtype(x) != torch.bfloat16 or not torch.is_grad_enabled():
            return super().forward(x)
        return _Linear.apply(x, self.weight, torch.bfloat16)


class _Mlp(torch.nn.Module):
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class _Attention(torch.nn.Module):
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float

    def forward(
        self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        b, t, _ = hidden_states.shape
        cached = past_key_values is not None
        if (
            hidden_states.device.type != "cpu"
            or (t > MATERIALIZED_COLUMNS and not cached)
            or (cached and torch.is_grad_enabled())
            or (self.training and self.attention_dropout)
        ):
            return super().forward(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        q, k, v = (
            project(hidden_states).view(b, t, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cached:
            cos, sin = (angles.float()[:, None] for angles in position_embeddings)
            q, k = (
                _rotated(x.transpose(1, 2), cos, sin, 1.0, x.new_empty(b, x.shape[2], t, x.shape[3])) for x in (q, k)
            )
            k, v = past_key_values.update(k, v.transpose(1, 2), self.layer_idx)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None and t > 1,
                scale=self.scaling, enable_gqa=True,
            )  # fmt: skip
            return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1)), None
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, t, t, dtype=torch.bool).tril()
        cos, sin = position_embeddings
        return self.o_proj(rotary_attention(q, k, v, cos, sin, attention_mask, self.scaling)), None


def _part(module: torch.nn.Module) -> type | None:
    """Which of the above could stand in for the module."""
    if type(module) is torch.nn.Linear and module.bias is None:
        return _Projection
    has = lambda *names: all(hasattr(module, name) for name in names)  # noqa: E731
    if type(module).__name__.endswith("RMSNorm") and has("weight", "variance_epsilon"):
        return _Norm
    if has("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "head_dim", "attention_dropout"):
        return _Attention
    if has("gate_proj", "up_proj", "down_proj") and type(getattr(module, "act_fn", None)).__name__ in (
        "SiLU",
        "SiLUActivation",
    ):
        return _Mlp
    return None


@functools.cache
def _fused(part: type, plain: type) -> type:
    """The class `plain` with the forward pass of `part`; transformers looks classes up by name."""
    return type(plain.__name__, (part, plain), {"__module__": plain.__module__, "__qualname__": plain.__qualname__})


_NOT_AS_EXPECTED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def fuse(model: Any) -> Any:
    """The model with the parts above in place of its trunk's own, where that changes no value but by rounding."""
    trunk = model.base_model
    layers = getattr(trunk, "layers", None)
    if next(trunk.parameters()).device.type != "cpu" or not isinstance(layers, torch.nn.ModuleList):
        return model
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]) % trunk.config.vocab_size
    tolerance = 1e-4 if next(trunk.parameters()).dtype == torch.float32 else 5e-2

    def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())

    def hidden() -> torch.Tensor:
        return trunk(input_ids=ids, use_cache=False).last_hidden_state

    try:
        before = hidden()
    except _NOT_AS_EXPECTED:
        return model
    found = [(module, part) for module in layers.modules() if (part := _part(module)) is not None]
    for module, part in found:
        module.__class__ = _fused(part, type(module))  # type: ignore[arg-type]  # a class can be hashed
    try:
        fits = alike(hidden(), before)
    except _NOT_AS_EXPECTED:
        fits = False
    if not fits:
        for module, _ in found:
            module.__class__ = type(module).__mro__[2]
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None:
        model.has_plain_head = alike(model(input_ids=ids, use_cache=False).logits, before @ head.weight.T)
    return model


def head_weight(model: Any) -> torch.Tensor | None:
    """[V, d], where the logits are the last hidden state times it and nothing else; None where they are more."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    head = model.get_output_embeddings()
    return head.weight if getattr(model, "has_plain_head", False) and type(head) is torch.nn.Linear else None
