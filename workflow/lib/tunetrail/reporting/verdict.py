"""The outcome of a run in sentences that follow from the tests of the head-to-head comparison and claim no more."""

from tunetrail.reporting.collect import Model, Run
from tunetrail.reporting.numbers import MIN_PROMPTS, interval, p_value, percent, percent_interval


def outcome(match: dict | None) -> str:
    """How the first model of a pair does: `better`, `worse`, `unclear`, `few` (too few prompts) or `unmeasured`.

    The outcome is unclear if the 95% interval (over source groups, like the test) includes one half, or if the
    difference is not significant after correcting for the number of models compared.
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
    difference = match.get("difference")
    gold = f", gold score {interval(difference, 1, sign=True)}" if difference else ""
    return f"{percent_interval(match['win_rate'])}{on}, corrected p {p_value(match['p_holm'])}{gold}"


def _swapped(match: dict) -> dict:
    """The match as seen from its second model."""
    rate, difference = match["win_rate"], match.get("difference")
    seen = {"win_rate": rate | {"mean": 1 - rate["mean"], "low": 1 - rate["high"], "high": 1 - rate["low"]}}
    if difference:
        bounds = {"mean": -difference["mean"], "low": -difference["high"], "high": -difference["low"]}
        seen["difference"] = difference | bounds
    return match | seen


def sentence(run: Run, model: Model) -> str:
    """A sentence about one model against the reference."""
    match, greedy, name, reference = run.match_of(model), run.match_of(model, "greedy"), model.name, run.reference
    if match is None:
        return f"{name}: win rate against {reference} not measured{unscored(run, model)}."
    prompts, result = f"{match['win_rate']['n']} prompts", outcome(match)
    if result == "worse" and model.subject == "base":  # a reader asks whether training helped
        match, greedy, result = _swapped(match), greedy and _swapped(greedy), "better"
        name, reference = reference, name
    rate = f"win rate {_rate(match, f' on {prompts}')}"
    decoded = "" if greedy is None else f"; decoded greedily {_rate(greedy)}"
    match result:
        case "better":
            return f"{name} beats {reference}: {rate}{decoded}."
        case "worse":
            return f"{name} loses to {reference}: {rate}{decoded}."
        case "few":
            return f"{name}: {rate}, too few to tell it from {reference}{decoded}."
    if greedy is not None and outcome(greedy) in ("better", "worse"):
        return (
            f"{name}: sampled, no difference from {reference} shown, {rate}; "
            f"decoded greedily it is {outcome(greedy)}, {_rate(greedy)}."
        )
    least = match["minimum_detectable"]
    power = f"; {prompts} would show differences of {percent(least)} or more" if least else ""
    return f"{name}: no difference from {reference} shown, {rate}{power}{decoded}."


def unscored(run: Run, model: Model) -> str:
    """What can be said about a model without a gold score: held-out preferences, KL and length."""
    kl, length = (model.metrics.get(key) for key in ("kl_to_sft", "length"))
    reference = run.model(run.reference)
    parts = []
    for key, one, other in (("comparisons", "preferred", "others"), ("feedback", "liked", "disliked ones")):
        if (measured := model.metrics.get(key)) and measured["accuracy"]:
            by, share = measured.get("measure") or "log-prob", percent_interval(measured["accuracy"])
            parts.append(f"tells held-out {one} responses from {other} in {share} by {by}")
    for change in run.head_to_head.get("preferences") or []:
        if change["after"] == model.subject:
            chosen, rejected = (interval(change[key], 1, sign=True) for key in ("chosen", "rejected"))
            parts.append(f"log-probs changed by {chosen} nats for preferred responses, {rejected} for the others")
    if kl:
        parts.append(f"KL to {model.metrics.get('start') or run.reference} {interval(kl, 2)} nats")
    if length and reference and (theirs := reference.interval("length")):
        parts.append(f"length {interval(length, 1)} tokens ({reference.name} {interval(theirs, 1)})")
    return f"; {'; '.join(parts)}" if parts else ""


def over_optimised(run: Run, model: Model) -> bool:
    """Whether the reward model scores the policy above the reference (with disjoint intervals) although the interval of
    the difference in gold score excludes any gain larger than a tie.

    This indicates over-optimisation: the policy has learnt the reward model's errors (Gao et al. 2022). A merely
    unclear gold score does not.
    """
    reference = run.model(run.reference)
    ours, theirs = model.interval("reward"), reference.interval("reward") if reference else None
    match = run.match_of(model)
    difference = match and match["difference"]
    if ours is None or theirs is None or not difference or difference["n"] < MIN_PROMPTS:
        return False
    return ours["low"] > theirs["high"] and difference["high"] <= run.head_to_head["sampled"]["tie"]


def sentences(run: Run) -> list[str]:
    """The outcome of the run, base first."""
    measured = [m for m in run.models if m.subject == "base" and run.match_of(m)]
    outcomes = [sentence(run, model) for model in measured + run.policies]
    if over := [model.name for model in run.policies if over_optimised(run, model)]:
        outcomes.append(
            f"The reward model scores {', '.join(over)} above {run.reference} with disjoint intervals, "
            "a gain that the gold scorer rules out."
        )
    return outcomes or [f"No policy was compared with {run.reference}."]
