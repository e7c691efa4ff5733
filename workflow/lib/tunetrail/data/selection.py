"""From the config's sources to the rows of each split's table."""

from collections.abc import Mapping

from tunetrail.config.data import DataConfig, DocstringSource
from tunetrail.data.invalid import Invalid
from tunetrail.data.readers import READERS, origin, row_id
from tunetrail.data.splits import assign_splits, in_turns, shuffled
from tunetrail.data.tables import JOINED, one_each
from tunetrail.data.uses import Account

Shares = Mapping[str, Mapping[str, float]]
"""Kind of row -> split -> share, see `config.shares`."""


def read_all(config: DataConfig, account: Account) -> tuple[list[dict], list[dict]]:
    """(rows, cards): the rows of all sources with `source`, `where` and `kind`, and a description of each source."""
    rows, cards = [], []
    for kind, read in READERS.items():
        for source in getattr(config, kind):
            invalid: list[Invalid] = []
            own = [row | {"where": where} for where, row in read(source, invalid if config.invalid == "drop" else None)]
            shape = (
                JOINED[kind]
                if kind in JOINED
                else "/".join(sorted({"text" if "text" in row else "prompt" for row in own}))
            )
            card = origin(source) | {"invalid_rows": len(invalid), "kind": kind, "shape": shape, "split": source.split}
            cards.append(card | {"rows": len(own)})
            if invalid:
                account.reasons[card["source"], kind, "invalid"] += len(invalid)
            limits = (source.max_code_tokens, source.max_answer_tokens) if isinstance(source, DocstringSource) else None
            about = {"source": card["source"], "max_tokens": limits, "pinned": source.split, "weight": source.weight}
            rows += [row | about | {"kind": "text" if "text" in row else kind} for row in own]
    return rows, cards


def assigned(rows: list[dict], shares: Shares, sft_on_chosen: bool, seed: int) -> None:
    """Gives every row its id, its split and the `tables` that it may be in.

    sft also trains on rows of the reward split: on demonstrations that are there because their group has preferences or
    feedback, and on preferred responses if `sft_on_chosen`.
    """
    split_of = assign_splits(rows, shares, seed)
    compared = {row["group"] for row in rows if row["kind"] in JOINED}
    for row in rows:
        row["split"] = split_of[row["group"]]
        content = {key: row[key] for key in ("text", "prompt", "completion", "completions") if key in row}
        # A rated response may also be a demonstration's answer; these are two different rows.
        row["id"] = row_id(content | ({"kind": "feedback"} if row["kind"] == "feedback" else {}))
        learnt = (row["kind"] == "preferences" and sft_on_chosen) or (
            row["kind"] == "demonstrations" and row["group"] in compared
        )
        row["tables"] = {row["split"], "sft"} if row["split"] == "reward" and learnt else {row["split"]}


def select(rows: list[dict], split: str, config: DataConfig, seed: int, account: Account) -> list[dict]:
    """The rows of one split's table, shuffled, and limited evenly over their groups."""

    def step(reason: str, after: list[dict]) -> list[dict]:
        account.leave_out(reason, *([row for row in part if row["split"] == split] for part in (own, after)))
        return after

    own = shuffled([row for row in rows if split in row["tables"]], seed, split)
    # Raw text is only for training and its held-out loss. sft cannot learn from prompts without an answer, or from
    # answers that may be bad.
    useless = {"sft": ("prompts", "feedback"), "heldout": ()}.get(split, ("text",))
    own = step("no_use_in_its_split", [row for row in own if row["kind"] not in useless])
    if split in ("rl", "evaluation"):
        own = step("same_prompt", one_each(own))
    return step("over_limit", in_turns(own, config.max_per_group)[: getattr(config.limits, split) or len(own)])
