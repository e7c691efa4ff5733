"""The memory plan: counts against real models, activations against autograd, and what to do where memory is short."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from tunetrail.config.loading import parse, read_yaml
from tunetrail.config.training import Lora
from tunetrail.errors import ConfigError
from tunetrail.models import memory
from tunetrail.models.cpu.attention import PLAIN
from tunetrail.models.loading import trained_parameters, with_lora
from tunetrail.models.memory import Inference, Run, Training
from tunetrail.models.sampling import decoding_weights, inference_weights
from tunetrail.models.sizes import saved, sizes
from tunetrail.monitor import memory as monitor
from tunetrail.monitor.dag import Job
from tunetrail.provenance.memory import as_lines
from tunetrail.provenance.versions import records_of

from ..records import ATTEMPT, seal_folder

ROOT = Path(__file__).parents[2]

LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, tie_word_embeddings=False,
)  # fmt: skip
TIED = LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
GPT2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=64)
CPU = Run(bf16=False, on_gpu=False)


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2])
@pytest.mark.parametrize("lora", [None, Lora(r=3)])
def test_what_is_counted_is_what_the_model_has(config, lora):
    real, found = with_lora(AutoModelForCausalLM.from_config(config), lora, 0), sizes(config, lora)
    counted = trained_parameters(real)
    assert (found.parameters, found.trained) == (counted["parameters"], counted["parameters_trained"])


def test_an_adapter_on_some_layers_is_counted():
    lora = Lora(r=2, target_modules=["q_proj", "down_proj"])
    assert sizes(LLAMA, lora).trained == 3 * 2 * ((32 + 32) + (80 + 32))


@pytest.mark.parametrize("config", [LLAMA, TIED])
def test_a_classifier_has_no_output_head(config):
    classifier = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    trunk = sum(p.numel() for p in classifier.base_model.parameters())
    found = sizes(config).classifier
    assert found.parameters == found.trained == trunk
    assert found.products == sum(
        m.weight.numel() for m in classifier.base_model.modules() if type(m) is torch.nn.Linear
    )


def really_saved(config, length: int, lora: Lora | None) -> int:
    """Bytes that autograd saves in a forward pass of a whole trunk with real weights."""
    model = with_lora(AutoModelForCausalLM.from_config(config, attn_implementation=PLAIN), lora, 0).train()
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trunk = (model.get_base_model() if lora else model).base_model
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        output = trunk(input_ids=torch.zeros(1, length, dtype=torch.long), attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for key, storage in found.items() if key not in own)


@pytest.mark.parametrize("lora", [None, Lora(r=3)])
def test_three_layers_keep_what_the_first_one_says(lora):
    found = saved(LLAMA, 24, False, lora)
    assert 3 * found.layer + found.rest == pytest.approx(really_saved(LLAMA, 24, lora), rel=0.02)


def test_autocast_keeps_less_and_planning_draws_no_random_number():
    state = torch.get_rng_state()
    wide, narrow = saved(LLAMA, 16, False, Lora()), saved(LLAMA, 16, True, Lora())
    assert 0.4 * wide.layer < narrow.layer < wide.layer
    assert torch.get_rng_state().equal(state)


def test_the_moments_of_a_training_by_hand():
    size, kept = sizes(LLAMA), saved(LLAMA, 24, False)
    shape = Training(LLAMA, CPU, micro_batch=2, length=24, accumulates=False, sequences=2)
    n, moments = size.parameters, shape.moments(False)
    assert moments["step"] == {"weights": 4 * n, "optimizer": 8 * n, "gradients": 4 * n}
    assert moments["loss"]["activations"] == 4 * (3 * kept.layer + kept.rest)
    assert moments["loss"]["gradients"] == 4 * n  # freed blocks stay
    assert moments["publishing"]["weights"] == 8 * n  # loaded once more
    on_gpu = replace(shape, run=replace(CPU, on_gpu=True))
    assert "publishing" not in on_gpu.moments(False)
    assert on_gpu.moments(False)["loss"]["gradients"] == 0
    assert replace(on_gpu, accumulates=True).moments(False)["loss"]["gradients"] == 4 * n
    several = replace(shape, run=replace(CPU, processes=2)).moments(False)
    assert several["loss"]["gradients"] == 8 * n  # once more, in the buckets that are reduced
    less = shape.moments(True)["loss"]["activations"]
    assert less == 4 * (3 * 24 * 32 * 4 + kept.layer + kept.rest)
    adapted = replace(shape, lora=Lora(r=2), run=replace(CPU, bf16=True)).moments(False)["step"]
    size = sizes(LLAMA, Lora(r=2))
    assert adapted["optimizer"] == 8 * size.trained
    assert adapted["weights"] == 4 * (size.parameters - size.frozen_products) + 2 * size.frozen_products


def test_the_cache_by_hand():
    found = Inference(LLAMA, CPU, rows=5, length=7).moments()["sampling"]
    assert found["kv cache"] == 5 * 7 * 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, bytes
    assert found["weights"] == 4 * sizes(LLAMA).parameters


@pytest.mark.parametrize("lora", [None, Lora(r=3)])
def test_a_decoder_cast_weight_by_weight_is_the_one_cast_at_once(lora):
    model = with_lora(AutoModelForCausalLM.from_config(TIED), lora, 0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # an adapter starts at 0
    whole = copy.deepcopy(model)
    whole = inference_weights(whole.merge_and_unload() if lora else whole, True)
    decoder = decoding_weights(model, True)
    assert type(decoder) is type(whole)
    for a, b in zip(whole.state_dict().items(), decoder.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert a[1].is_mkldnn or torch.equal(a[1], b[1]), a[0]
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(whole(input_ids=ids).logits, decoder(input_ids=ids).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ----------------------------------------------------------------------------- the plan of a run


GPU = {"slurm_partition": "gpu", "gres": "gpu:1", "gpu_gb": 40}
BIG = GPU | {"slurm_partition": "large", "gpu_gb": 80}
CONTENT = {
    "run": "r", "precision": "bf16", "base": {"source": "hub", "repo": "a/b", "revision": "c"},
    "data": {"demonstrations": [{"source": "docstrings"}], "preferences": [{"source": "file", "path": "p.jsonl"}]},
    "sft": {"batch_size": 8, "max_length": 256},
    "policies": {"dpo": {"method": "dpo", "batch_size": 8, "lora": {"r": 8}}},
}  # fmt: skip
ONE_B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
EIGHT_B = ONE_B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip


def job(folder: Path, name: str, resources: dict) -> Job:
    rule = name.split("/")[-1]
    return Job(name, rule, folder / name / "manifest.json", None, None, None, 1, resources, True)


def planned(folder: Path, model: dict, **resources: dict) -> dict[str, monitor.Need]:
    (folder / "config.json").write_text(json.dumps(model))
    jobs = [job(folder, "base", {"slurm_partition": "cpu"})]
    jobs += [job(folder, name, given) for name, given in resources.items()]
    return {n.name: n for n in monitor.needs(parse(CONTENT), jobs, folder / "config.json")}


def test_a_stage_goes_to_the_smallest_partition_that_holds_it(tmp_path):
    found = planned(tmp_path, ONE_B, sft=GPU, evaluation=BIG)
    assert found["sft"].parts["optimizer"] == pytest.approx(8 * 1.236e9, rel=0.001)
    assert found["sft"].smallest == found["evaluation"].smallest == "gpu"
    assert found["sft"].fits
    assert not found["sft"].change


def test_every_policy_that_trains_is_planned_as_its_stage_would_be(tmp_path):
    """A pair is two sequences, a rating is one; packed rows are as long as they may be."""
    (tmp_path / "config.json").write_text(json.dumps(ONE_B))
    content = copy.deepcopy(CONTENT)
    content["data"]["feedback"] = [{"source": "file", "path": "f.jsonl"}]
    content["sft"]["packing"] = True
    content["policies"] = {name: {"method": name, "batch_size": 8} for name in ("dpo", "orpo", "simpo", "kto")}
    config, model = parse(content), monitor.model_config(parse(content), tmp_path, tmp_path / "config.json")
    shapes = {name: monitor.shape_of(config, model, f"policies/{name}", Run(True, True)) for name in config.policies}
    assert {name: shape.sequences for name, shape in shapes.items()} == {"dpo": 2, "orpo": 2, "simpo": 2, "kto": 1}
    assert monitor.shape_of(config, model, "sft", Run(True, True)).length == 256


def test_where_nothing_holds_it_the_plan_says_what_to_change(tmp_path):
    found = planned(tmp_path, EIGHT_B, sft=BIG, evaluation=BIG)
    assert found["sft"].bytes > 128e9
    assert found["sft"].checkpointing
    assert not found["sft"].fits
    assert found["sft"].smallest is None
    assert found["sft"].change == "lora, with micro_batch_size: 1"
    text = monitor.as_text(list(found.values()))
    assert "GB fit on no partition of the profile; change: lora, with micro_batch_size: 1" in text


def test_a_partition_that_is_too_small_is_named_with_one_that_is_not(tmp_path):
    found = planned(tmp_path, ONE_B, sft=GPU | {"gpu_gb": 10}, evaluation=BIG)
    assert not found["sft"].fits
    assert "are more than its partition has; send it to large" in monitor.as_text([found["sft"]])


def test_a_model_that_is_not_here_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"the base model is not here yet; make it \(snakemake --until base\)"):
        monitor.needs(parse(CONTENT), [job(tmp_path, "base", {})])
    with pytest.raises(ConfigError, match=r"--model-config .*: not a model's config"):
        monitor.needs(parse(CONTENT), [job(tmp_path, "base", {})], tmp_path / "nothing")


def test_what_is_needed_is_the_moment_with_most():
    moments = {"a": {"weights": 1.0}, "b": {"weights": 2.0, "logits": 3.0}}
    assert memory.most(moments) == ("b", {"weights": 2.0, "logits": 3.0})
    assert memory.needed(CPU, moments) == memory.LIBRARIES + 5


def test_what_was_taken_is_said_with_the_error_of_the_plan(tmp_path):
    attempt = ATTEMPT | {
        "peak_bytes": 4_000_000_000,
        "planned": {"bytes": 4_400_000_000, "gradient_checkpointing": False},
    }
    for name in ("sft", "data"):
        (tmp_path / name).mkdir()
    seal_folder(tmp_path / "sft", "sft", attempts=[ATTEMPT | {"peak_bytes": 5}, attempt])
    seal_folder(tmp_path / "data", "data", attempts=[ATTEMPT | {"peak_bytes": 5}])
    records = records_of({name: tmp_path / name for name in ("sft", "data")})
    assert as_lines(records) == ["Memory at most: sft 4.0 GB (plan +10%)"]
    assert as_lines({}) == []


@pytest.mark.parametrize(("name", "model"), [("llama-8b-h100", EIGHT_B), ("llama-1b-a100", ONE_B)])
def test_the_large_examples_fit_the_profile_on_paper(tmp_path, name, model):
    """Nothing more is known of them: none has run on a GPU."""
    path = ROOT / f"config/examples/{name}.yaml"
    assert "NEVER RUN ON A GPU" in path.read_text()
    config = parse(read_yaml(path))
    (tmp_path / "config.json").write_text(json.dumps(model))
    names = ["base", "retention", "sft", "completions/0-of-2", "reward", "evaluation/sft"]
    names += [f"policies/{policy}" for policy in config.policies]
    resources = BIG | {"mem_mb": 128000}
    jobs = [job(tmp_path, name, resources) for name in names]
    found = monitor.needs(config, jobs, tmp_path / "config.json")
    assert len(found) == 7  # base and best_of_n have no model in memory
    assert [n.name for n in found if not n.fits or n.change or n.host > n.host_has] == []
