"""How much device memory each stage of a run needs, where it fits, and what to change if it does not."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunetrail.config.base_model import HubModel, LocalModel, RandomModel
from tunetrail.config.run import Config
from tunetrail.config.shares import PAIRED
from tunetrail.config.training import Epochs, Lora
from tunetrail.errors import ConfigError
from tunetrail.launch.resources import gpus, processes
from tunetrail.models.memory import (
    FP32,
    LIBRARIES,
    PARTS,
    USABLE,
    Inference,
    Ppo,
    Run,
    Training,
    device_bytes,
    most,
    needed,
    ppo_plan,
    training_plan,
)
from tunetrail.models.sizes import sizes as sizes_of
from tunetrail.monitor.dag import Job
from tunetrail.provenance.memory import taken
from tunetrail.provenance.versions import records_of

GPU_GB = "gpu_gb"
"""The profile's resource for the GB of a GPU in a rule's partition."""

Shape = Training | Ppo | Inference


@dataclass(frozen=True)
class Need:
    """The memory that a stage needs on each device."""

    name: str
    moment: str
    """The moment with the most memory in use."""
    parts: dict[str, float]
    """Bytes, by `memory.PARTS`."""
    bytes: float
    """Their sum, plus what is in use before there is a model."""
    checkpointing: bool
    has: float | None
    """Bytes of the device that it gets; None if the profile does not say."""
    smallest: str | None
    """The smallest of the profile's partitions that holds it, or this machine."""
    change: str
    """What would make it fit, if no device holds it."""
    host: float
    """Bytes of main memory that a stage on a GPU takes to load its model and to check what it wrote."""
    host_has: float
    """Bytes of main memory that the profile requests for the first attempt."""
    taken: str
    """The peak of the existing artifact, with the error of its plan; empty if unknown."""

    @property
    def fits(self) -> bool:
        return self.has is None or self.bytes <= USABLE * self.has


# ----------------------------------------------------------------------------- the model


def model_config(config: Config, base: Path, given: Path | None) -> Any:
    """The run's base model's config from transformers. Nothing is downloaded.

    Args:
        base: the folder of the base model's artifact.
        given: a config.json, or a folder with one.

    Raises ConfigError if the model is not on this machine.
    """
    from transformers import AutoConfig

    from tunetrail.models.tiny import tiny_config, tiny_tokenizer

    source = config.base
    if given is None and isinstance(source, RandomModel):
        return tiny_config(source.hidden_size, source.layers, source.heads, len(tiny_tokenizer()))
    places: list[str | Path | None] = [given, base / "model" if (base / "model/config.json").exists() else None]
    places += [source.path if isinstance(source, LocalModel) else None]
    places += [source.repo if isinstance(source, HubModel) else None]
    place = next((found for found in places if found is not None), None)
    is_hub = isinstance(source, HubModel) and place == source.repo
    options: dict[str, Any] = {"revision": source.revision, "local_files_only": True} if is_hub else {}  # type: ignore[union-attr]
    try:
        if place is not None:
            return AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        if place is given:
            raise ConfigError(f"--model-config {given}: not a model's config: {str(error).splitlines()[0]}") from None
    raise ConfigError(
        "plan --memory: the base model is not here yet; make it (snakemake --until base), or name its config.json with "
        "--model-config"
    )


# ----------------------------------------------------------------------------- the stages


def _length(config: Config, new_tokens: int) -> int:
    return config.data.max_prompt_tokens + new_tokens


def _trained(
    config: Config, model: Any, block: Epochs, run: Run, sequences: int, answer: int, is_classifier: bool = False
) -> Training:
    """The plan for rows as long as the config allows."""
    is_full = getattr(block, "packing", False)
    length = block.max_length if is_full else min(block.max_length, _length(config, answer))
    return training_plan(block, model, run, length, answer, sequences, is_classifier)


