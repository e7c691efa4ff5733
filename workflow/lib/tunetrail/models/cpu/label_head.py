"""A head for TRL's trainers that scores only the columns with labels, on a CPU."""

import functools
from typing import Any

import torch

from tunetrail.models.scoring import gather_logprobs


def score_labels_only(model: Any) -> None:
    """Makes a model that a TRL trainer has prepared score only the columns with labels.

    Without Triton, TRL's fused head scores every position, prompts included, and recomputes the logits in the backward
    pass, which takes a large part of a step on short answers to longer prompts (`make bench`). In float32 the numbers
    are the same. If labels fill most columns, as in raw text, TRL's head stays in use because it needs less memory.
    Call this after making the trainer and before training.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    from trl.trainer.utils import FusedCausalLMOutput

    model = model.get_base_model() if hasattr(model, "peft_config") else model
    forward_of_trl = model.forward

    @functools.wraps(forward_of_trl)
    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return forward_of_trl(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        labelled = (labels != -100).any(0).nonzero()
        first = max(1, int(labelled[0])) if len(labelled) else 0  # the first predicted column
        if first <= labels.shape[1] // 2:
            return forward_of_trl(*args, fused_lm_head=True, labels=labels, **kwargs)
        targets = labels[:, first:]
        mask = targets != -100
        kwargs |= {"use_cache": False, "logits_to_keep": targets.shape[1] + 1}
        output = forward_of_trl(*args, **kwargs)
        logits = output.logits[:, :-1].float()
        log_probs = gather_logprobs(logits, targets.clamp_min(0))
        with torch.no_grad():
            statistics = {
                "entropy": torch.stack([row.logsumexp(-1) - (row.softmax(-1) * row).sum(-1) for row in logits]),
                "mean_logits": logits.mean(-1),
                "is_top1": logits.argmax(-1) == targets,
            }

        def whole(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x.masked_fill(~mask, 0), (first - 1, 0))

        return FusedCausalLMOutput(
            log_probs=whole(log_probs),
            label_mask=whole(mask),
            aux_loss=getattr(output, "aux_loss", None),
            **{name: whole(x) for name, x in statistics.items()},
        )

    model.forward = forward
