"""Which stages read which rows, and the share of the rows in each split: the config's, else what the stages need.

The data stage sees shares, not stages: adding a policy that reads a split with rows does not rerun it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tunetrail.config.data import KINDS, SPLITS, TOLERANCE, DataConfig

if TYPE_CHECKING:
    from tunetrail.config.run import Config

MEASURED = {"evaluation": 0.1, "heldout": 0.1}
"""The shares of the test splits."""
TRAINED = {"sft": 10, "reward": 3, "rl": 3}
"""The proportions in which training splits share the rest."""

PTX = "ppo (ptx)"
"""PPO that keeps demonstrations likely (`ptx_coef`)."""
PAIRED = ("dpo", "orpo", "simpo")
"""Methods that learn from pairs."""
READ_BY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "preferences": {
        "sft": ("sft", "methods", PTX), "reward": ("reward", *PAIRED), "rl": ("ppo",), "evaluation": ("evaluation",),
        "heldout": ("reward", "evaluation"),
    },
    "feedback": {
        "reward": ("kto",), "rl": ("ppo",), "evaluation": ("evaluation",), "heldout": ("evaluation",),
    },
    "demonstrations": {
        "sft": ("sft", "methods", PTX), "reward": ("completions",), "rl": ("ppo",), "evaluation": ("evaluation",),
        "heldout": ("sft", "completions"),
    },
    "prompts": {
        "reward": ("completions",), "rl": ("ppo",), "evaluation": ("evaluation",), "heldout": ("completions",),
    },
    "text": {"sft": ("sft", "methods"), "heldout": ("sft",)},
}  # fmt: skip
"""Kind of row -> table of a split -> the stages that read such rows there, in a run that has them.

No preference row belongs to the sft split: `sft_on_chosen` copies those of the reward split into the sft table."""

Readers = dict[str, dict[str, list[str]]]
"""Kind of row -> split -> the stages and policies that read such rows there."""


def _names(config: "Config", reader: str, split: str) -> list[str]:
    """This run's stage, or policies, for one of READ_BY's readers.

    An imported model is not trained, but an imported reward model is still tested.
    """
    policies = {f"policies.{name}": policy for name, policy in config.policies.items()}
    if reader == PTX:
        return [name for name, policy in policies.items() if getattr(policy, "ptx_coef", 0)]
    if reader in (*PAIRED, "kto", "ppo"):
        return [name for name, policy in policies.items() if policy.method == reader]
    if reader == "sft":
        return [reader] if config.trained_sft else []
    if reader == "reward" and split in TRAINED:
        return [reader] if config.trained_reward else []
    return [reader] if getattr(config, reader) else []


def readers(config: "Config") -> Readers:
    """Which stages read which rows. Splits that cannot use rows of a kind are left out; those that nothing reads now
    are empty lists."""
    by_kind = {
        kind: {
            split: [name for reader in by for name in _names(config, reader, split)]
            for split, by in by_split.items()
            if config.completions or by != ("completions",)
        }
        for kind, by_split in READ_BY.items()
    }
    chosen = by_kind["preferences"].pop("sft")
    if config.data.sft_on_chosen:
        by_kind["preferences"]["reward"] += chosen
    return by_kind


def _is_given_apart(data: DataConfig, kind: str, split: str) -> bool:
    """Whether a source is pinned to the split so that other sources stay out: a test set, or training prompts."""
    if split in ("evaluation", "rl"):
        return any(split in data.pins(other) for other in KINDS)
    return split == "heldout" and split in data.pins(kind)


def _follow(open_splits: list[str]) -> dict[str, float]:
    """The shares of splits that the config does not set; they add up to 1."""
    measured = {split: share for split, share in MEASURED.items() if split in open_splits}
    trained = {split: n for split, n in TRAINED.items() if split in open_splits}
    rest = 1 - sum(measured.values())
    if not trained:
        return {split: share / sum(measured.values()) for split, share in measured.items()}
    return {split: round(rest * n / sum(trained.values()), 4) for split, n in trained.items()} | measured


def _spread(given: Mapping[str, float], read: Mapping[str, list[str]], closed: list[str]) -> dict[str, float]:
    """The shares of one kind of row over the splits that can use it; empty if there are none.

    Args:
        given: split -> share, of the config.
        read: split -> its readers, for the splits that can use this kind.
        closed: splits that are reserved for other sources.
    """
    fixed = {split: share for split, share in given.items() if split in read}
    follow = _follow([split for split, by in read.items() if by and split not in fixed and split not in closed])
    if follow and sum(given.values()) < 1 - TOLERANCE:  # otherwise the config leaves nothing for other splits
        rest = 1 - sum(fixed.values())
        return fixed | {split: share * rest for split, share in follow.items()}
    total = sum(fixed.values())
    scale = 1 if abs(total - 1) <= TOLERANCE else total
    return {split: share / scale for split, share in fixed.items() if share > 0}


def shares(config: "Config") -> dict[str, dict[str, float]]:
    """Kind -> split -> share of that kind's groups, for the kinds that an unpinned source may have."""
    data, result = config.data, {}
    for kind, read in readers(config).items():
        if None not in data.pins(kind):
            continue
        like = "demonstrations" if kind == "text" else kind  # text is split in the proportions of demonstrations
        closed = [split for split in SPLITS if _is_given_apart(data, kind, split)]
        spread = _spread(data.shares.given, readers(config)[like], closed)
        spread = {split: share for split, share in spread.items() if split in read}
        total = sum(spread.values()) if kind == "text" else 1
        result[kind] = {split: spread[split] / total for split in SPLITS if spread.get(split)}
    return result


def share_of(config: "Config", kind: str, split: str) -> float | None:
    """The share of a kind's groups in a split; 1 if a source is pinned to it; None if there is no such source."""
    pins = config.data.pins(kind)
    if split in pins:
        return 1.0
    return config.shares[kind].get(split, 0.0) if None in pins else None