def shape_of(config: Config, model: Any, name: str, run: Run) -> Shape | None:
    """The plan of a stage; None for a stage without a model of the run, or with little memory."""
    family, _, value = name.partition("/")
    answer = config.data.max_completion_tokens
    if config.completions:
        answer_sampled, k = config.completions.max_new_tokens, config.completions.per_prompt
    else:
        answer_sampled, k = answer, 2
    policy = config.policies.get(value) if family == "policies" else None
    if family == "sft" and config.trained_sft:
        return _trained(config, model, config.trained_sft, run, 1, answer)
    if family == "reward" and config.trained_reward:
        return _trained(config, model, config.trained_reward, run, k, answer_sampled, is_classifier=True)
    if policy and policy.method == "ppo":
        return ppo_plan(policy, model, run, _length(config, policy.max_new_tokens))
    if policy and policy.method in (*PAIRED, "kto"):
        return _trained(config, model, policy, run, 2 if policy.method in PAIRED else 1, answer_sampled)  # type: ignore[arg-type]
    sampling = {
        "completions": config.completions,
        "evaluation": config.evaluation,
        "retention": config.retention,
    }.get(family)
    if sampling is None:
        return None
    beside = 1 if family == "evaluation" and (config.reward or config.policies) else 0
    rows, length = sampling.batch_size, _length(config, sampling.max_new_tokens)  # type: ignore[attr-defined]
    return Inference(model, run, rows, length, keeps_model=family != "completions", beside=beside)


# ----------------------------------------------------------------------------- where it fits


