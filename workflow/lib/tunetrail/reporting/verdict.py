"""What came out, in sentences that follow from the head_to_head's tests and say no more than they do."""

from tunetrail.reporting.collect import Model, Run
from tunetrail.reporting.numbers import MIN_PROMPTS, interval, p_value, percent, percent_interval


def outcome(match: dict | None) -> str:
    """`better`, `worse`, `unclear`, `few` (too few prompts) or `unmeasured`, of the first of a pair of the
    head_to_head.

    A difference is unclear where the 95% interval (over source groups, as the test is) holds one half, or where it may
    be chance after correcting for the number of models compared.
    """
    if match is None:
        return "unmeasured"
    win_rate = match["win_rate"]
    if win_rate["n"] < MIN_PROMPTS:
        return "few"
    if match["significant"] and win_rate["low"] > 0.5:
        return "better"
    return "worse" if match["significant"] and win_rate["high"] < 0.5 else "unclear"


def _rate(match: dict, on: str = "") -> str:
    gained = match.get("difference")
    gold = f", gold score {interval(gained, 1, sign=True)}" if gained else ""
    return f"{percent_interval(match['win_rate'])}{on}, corrected p {p_value(match['p_holm'])}{gold}"


def sentence(run: Run, model: Model) -> str:
    """One model against the reference."""
    match, greedy, name, reference = run.match_of(model), run.match_of(model, "greedy"), model.name, run.reference
    if match is None:
        return f"{name}: win rate against {reference} not measured{unscored(run, model)}."
    prompts = f"{match['win_rate']['n']} prompts"
    found = f"win rate {_rate(match, f' on {prompts}')}"
    decoded = "" if greedy is None else f"; decoded greedily {_rate(greedy)}"
    match outcome(match):
        case "better":
            return f"{name} beats {reference}: {found}{decoded}."
        case "worse" if model.subject == "base":
            return f"{reference} beats {name}, which has a {found}{decoded}."
        case "worse":
            return f"{name} loses to {reference}: {found}{decoded}."
        case "few":
            return f"{name}: {found}, too few to tell it from {reference}{decoded}."
    if greedy is not None and outcome(greedy) in ("better", "worse"):
        return (
            f"{name}: sampled, no difference from {reference} shown, {found}; "
            f"decoded greedily it is {outcome(greedy)}, {_rate(greedy)}."
        )
    least = match["minimum_detectable"]
    seen = f"; {prompts} show differences of {percent(least)} or more" if least else ""
    return f"{name}: no difference from {reference} shown, {found}{seen}{decoded}."


def unscored(run: Run, model: Model) -> str:
    """What can be said of a model whose responses nothing compared: held-out preferences, KL and length."""
    kl, length = (model.metrics.get(key) for key in ("kl_to_sft", "length"))
    reference = run.model(run.reference)
    found = []
    for key, one, other in (("comparisons", "preferred", "others"), ("feedback", "liked", "disliked ones")):
        if (told := model.metrics.get(key)) and told["accuracy"]:
            by, share = told.get("measure") or "log-prob", percent_interval(told["accuracy"])
            found.append(f"tells held-out {one} responses from {other} in {share} by {by}")
    for change in run.head_to_head.get("preferences") or []:
        if change["after"] == model.subject:
            chosen, rejected = (interval(change[key], 1, sign=True) for key in ("chosen", "rejected"))
            found.append(f"log-probs changed by {chosen} nats for preferred responses, {rejected} for the others")
    if kl:
        found.append(f"KL to {model.metrics.get('start') or run.reference} {interval(kl, 2)} nats")
    if length and reference and (theirs := reference.interval("length")):
        found.append(f"length {interval(length, 1)} tokens ({reference.name} {interval(theirs, 1)})")
    return f"; {'; '.join(found)}" if found else ""


def over_optimised(run: Run, model: Model) -> bool:
    """The reward model likes it better than the reference (intervals apart) while the interval of the gold scores'
    difference excludes a gain worth having: one of more than the tie.

    That is the sign of over-optimisation: the policy has learnt the reward model's errors (Gao et al. 2022). A gold
    test that is merely unclear is not.
    """
    reference = run.model(run.reference)
    ours, theirs = model.interval("reward"), reference.interval("reward") if reference else None
    match = run.match_of(model)
    gained = match and match["difference"]
    if ours is None or theirs is None or not gained or gained["n"] < MIN_PROMPTS:
        return False
    return ours["low"] > theirs["high"] and gained["high"] <= run.head_to_head["sampled"]["tie"]


def sentences(run: Run) -> list[str]:
    """The outcome of the run, base first."""
    measured = [m for m in run.models if m.subject == "base" and run.match_of(m)]
    found = [sentence(run, model) for model in measured + run.policies]
    if liked := [model.name for model in run.policies if over_optimised(run, model)]:
        found.append(
            f"The reward model scores {', '.join(liked)} above {run.reference}, intervals apart: "
            "a gain that the gold scorer rules out."
        )
    return found or [f"No policy was compared with {run.reference}."]
