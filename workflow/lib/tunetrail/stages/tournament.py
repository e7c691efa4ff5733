"""Where all evaluations meet: every model against every other, prompt by prompt.

    python -m tunetrail.stages.tournament --config C.json --input evaluation.sft=… --input evaluation.dpo=… \
        [--input base=…] --output … --state …

Nothing is sampled here, and no model is run unless `tournament.judge` names one that is local. An interval I is

    {"mean", "low", "high", "n", "group_low", "group_high", "groups"}

with 95% bounds by bootstrap over n prompts, and by bootstrap over the source groups that the prompts come from
(`groups` of them; null for a single group). metrics.json:

    subjects       [name], base, sft, then the policies; `first` of a pair stands later in this list than `second`
    reference      "sft", or "base" where none was trained
    sampled, greedy, judge
                   a match by gold score of sampled responses, by gold score of greedy ones, and by a language model's
                   verdicts on sampled ones, asked in both orders. null where it was not held, else
        prompts, groups, tie
        pairs      [{"first", "second",
                     "family": what `p` is corrected within: "base" and "sft" (everyone against that one) or "policies",
                     "win_rate": I with "wins", "ties", "losses": first over second, a tie counts one half,
                     "length_controlled": I, the win rate at equal lengths (Dubois et al. 2024); null where undefined,
                     "p": two-sided, by flipping the outcomes of whole groups, "p_holm": corrected within the family,
                     "significant": p_holm < 0.05,
                     "minimum_detectable": the difference from one half that n prompts show with 80% power at 5%
                                           divided by the size of the family}]
        scores     [{"name", "score": I}] Bradley-Terry, in log-odds against the reference, which has 0
    judge_verdicts {"verdicts", "unparsed", "inconsistent": pairs whose two orders disagree, "first_wins": share of
                   the readable verdicts for the response shown first}; null without a judge
    forgetting     [{"first", "second", "adapters": [of first, of second: "full", "lora" or null],
                     "nll": I of the difference first - second in nats a token on unrelated text,
                     "choices": I of the difference in accuracy of the multiple-choice task; null where not measured}]
    preferences    [{"before", "after", "chosen", "rejected", "margin": I of the change of the log-prob on the
                     held-out pairs}], from base to the reference and from there to each policy

Writes `probes.json`: {"pairs": [{"before", "after", "positions": [{"position", "token", "before", "after":
probability of the token that is there, "tokens": [{"token", "before", "after"}] the likeliest of both, null where
not among a model's 50 likeliest}]}]}; and `judgements.jsonl` with a judge.
"""