def changes(shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Yields (a change of the config or the profile, the plan with that change), the mildest first."""
    if isinstance(shape, Inference):
        for rows in _halves(shape.rows):
            yield f"batch_size: {rows}", replace(shape, rows=rows)
        return
    one: Any = {"micro_batch": 1} if isinstance(shape, Training) else {"rows": 1}
    one["accumulates"] = True
    for n in _halves(shape.micro_batch if isinstance(shape, Training) else shape.rows):
        yield f"micro_batch_size: {n}", replace(shape, **one | {next(iter(one)): n})
    if isinstance(shape, Ppo):
        for episodes in _halves(shape.episodes):
            yield (
                f"batch_size: {episodes * shape.run.processes}, with micro_batch_size: 1",
                replace(shape, episodes=episodes, **one),
            )
        if shape.has_critic:
            yield "advantage: rloo, with micro_batch_size: 1", replace(shape, has_critic=False, **one)
    if shape.lora is None:
        yield "lora, with micro_batch_size: 1", replace(shape, lora=Lora(), **one)
        if isinstance(shape, Ppo):
            adapted = replace(shape, lora=Lora(), has_critic=False, **one)
            yield "lora and advantage: rloo, with micro_batch_size: 1", adapted
    if isinstance(shape, Ppo) and shape.shards == 1:
        for n in (2, 4, 8, 16):
            run = replace(shape.run, processes=n)
            episodes = max(shape.episodes * shape.run.processes // n, 1)
            spread = replace(shape, run=run, shards=n, episodes=episodes, **one)
            yield f"sharded: true on {n} GPUs, with micro_batch_size: 1", spread


def _halves(n: int) -> Iterator[int]:
    while n > 1:
        n //= 2
        yield n


def least(shape: Shape, available: float) -> tuple[bool, float]:
    """(whether with checkpointing, bytes); without it if that fits."""
    plain = needed(shape.run, shape.moments(False))
    if plain <= USABLE * available or isinstance(shape, Inference):
        return False, plain
    return True, needed(shape.run, shape.moments(True))


def _host(shape: Shape) -> float:
    """Main memory that a stage on a GPU needs: the model in fp32 once to load it, and once more to check the model that
    it wrote, if it writes one."""
    copies = 1 if isinstance(shape, Inference) else 2
    return LIBRARIES + copies * FP32 * sizes_of(shape.config).parameters if shape.run.on_gpu else 0.0


def partitions(jobs: list[Job]) -> dict[str, float]:
    """Partition -> bytes of one of its GPUs, for the partitions whose size the profile gives."""
    return {
        str(job.resources["slurm_partition"]): float(job.resources[GPU_GB]) * 1e9
        for job in jobs
        if job.resources.get("slurm_partition") and job.resources.get(GPU_GB) and gpus(job.resources)
    }


def _run_of(job: Job, precision: str) -> Run:
    from tunetrail.models.runtime import use_bf16

    nodes = int(job.resources.get("nodes") or 1)
    # The GPU cannot be asked from here; `auto` means bf16 on all GPUs made since 2020.
    on_gpu = bool(gpus(job.resources))
    return Run(
        precision != "fp32" if on_gpu else use_bf16(precision), on_gpu, processes(job.rule, job.resources) * nodes
    )


def need(job: Job, shape: Shape, there: Mapping[str, float]) -> Need:
    """The need of one stage, where it fits, and what would make it fit.

    Args:
        there: partition -> bytes of one of its GPUs.
    """
    on_gpu = shape.run.on_gpu
    has = there.get(str(job.resources.get("slurm_partition"))) if on_gpu else float(device_bytes())
    sizes = there if on_gpu else {"this machine": float(device_bytes())}
    checkpointing, size = least(shape, has if has is not None else max(sizes.values(), default=float("inf")))
    moment, parts = most(shape.moments(checkpointing))
    holding = sorted((n, name) for name, n in sizes.items() if size <= USABLE * n)
    change = ""
    if sizes and not holding:
        largest = max(sizes.values())
        found = next((text for text, other in changes(shape) if least(other, largest)[1] <= USABLE * largest), None)
        change = found or "a smaller model, or GPUs with more memory"
    record = records_of({job.name: job.manifest.parent}).get(job.name)
    return Need(
        name=job.name,
        moment=moment,
        parts={part: parts.get(part, 0.0) for part in PARTS},
        bytes=size,
        checkpointing=checkpointing,
        has=has,
        smallest=holding[0][1] if holding else None,
        change=change,
        host=_host(shape),
        host_has=float(job.resources.get("mem_mb") or 0) * 1e6,
        taken=taken(record) if record else "",
    )


def needs(config: Config, jobs: list[Job], given: Path | None = None) -> list[Need]:
    """The needs of every stage with a model of the run in memory; equal shards count once.

    Args:
        given: a config.json of the base model, if the model is not on this machine.

    Raises ConfigError if the base model is unknown.
    """
    base = next(job for job in jobs if job.name == "base")
    model, there = model_config(config, base.manifest.parent, given), partitions(jobs)
    found, seen = [], set()
    for job in jobs:
        shape = shape_of(config, model, job.name, _run_of(job, config.precision))
        if shape is not None and (job.rule, repr(shape)) not in seen:
            seen.add((job.rule, repr(shape)))
            found.append(need(job, shape, there))
    return found


# ----------------------------------------------------------------------------- as text


def _gb(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e9:.1f}"


def as_text(found: list[Need]) -> str:
    """A table in GB per device, followed by a line for each stage that does not fit."""
    table = [["GB per device", *PARTS, "most", "of", "at", "fits on"]]
    for n in found:
        at = f"{n.moment}, checkpointing" if n.checkpointing else n.moment
        table.append([n.name, *(_gb(n.parts[p]) for p in PARTS), _gb(n.bytes), _gb(n.has), at, n.smallest or "none"])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    for n in found:
        if n.smallest is None and n.change:
            lines.append(f"{n.name}: {_gb(n.bytes)} GB fit on no partition of the profile; change: {n.change}")
        elif not n.fits:
            lines.append(f"{n.name}: {_gb(n.bytes)} GB are more than its partition has; send it to {n.smallest}")
        elif n.smallest is None:
            lines.append(f"{n.name}: set {GPU_GB} in the profile, the GB of a GPU of its partition")
        if n.host > n.host_has > 0:
            lines.append(f"{n.name}: takes {_gb(n.host)} GB of its node too; raise mem_mb in the profile to that")
        if n.taken:
            lines.append(f"{n.name}: took at most {n.taken}, for the rows that it had")
    return "\n".join([*lines, "Rows are taken to be as long as the config allows; shorter ones need less."])


def as_json(found: list[Need]) -> list[dict[str, Any]]:
    return [asdict(n) | {"fits": n.fits} for n in found]
