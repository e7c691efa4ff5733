"""Exports a model of a run as one plain folder, and pushes such a folder to a hub.

The folder holds weights in one precision, config, generation config, tokenizer, chat template, the full card and
`SHA256SUMS`; `from_pretrained` needs nothing else. A model kept along the way may be just an adapter: it is merged into
the model that its stage started from, which the record names. The folder gets its name only after what was written has
been loaded back and compared.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tunetrail.contract.artifact import verify
from tunetrail.errors import ConfigError, DataError, TunetrailError
from tunetrail.files import settle
from tunetrail.models.loading import copy_tokenizer, load_tokenizer, with_adapter
from tunetrail.models.saving import SENTENCE, answers, differences, save_weights
from tunetrail.provenance.lineage import Lineage
from tunetrail.provenance.manifest import MANIFEST, list_files
from tunetrail.provenance.models import is_reward_model
from tunetrail.provenance.record import read_record

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = {"fp32": "f32", "bf16": "bf16"}
SUMS = "SHA256SUMS"
WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.gguf"]

# ----------------------------------------------------------------------------- which model


@dataclass(frozen=True)
class RunModel:
    """A model of a run: the final one of an artifact, or one that was kept along the way."""

    artifact: Path
    folder: Path
    """Has weights and config. For a kept adapter: the `model/` that it is merged into."""
    adapter: Path | None = None
    step: int | None = None
    """The training step of a kept checkpoint; None for the final model."""

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def is_reward_model(self) -> bool:
        return is_reward_model(self.config)

    def load(self) -> Any:
        """Loads it in float32, as plain transformers does."""
        if self.adapter is not None:
            return with_adapter(self.folder, self.adapter).eval()
        auto = AutoModelForSequenceClassification if self.is_reward_model else AutoModelForCausalLM
        return auto.from_pretrained(self.folder, dtype=torch.float32, trust_remote_code=False).eval()


def find_model(path: Path) -> RunModel:
    """The model that a path names: an artifact, its manifest, its `model/`, or `checkpoints/<step>` in it.

    Raises DataError if there is none, or if the artifact, or the one that an adapter is merged into, differs from its
    manifest.
    """
    if not path.exists():
        raise DataError(f"{path}: no such model")
    artifact = next((at for at in (path, *path.parents) if (at / MANIFEST).is_file()), None)
    if artifact is None:
        raise DataError(
            f"{path}: not a model of a run, for neither it nor a folder above has a {MANIFEST}; name one such as "
            "results/demo/policies/dpo, or one kept along the way such as results/demo/policies/dpo/checkpoints/6"
        )
    inside = path.relative_to(artifact).parts
    if inside[:1] == ("checkpoints",) and len(inside) in (2, 3) and inside[1].isdigit():
        return _kept(artifact, int(inside[1]))
    if inside not in ((), (MANIFEST,), ("model",), ("adapter",)) or not (artifact / "model/config.json").exists():
        what = "best-of-n has no weights of its own" if (artifact / "policy.json").exists() else "it holds no model"
        raise DataError(f"{path}: {what}; name the artifact of a base, sft, reward, dpo, orpo, simpo, kto or ppo stage")
    verify(artifact / MANIFEST)
    return RunModel(artifact, artifact / "model")


def _kept(artifact: Path, step: int) -> RunModel:
    """The model that an artifact kept at this step."""
    verify(artifact / MANIFEST)
    checkpoint = artifact / "checkpoints" / str(step)
    if not (checkpoint / "adapter").exists():
        return RunModel(artifact, checkpoint / "model", step=step)
    recorded, node = read_record(artifact).parents.get("policy"), Lineage().add(artifact)
    start = node.parents.get("policy")
    if recorded is None or start is None or start.identity != recorded["manifest"]:
        name = recorded["name"] if recorded else "not in its record"
        raise DataError(
            f"{checkpoint}: the model that this adapter was trained on ({name}) is gone or has changed; restore it, "
            "since the adapter is useless without it"
        )
    verify(start.folder / MANIFEST)
    return RunModel(artifact, start.folder / "model", checkpoint / "adapter", step)


# ----------------------------------------------------------------------------- one folder


def export(
    path: Path, out: Path, dtype: Dtype = "fp32", gguf: bool = False, say: Callable[[str], None] = print
) -> None:
    """Writes the model that `path` names into the new folder `out`, completely or not at all.

    Raises ConfigError if `out` cannot be used or the converter to GGUF is missing, DataError if the artifact differs
    from its manifest, and TunetrailError if the folder does not load as the model it was made from.
    """
    from tunetrail.provenance.exports.common import lineage_of
    from tunetrail.provenance.exports.model_card import of_artifact

    converter = find_converter() if gguf else None
    if out.exists():
        raise ConfigError(f"{out}: already exists; name a new folder, or remove it")
    if inside := next((at for at in out.resolve().parents if (at / MANIFEST).exists()), None):
        raise ConfigError(f"{out}: is inside the artifact {inside}, which would then differ from its manifest")
    source, pending = find_model(path), out.with_name(f".{out.name}.new")
    lineage_of(source.artifact)  # raises for a missing record before anything large is written
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    try:
        _write_model(source, pending, dtype, say)
        if converter is not None:
            convert(converter, pending, dtype)
        card = of_artifact(source.artifact, model=pending, title=out.resolve().name, step=source.step)
        (pending / "README.md").write_text(card, encoding="utf-8")
        sums = [f"{file['sha256']}  {file['path']}\n" for file in list_files(pending)]
        (pending / SUMS).write_text("".join(sums), encoding="utf-8")
        settle(pending)
        pending.rename(out)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    if source.adapter is not None:
        say(f"merged the adapter of step {source.step} into {source.folder}")
    say(f"{out}: {len(sums) + 1} files, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:,.1f} MB, {dtype}")


def _write_model(source: RunModel, folder: Path, dtype: Dtype, say: Callable[[str], None]) -> None:
    """Writes weights, configs and tokenizer, loads them back and compares."""
    tokenizer, model = load_tokenizer(source.folder), source.load()
    rows = [tokenizer.encode(SENTENCE)]
    exact = answers(model, rows)
    # Parameters alone: transformers keeps other tensors, such as rotary frequencies, in float32 when it loads bf16.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    expected = answers(model, rows)
    save_weights(model, folder)
    copy_tokenizer(source.folder, folder)
    auto = AutoModelForSequenceClassification if source.is_reward_model else AutoModelForCausalLM
    if wrong := differences(folder, tokenizer, rows, expected, auto):
        raise TunetrailError(f"{source.artifact}: what was written loads as another model: {wrong}. Nothing was kept")
    if dtype != "fp32":
        change = max((a - b).abs().max().item() for a, b in zip(exact, expected, strict=True))
        what = "the score" if source.is_reward_model else "log-probs of tokens"
        say(f"rounded to {dtype}: {what} of a test sentence changed by up to {change:.2g}")


def find_converter() -> str:
    """The path of llama.cpp's converter. Raises ConfigError if there is none."""
    if converter := shutil.which(CONVERTER):
        return converter
    raise ConfigError(
        f"--gguf: {CONVERTER} is not on the PATH; clone https://github.com/ggml-org/llama.cpp and add its folder to "
        "PATH, or export without --gguf"
    )


