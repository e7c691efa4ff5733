"""The types of evaluation's metrics.json and its parts."""

from typing import NotRequired, TypedDict


class Interval(TypedDict):
    """A mean with a 95% bootstrap interval, by resampling the source groups of its values, or the values themselves if
    there are no groups or only one."""

    mean: float
    low: float
    high: float
    n: int
    """The number of values: prompts, texts or pairs."""
    groups: NotRequired[int]


class Divergence(Interval):
    """KL from a model to the SFT model, in nats per response."""

    se: float | None
    """Standard error; null for a bound."""
    estimator: str
    """`rao-blackwell`; `analytic bound` for best-of-n: mean and high are the bound, low is 0."""


class FrontierPoint(TypedDict):
    """One checkpoint of a policy."""

    step: int
    chosen: bool
    """Whether this is the final model."""
    kl: Divergence | None
    reward: Interval | None
    gold: Interval | None


class Frontier(TypedDict):
    """The checkpoints that a policy kept and its final model, all on the same prompts."""

    prompts: int
    rule: str
    """How the final model was chosen."""
    points: list[FrontierPoint]


class BestOfNPoint(TypedDict):
    n: int
    kl_bound: float
    reward: Interval | None
    gold: Interval | None


class BestOfNCurve(TypedDict):
    """The yardstick: best-of-n from the model that policies start from, on the prompts of the frontier."""

    samples: int
    prompts: int
    points: list[BestOfNPoint]


class Choices(TypedDict):
    accuracy: Interval
    chance: float


class Retention(TypedDict):
    """Loss on unrelated text in nats per token, its perplexity, and multiple-choice accuracy."""

    nll: Interval | None
    perplexity: Interval | None
    choices: Choices | None


class HeldOutPreferences(TypedDict):
    """Log-probs of the preferred and the dispreferred response on all decided pairs of held-out prompts."""

    chosen_logps: Interval | None
    rejected_logps: Interval | None
    accuracy: Interval | None
    """How often the preferred response has the higher `measure`."""
    measure: str
    """`implicit reward`: by how much training from the reference made a response likelier (Rafailov et al. 2023, eq. 5,
    up to beta); `log-prob` for a model without a reference, which favours what is short."""


class HeldOutFeedback(TypedDict):
    """Log-probs of held-out responses that people liked, and of those that they disliked."""

    liked_logps: Interval | None
    disliked_logps: Interval | None
    accuracy: Interval | None
    """How often a liked response has a higher `measure` than a disliked one, over all such pairs; null if there are no
    liked or no disliked ones."""
    measure: str
    """As in `HeldOutPreferences`."""


class Pair(TypedDict):
    """One model against another. In the order base, sft, policies by name, `first` comes after `second`."""

    first: str
    second: str
    family: str
    """The family of tests within which `p` is corrected: `base` or `sft` (all models against that one), or
    `policies`."""
    win_rate: "WinRate"
    """Over prompts; each prompt's outcome is the mean over all pairs of the two models' samples."""
    difference: Interval | None
    """The gold score of first less that of second, as means over each prompt's samples; null for a judge."""
    length_controlled: Interval | None
    """The win rate at equal lengths (Dubois et al. 2024); null if one side is longer on over 95% of the prompts, since
    the data then say nothing about equal lengths."""
    p: float
    """Two-sided, by flipping the outcomes of whole groups."""
    p_holm: float
    significant: bool
    """p_holm < 0.05."""
    minimum_detectable: float | None
    """The difference from one half that n prompts would show with 80% power, at 5% divided by the size of the family;
    null if they cannot show any."""


class WinRate(Interval):
    """The win rate of `first` over `second`; a tie counts one half. `wins`, `ties` and `losses` are numbers of prompts
    with outcomes above, at and below one half."""

    wins: int
    ties: int
    losses: int


class Strength(TypedDict):
    """Bradley-Terry strength in log-odds relative to the reference, which has 0."""

    name: str
    score: Interval


class Match(TypedDict):
    """All models against each other on the same prompts."""

    tie: float
    """Score differences up to this are ties."""
    prompts: int
    groups: int
    pairs: list[Pair]
    scores: list[Strength]


class Forgetting(TypedDict):
    """How much more `first` forgot than `second`, compared text by text."""

    first: str
    second: str
    adapters: list[str | None]
    """How first and second were trained: `full`, `lora` or null."""
    nll: Interval | None
    choices: Interval | None


class PreferenceShift(TypedDict):
    """How training changed the log-probs of the held-out pairs."""

    before: str
    after: str
    chosen: Interval
    rejected: Interval
    margin: Interval


class JudgeVerdicts(TypedDict):
    """Statistics of a language model's verdicts."""

    verdicts: int
    unparsed: int
    inconsistent: int
    """Pairs whose two orders disagree."""
    first_wins: float | None
    """Share of the decided verdicts that favour the response shown first."""
