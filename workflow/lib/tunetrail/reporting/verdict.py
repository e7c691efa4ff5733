"""What came out, in sentences that follow from the intervals and say no more than they do."""

from tunetrail.reporting.collect import Model, Run
from tunetrail.reporting.numbers import MIN_PROMPTS, number, percent, percent_interval


def outcome(win_rate: dict | None, match: dict | None = None) -> str:
    """`better`, `worse`, `unclear` (the 95% interval holds one half), `few` (too few prompts) or `unmeasured`.

    Args:
        match: of the tournament; a difference that is none after correcting for the number of models is unclear.
    """
    if win_rate is None:
        return "unmeasured"
    if win_rate["n"] < MIN_PROMPTS:
        return "few"
    if match and not match["significant"]:
        return "unclear"
    if win_rate["low"] > 0.5:
        return "better"
    return "worse" if win_rate["high"] < 0.5 else "unclear"


def sentence(model: Model, match: dict | None = None) -> str:
    """One model against sft."""
    win_rate, greedy, name = model.interval("win_rate_vs_sft"), model.interval("greedy_win_rate_vs_sft"), model.name
    if win_rate is None:
        return f"{name}: win rate against sft not measured."
    found = f"win rate {percent_interval(win_rate)} on {win_rate['n']} prompts"
    if match:
        found += f", corrected p {number(match['p_holm'], 3)}"
    if greedy is not None:
        found += f", decoded greedily {percent_interval(greedy)}"
    match outcome(win_rate, match):
        case "better":
            return f"{name} beats sft: {found}."
        case "worse" if model.subject == "base":
            return f"sft beats {name}, which has a {found}."
        case "worse":
            return f"{name} loses to sft: {found}."
        case "few":
            return f"{name}: {found}, too few to tell it from sft."
    if outcome(greedy) in ("better", "worse"):
        sampled = f"{percent_interval(win_rate)} on {win_rate['n']} prompts"
        decoded = f"decoded greedily it is {outcome(greedy)}, {percent_interval(greedy)}"
        return f"{name}: sampled, no difference from sft shown, win rate {sampled}; {decoded}."
    least = (match or {}).get("minimum_detectable")
    seen = f"; {win_rate['n']} prompts show differences of {percent(least)} or more" if least else ""
    return f"{name}: no difference from sft shown, {found}{seen}."


def over_optimised(model: Model, run: Run) -> bool:
    """The reward model likes it better than sft (intervals apart) while the gold scorer does not.

    That is the sign of over-optimisation: the policy has learnt the reward model's errors (Gao et al. 2022).
    """
    sft = run.model("sft")
    ours, theirs = model.interval("reward"), sft.interval("reward") if sft else None
    if ours is None or theirs is None or model.interval("win_rate_vs_sft") is None:
        return False
    found = outcome(model.interval("win_rate_vs_sft"), run.match_of(model))
    return ours["low"] > theirs["high"] and found not in ("better", "few")


def sentences(run: Run) -> list[str]:
    """The outcome of the run, base first."""
    found = [sentence(m) for m in run.models if m.subject == "base" and m.interval("win_rate_vs_sft")]
    found += [sentence(model, run.match_of(model)) for model in run.policies]
    if liked := [model.name for model in run.policies if over_optimised(model, run)]:
        found.append(
            f"The reward model scores {', '.join(liked)} above sft, intervals apart: a gain that the gold scorer does not see."
        )
    return found or ["No policy was compared with sft."]
