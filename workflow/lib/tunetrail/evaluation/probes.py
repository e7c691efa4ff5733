"""How training changed next-token probabilities: two models' probes of the same sentence, side by side."""


def likeliest(tokens: list[dict], top: int | None = None) -> list[dict]:
    """The tokens of one position of `shift`, sorted by the higher of their two probabilities."""
    return sorted(tokens, key=lambda t: -max(t["before"] or 0, t["after"] or 0))[:top]


def shift(before: list[dict], after: list[dict], top: int = 8) -> list[dict]:
    """For each position, the tokens among the `top` likeliest of either model, with both probabilities.

    Args:
        before, after: rows of `models.sentence_probe`.

    Returns:
        [{"position", "token", "before", "after", "tokens": [{"id", "token", "before", "after"}]}], with the tokens that
        gained most first; a probability is None if the token is not in that model's list.
    """
    rows = []
    for was, now in zip(before[1:], after[1:], strict=True):  # nothing precedes the first token
        probs = [{entry["id"]: entry for entry in row["top"]} for row in (was, now)]
        ids = dict.fromkeys(entry["id"] for row in (was, now) for entry in row["top"][:top])
        tokens = [
            {
                "id": i,
                "token": (probs[0].get(i) or probs[1][i])["token"],
                "before": probs[0].get(i, {}).get("prob"),
                "after": probs[1].get(i, {}).get("prob"),
            }
            for i in ids
        ]
        tokens.sort(key=lambda t: (t["before"] or 0) - (t["after"] or 0))
        rows.append(
            {
                "position": now["position"],
                "token": now["token"],
                "before": was["prob"],
                "after": now["prob"],
                "tokens": tokens,
            }
        )
    return rows
