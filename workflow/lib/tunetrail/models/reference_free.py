"""What orpo and simpo share: losses on pairs of log-probs per token, without a reference model.

TRL's trainers for them (`trl.experimental`) encode texts again, truncate long ones and append EOS to responses that
were cut off, and ORPO's fine-tunes on prompts too. So the losses are here, and run on the batches of dpo.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOConfig as TrlDpoConfig

from tunetrail.config.dpo import FromPairs
from tunetrail.contract.stage import Stage
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.preference import PretokenizedDpoTrainer, train_on_pairs
from tunetrail.models.runtime import prepare
from tunetrail.models.training import trainer_arguments

PairLoss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(mean log-prob per token of the preferred responses [B], of the others [B]) -> (losses [B], margins [B])."""


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) of P = exp(mean log-prob per token) (Hong et al. 2024, eq. 2 and 3): [B] -> [B].

    Stays finite if the model is certain, as it is of texts that it has memorised.
    """
    logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair, the fine-tuning loss on the preferred response plus the odds-ratio loss (Hong et al. 2024, eq. 6
    and 7); see `PairLoss`. The margin is the log odds ratio.
    """
    margins = log_odds(chosen) - log_odds(rejected)
    return -chosen - weight * logsigmoid(margins), margins


def simpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair, the SimPO loss (Meng et al. 2024, eq. 6); see `PairLoss`. The margin is between the rewards, beta
    times the log-prob per token, before gamma is subtracted.
    """
    margins = beta * (chosen - rejected)
    return -logsigmoid(margins - gamma), margins


class ReferenceFreeTrainer(PretokenizedDpoTrainer):
    """DPOTrainer with a loss that needs no reference."""

    def __init__(self, *args: Any, pair_loss: PairLoss, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pair_loss = pair_loss

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
        score_labels_only(self.model)
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mask = inputs["completion_mask"]  # [2B, T], the preferred responses first
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
            **extra,
        )
        logps = output.log_probs.sum(1)
        losses, margins = self.pair_loss(*(logps / mask[:, 1:].sum(1).clamp_min(1)).chunk(2))
        chosen, rejected = logps.chunk(2)
        logged = {
            "rewards/accuracies": (margins > 0).float(),
            "rewards/margins": margins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        of_mode = self._metrics["train" if self.model.training else "eval"]
        for name, values in logged.items():
            of_mode[name].append(self.accelerator.gather(values.detach()).mean().item())
        loss = losses.mean()
        if self.aux_loss_enabled:  # of a mixture of experts, as in dpo
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        return (loss, output) if return_outputs else loss


def train_reference_free(stage: Stage, config: FromPairs, pair_loss: PairLoss) -> dict[str, Any]:
    """Trains the stage's policy on its pairs with this loss; returns the content of `metrics.json`."""
    prepare(stage.seed, stage.name)
    # TRL would load a second model to compute reference log-probs with in every step.
    arguments = TrlDpoConfig(**trainer_arguments(stage, config), max_length=None, precompute_ref_log_probs=True)
    return train_on_pairs(stage, config, functools.partial(ReferenceFreeTrainer, args=arguments, pair_loss=pair_loss))
