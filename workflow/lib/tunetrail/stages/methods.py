"""Compares methods of fine-tuning the base model on the sft split: what each learns, forgets, trains and costs.

    python -m tunetrail.stages.methods --config C.json --input base=… --input data=… --input retention=… \
        --output … --state …

Every method starts from the same weights and sees the same batches. During training two losses are measured, in nats
per token: on the training rows (`learnt`), and on unrelated text, as the difference from the base model (`forgotten`).
metrics.json has `rows`, `texts`, the base model's losses (`base`), and for each method (`methods`):

    kind                full, LoRA, 4-bit LoRA or prompt tuning
    parameters, parameters_trained
    points              [{"step", "learnt", "forgotten"}], the first before training
    learnt              the loss at the last point
    forgotten           at the last point, with a 95% interval by bootstrap over texts

Seconds per step and peak memory depend on the machine, so they are in the record, under `measurements` of the attempt
that trained the method. A resumed attempt keeps the methods that were finished and starts the interrupted one over.
"""

import math
import statistics
import sys
from typing import Any

from tunetrail.config.methods import MethodConfig, MethodsConfig
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.stats import bootstrap
from tunetrail.files import canonical_json, read_finished_rows
from tunetrail.models.checkpoints import kept_steps
from tunetrail.models.finetuning import Cost, Example, build, mean_losses, train
from tunetrail.models.lengths import check_blocks
from tunetrail.models.loading import load_tokenizer, trained_parameters, trained_weights
from tunetrail.models.runtime import quiet_libraries, seed_everything
from tunetrail.models.supervised import given_and_learnt, tokenize
from tunetrail.models.training import bit_sums, check_learnt, epoch_order, warn_of_few_steps
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start


def batches_of(rows: list[Example], config: MethodsConfig, seed: int) -> list[list[Example]]:
    """The rows of every optimizer step. Raises DataError if there are fewer rows than one batch."""
    if len(rows) < config.batch_size:
        raise DataError(
            f"methods: {len(rows)} rows are fewer than one batch (methods.batch_size: {config.batch_size}); lower it"
        )
    per_epoch = len(rows) // config.batch_size
    lengths = [len(given) + len(learnt) for given, learnt in rows]
    order = epoch_order(lengths, config.batch_size, math.ceil(config.steps / per_epoch), seed)
    size = config.batch_size
    batches = [[rows[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
    return batches[: config.steps]


class Comparison:
    """The data that all methods are trained and measured on, and the base model's losses on it."""

    def __init__(self, stage: Stage):
        self.stage, self.config = stage, MethodsConfig(**stage.config)
        self.folder, self.precision = stage.inputs["base"].folder / "model", stage.shared["precision"]
        tokenizer = load_tokenizer(self.folder)
        self.pad_id = tokenizer.pad_token_id
        examples = tokenize(stage.rows("data", "sft.jsonl"), tokenizer, self.config.max_length, "methods")
        self.rows = [given_and_learnt(example) for example in examples]
        self.texts = [(r["prompt_ids"], r["response_ids"]) for r in stage.rows("retention", "retention.jsonl")]
        self.batches = batches_of(self.rows, self.config, stage.seed)
        self.measured_at = {*kept_steps(self.config.steps, self.config.points - 1), self.config.steps}
        untrained = build(self.folder, MethodConfig(learning_rate=1), self.precision, stage.seed)
        check_blocks(untrained.config, [example["input_ids"] for example in examples], "methods.max_length")
        self.base = self.losses(untrained)
        """(losses on the rows, losses on the texts)."""

    def losses(self, model: Any) -> tuple[list[float], list[float]]:
        sizes = (self.pad_id, self.precision, self.config.batch_size)
        return mean_losses(model, self.rows, *sizes), mean_losses(model, self.texts, *sizes)

    def forgotten(self, losses: list[float]) -> list[float]:
        return [loss - before for loss, before in zip(losses, self.base[1], strict=True)]

    def point(self, step: int, losses: tuple[list[float], list[float]]) -> dict[str, float]:
        learnt, forgotten = losses[0], self.forgotten(losses[1])
        return {"step": step, "learnt": statistics.fmean(learnt), "forgotten": statistics.fmean(forgotten)}

    def run(self, name: str, bar: ProgressBar) -> dict[str, Any]:
        """Trains with one method. Returns its entry in metrics.json, and its cost under `measurements`."""
        method, cost = self.config.compare[name], Cost()
        seed_everything(self.stage.seed, "methods", name)
        model = build(self.folder, method, self.precision, derive_seed(self.stage.seed, "methods", name))
        before, losses = bit_sums(trained_weights(model)), self.losses(model)
        points = [self.point(0, losses)]

        def on_step(step: int) -> None:
            nonlocal losses
            if step in self.measured_at:
                losses = self.losses(model)
                points.append(self.point(step, losses))
            bar.advance(1, f"{name}: loss {points[-1]['learnt']:.3f}")
            if step < self.config.steps:
                self.stage.stop.leave_if_requested(f"while training {name}, which will start over")

        train(model, self.batches, method.learning_rate, self.pad_id, self.precision, cost, on_step)
        check_learnt(f"methods.compare.{name}", before, bit_sums(trained_weights(model)), self.config.steps)
        result = {"kind": method.kind, "points": points, "learnt": points[-1]["learnt"]}
        result["forgotten"] = bootstrap(self.forgotten(losses[1]), 2000, self.stage.seed)
        measurements = {"seconds_per_step": round(statistics.median(cost.seconds), 4), "peak_bytes": cost.peak}
        return {"name": name, "result": result | trained_parameters(model), "measurements": measurements}


def run(stage: Stage) -> dict[str, Any]:
    quiet_libraries()  # not `prepare`, which keeps freed memory: that would hide how much a method needs
    seed_everything(stage.seed, "methods")
    comparison = Comparison(stage)
    warn_of_few_steps(stage, comparison.config.steps, comparison.config.more_steps)
    names = list(comparison.config.compare)
    done_file = stage.state / "methods.jsonl"
    done = {row["name"]: row for row in read_finished_rows(done_file, "name", "result", "measurements")}
    steps, measurements = comparison.config.steps, {}
    with ProgressBar("methods", steps * len(names), "steps", done=steps * len(done)) as bar, done_file.open("a") as out:
        for name in names:
            if name in done:
                continue
            done[name] = comparison.run(name, bar)
            stage.attempt.check()
            out.write(canonical_json(done[name]) + "\n")
            out.flush()
            measurements[name] = done[name]["measurements"]
            stage.attempt.note("measurements", measurements)
            stage.stop.leave_if_requested(f"after {len(done)} of {len(names)} methods")
    return {
        "rows": len(comparison.rows),
        "texts": len(comparison.texts),
        "steps": steps,
        "base": {"learnt": statistics.fmean(comparison.base[0]), "unrelated": statistics.fmean(comparison.base[1])},
        "methods": {name: done[name]["result"] for name in names},
    }


if __name__ == "__main__":
    sys.exit(start("methods", run))
