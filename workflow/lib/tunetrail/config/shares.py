"""Who reads which rows, and what share of the rows each split gets: the config's, else what the stages read.

The data stage sees the shares and not the stages: a policy that reads a split that has rows already reruns nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tunetrail.config.data import KINDS, SPLITS, TOLERANCE, DataConfig

if TYPE_CHECKING:
    from tunetrail.config.run import Config

MEASURED = {"evaluation": 0.1, "heldout": 0.1}
"""What the splits that something is measured on get."""
TRAINED = {"sft": 10, "reward": 3, "rl": 3}
"""In what proportion the splits that something is trained on share the rest."""

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
"""Kind of row -> table of a split -> who reads such rows there, in a run that has them.

No preference row belongs to the sft split: `sft_on_chosen` copies those of the reward split into the sft table."""

Readers = dict[str, dict[str, list[str]]]
"""Kind of row -> split -> the stages and policies that read such rows there."""


def _names(config: "Config", reader: str, split: str) -> list[str]:
    """What this run has of one of READ_BY's readers: a stage, or the policies that one trains.

    An imported model is not trained; an imported reward model is tested all the same.
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
    """Who reads which rows. A split that rows of this kind are of no use in is left out; one that nobody reads now is
    an empty list."""
    found = {
        kind: {
            split: [name for reader in by for name in _names(config, reader, split)]
            for split, by in by_split.items()
            if config.completions or by != ("completions",)
        }
        for kind, by_split in READ_BY.items()
    }
    chosen = found["preferences"].pop("sft")
    if config.data.sft_on_chosen:
        found["preferences"]["reward"] += chosen
    return found


def _is_given_apart(data: DataConfig, kind: str, split: str) -> bool:
    """Whether a source is pinned to the split so that the others keep out: a test set, or prompts to practise on."""
    if split in ("evaluation", "rl"):
        return any(split in data.pins(other) for other in KINDS)
    return split == "heldout" and split in data.pins(kind)


def _follow(open_splits: list[str]) -> dict[str, float]:
    """The shares of splits of which the config says nothing; they add up to 1."""
    measured = {split: share for split, share in MEASURED.items() if split in open_splits}
    trained = {split: n for split, n in TRAINED.items() if split in open_splits}
    rest = 1 - sum(measured.values())
    if not trained:
        return {split: share / sum(measured.values()) for split, share in measured.items()}
    return {split: round(rest * n / sum(trained.values()), 4) for split, n in trained.items()} | measured


def _spread(given: Mapping[str, float], read: Mapping[str, list[str]], closed: list[str]) -> dict[str, float]:
    """The shares of one kind of row, over the splits that it is of use in; empty where there are none.

    Args:
        given: split -> share, of the config.
        read: split -> its readers, of the splits that this kind is of use in.
        closed: splits that other sources were given for.
    """
    found = {split: share for split, share in given.items() if split in read}
    follow = _follow([split for split, by in read.items() if by and split not in found and split not in closed])
    if follow and sum(given.values()) < 1 - TOLERANCE:  # else the config leaves nothing for the others
        rest = 1 - sum(found.values())
        return found | {split: share * rest for split, share in follow.items()}
    total = sum(found.values())
    scale = 1 if abs(total - 1) <= TOLERANCE else total
    return {split: share / scale for split, share in found.items() if share > 0}


def shares(config: "Config") -> dict[str, dict[str, float]]:
    """Kind -> split -> share of that kind's groups, of the kinds that an unpinned source may hold."""
    data, found = config.data, {}
    for kind, read in readers(config).items():
        if None not in data.pins(kind):
            continue
        like = "demonstrations" if kind == "text" else kind  # text in the proportion that demonstrations have
        closed = [split for split in SPLITS if _is_given_apart(data, kind, split)]
        spread = _spread(data.shares.given, readers(config)[like], closed)
        spread = {split: share for split, share in spread.items() if split in read}
        total = sum(spread.values()) if kind == "text" else 1
        found[kind] = {split: spread[split] / total for split in SPLITS if spread.get(split)}
    return found


def share_of(config: "Config", kind: str, split: str) -> float | None:
    """The share of a kind's groups in a split; 1 where a source is pinned to it; None where there is no such source."""
    pins = config.data.pins(kind)
    if split in pins:
        return 1.0
    return config.shares[kind].get(split, 0.0) if None in pins else None
