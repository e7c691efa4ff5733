"""`completions` and `comparisons`: what is sampled, and who ranks it."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from tunetrail.config.fields import (
    Block,
    Count,
    Flag,
    Fraction,
    Integer,
    Name,
    NonNegative,
    NonNegativeInt,
    Positive,
    Text,
    Url,
)


class Sampling(Block):
    """How responses are sampled."""

    temperature: Positive = Field(
        default=1.0, description="of the softmax, also for log-probs; lower values give safer, more similar samples"
    )
    max_new_tokens: Count = Field(default=64, description="tokens; longer responses are cut off")
    batch_size: Count = Field(default=64, description="sequences decoded at once; lower it if memory runs out")


class CompletionsConfig(Sampling):
    """Samples K responses of the SFT model to each prompt of the reward and held-out splits, for comparison."""

    per_prompt: Annotated[Integer, Field(ge=2, le=9)] = Field(
        default=4, description="K, the number of responses per prompt; they make K (K - 1) / 2 pairs"
    )
    shards: Annotated[Integer, Field(ge=1, le=9999)] = Field(
        default=2,
        description="parallel sampling jobs; as many as there are machines to use. Results do not depend on it",
    )


class SimulatedLabeler(Block):
    """Ranks by a scorer, with noise."""

    labeler: Literal["simulated"]
    scorer: Name = Field(default="chrf", description="what it ranks by: a built-in scorer, or one of `scorers`")
    labelers: Count = Field(default=1, description="simulated labelers, each with its own noise")
    noise: NonNegative = Field(
        default=0.0, description="units of the score; standard deviation of the noise added to each score"
    )
    tie: NonNegative = Field(default=0.0, description="units of the score; scores that differ by at most this tie")

    @property
    def scorer_keys(self) -> dict[str, str]:
        """Key -> the name of the scorer that it gives."""
        return {"scorer": self.scorer}


class RecordedLabeler(Block):
    """Looks rankings up in a file of preference rows, by prompt and completion."""

    labeler: Literal["recorded"]
    path: Path = Field(description="a JSONL file of rankings, relative to where Snakemake runs")
    columns: dict[str, str] = Field(default={}, description="our column: the file's column, if the names differ")


class LlmJudge(Block):
    """A language model judges pairs, each in both orders: give `endpoint` and `model`, or `path`."""

    endpoint: Url | None = Field(default=None, description="OpenAI-compatible base URL, ending in /v1")
    model: Text | None = Field(default=None, description="the endpoint's model name")
    path: Path | None = Field(default=None, description="local folder of a causal language model, instead of endpoint")
    api_key_env: Text = Field(
        default="OPENAI_API_KEY", description="name of the environment variable that holds the key"
    )
    guideline: Text = Field(
        default="Which of the two responses answers the prompt better?", description="what the judge is asked"
    )

    @model_validator(mode="after")
    def _one_judge(self):
        if (self.endpoint is None) == (self.path is None):
            raise ValueError("give either endpoint (with model) or path (a local model)")
        if self.endpoint and not self.model:
            raise ValueError("model is needed with endpoint")
        return self


class LlmLabeler(LlmJudge):
    """A language model ranks by judging pairs, each in both orders: give `endpoint` and `model`, or `path`."""

    labeler: Literal["llm"]
    labelers: Count = Field(default=1, description="simulated labelers, each with its own noise")
    noise: Fraction = Field(default=0.0, description="share of the verdicts replaced by a coin flip")


class HumanLabeler(Block):
    """People rank the outputs on the page of `tunetrail label serve`; the run waits for them."""

    labeler: Literal["human"]
    store: Text = Field(
        default="state/labels.db",
        description="where answers are kept: an SQLite file, or `postgresql://user@host/name` with the password in "
        "`~/.pgpass` or `$PGPASSWORD`. Each run needs its own",
    )
    overlap: Count = Field(default=1, description="labelers per task: every task needs this many rankings")
    per_labeler: Count | None = Field(default=None, description="the most rankings of one labeler; null: no limit")
    skips: Count = Field(
        default=2, description="once this many labelers skipped a task, nobody else gets it; its answers are kept"
    )
    lease_minutes: Positive = Field(default=30, description="how long an untouched task stays with its labeler")
    guidelines: Path | None = Field(default=None, description="a Markdown file that labelers read; null: none")
    gold: Path | None = Field(
        default=None,
        description="a JSONL file of tasks with known ranks, `{id, prompt, completions, gold: {ranks}}`, to measure "
        "labelers by; null: none",
    )
    training: NonNegativeInt = Field(default=0, description="how many gold tasks come first, with feedback")
    gold_every: NonNegativeInt = Field(default=10, description="one gold task comes among every n others; 0: none")
    repeat_every: NonNegativeInt = Field(
        default=20, description="one earlier task is repeated among every n others, unmarked; 0: none"
    )
    ratings: Flag = Field(default=True, description="also offer a rating from 1 to 7 for each output")

    @model_validator(mode="after")
    def _keys_fit(self):
        if urlsplit(self.store).password:
            raise ValueError(
                "store holds a password, which would get into records; put it into ~/.pgpass or $PGPASSWORD"
            )
        if self.training and not self.gold:
            raise ValueError("training needs gold: a file of tasks with known ranks")
        return self


ComparisonsConfig = Annotated[
    SimulatedLabeler | RecordedLabeler | LlmLabeler | HumanLabeler, Field(discriminator="labeler")
]