def convert(converter: str, folder: Path, dtype: Dtype) -> None:
    """Writes `model.gguf` next to the weights. If the converter fails, raises TunetrailError with its last line."""
    target = folder / "model.gguf"
    command = [sys.executable, converter, str(folder), "--outfile", str(target), "--outtype", GGUF_TYPES[dtype]]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode or not target.exists():
        last = next(iter((process.stderr or process.stdout).strip().splitlines()[-1:]), "it wrote no file")
        raise TunetrailError(
            f"--gguf: {converter} failed with exit code {process.returncode}: {last}; export without --gguf, or use a "
            "llama.cpp that knows this model and tokenizer"
        )


# ----------------------------------------------------------------------------- to a hub


def check_sums(folder: Path) -> list[dict[str, Any]]:
    """The files of an exported folder, compared with its SHA256SUMS. Raises DataError if anything differs."""
    path = folder / SUMS
    if not path.is_file():
        raise DataError(f"{folder}: has no {SUMS}; write a folder to push with `tunetrail model export`")
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in path.read_text().splitlines())}
    files = list_files(folder)
    actual = {file["path"]: file["sha256"] for file in files if file["path"] != SUMS}
    if wrong := sorted(name for name in listed.keys() | actual.keys() if listed.get(name) != actual.get(name)):
        raise DataError(
            f"{folder}: {len(wrong)} files differ from {SUMS}, {wrong[0]} first; export it again, and edit the card on "
            "the hub"
        )
    return [dict(file) for file in files]


def push(
    folder: Path, repo: str, public: bool = False, dry_run: bool = False, say: Callable[[str], None] = print
) -> None:
    """Uploads an exported folder to a repository of the Hugging Face hub, which is created if it does not exist.

    Weights from an earlier push that this folder lacks are removed. Raises DataError if the folder is not what `export`
    wrote, and TunetrailError with the hub's message if the upload fails.

    Args:
        public: whether a new repository is public; an existing one stays as it is.
        dry_run: only says what would be sent, without contacting the hub.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of whichever client it uses

    files = check_sums(folder)
    for file in files:
        say(f"{file['size']:>14,}  {file['path']}")
    about = ModelCard.load(folder / "README.md").data
    say(f"licence {about.license or 'not stated'}, base model {about.base_model or 'not on the hub'}")
    visibility = "public" if public else "private"
    target = f"{repo} ({visibility} if it is new)"
    if dry_run:
        say(f"{len(files)} files would go to {target}; nothing was sent")
        return
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            delete_patterns=WEIGHTS,
            commit_message=f"Upload {folder.resolve().name}, a model of a tunetrail run",
        )
    except (OSError, HTTPError, HFValidationError) as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise TunetrailError(
            f"{repo}: the hub refused or was not reached: {reason}; `hf auth login` signs in"
        ) from None
    say(f"{len(files)} files are in {target}: {commit.commit_url}")
