"""Several raw texts in one row: nothing is lost, each token is learnt as in its own text, it resumes exactly."""
# ruff: noqa: F811 (fixtures of another module)

import json
import random

import pytest
import torch

from tunetrail.errors import ConfigError
from tunetrail.files import read_jsonl
from tunetrail.models.packing import PackedCollator, check_packs, pack, packed, tokenize_packed
from tunetrail.models.tiny import tiny_model, tiny_tokenizer

from .test_training import run_stage, tokenizer_of, workspace, write_artifact  # noqa: F401

pytestmark = pytest.mark.slow


def test_rows_hold_every_block_once_and_are_nearly_full():
    rng = random.Random(0)
    lengths = [rng.randint(2, 40) for _ in range(300)]
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(300))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 64
    assert len(rows) <= 1.03 * sum(lengths) / 64
    assert rows == pack(lengths, 64)


def test_blocks_of_different_weight_share_no_row():
    blocks = [{"input_ids": [i, i]} | ({"weight": 2.5} if i % 2 else {}) for i in range(1, 7)]
    rows = packed(blocks, 64)
    assert [(row["input_ids"], row.get("weight")) for row in rows] == [
        ([2, 2, 4, 4, 6, 6], None), ([1, 1, 3, 3, 5, 5], 2.5),
    ]  # fmt: skip
    assert rows[0]["labels"] == [-100, 2, -100, 4, -100, 6]


def test_what_is_cut_and_left_out_is_counted_and_said(caplog):
    rows = [{"id": "1", "text": "abcdefghi"}, {"id": "2", "text": "abcd"}, {"id": "3", "text": "ab"},
        {"id": "4", "prompt": "a", "completion": "b"}]  # fmt: skip
    with caplog.at_level("INFO", "tunetrail"):
        examples, counts = tokenize_packed(rows, tiny_tokenizer(), 4, "sft")
    # With EOS 10, 5 and 3 tokens: blocks of 4, 4, 2; 4, 1; 3.
    assert counts == {"packed_texts": 3, "packed_rows": 5, "texts_cut": 2, "tokens_left_out": 1}
    assert sorted(len(example["input_ids"]) for example in examples) == [2, 3, 3, 4, 4, 4]
    assert caplog.records[-1].getMessage() == (
        "sft: packed 3 texts into 5 rows, 85% full; 2 are longer than max_length (4) and were cut into blocks that do "
        "not see what stood before; tokens left out, alone in a block: 1"
    )
    with pytest.raises(ConfigError, match=r"sft.packing: there is no raw text to pack; remove it"):
        tokenize_packed(rows[-1:], tiny_tokenizer(), 4, "sft")


def test_logits_of_packed_texts_are_those_of_each_text_alone():
    model = tiny_model(16, 2, 2, 60, seed=0).eval()
    texts = [[5, 6, 7], [8, 9, 10, 11], [5, 7], [12, 6, 5, 9, 8, 7]]
    rows = packed([{"input_ids": ids} for ids in texts], 9)
    batch = PackedCollator(0)(rows)
    assert batch["input_ids"].shape == (2, 9)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    seen = 0
    for row, of_row in zip(rows, logits, strict=True):
        start = 0
        for n in row["seq_lengths"]:
            alone = model(input_ids=torch.tensor([row["input_ids"][start : start + n]])).logits[0]
            torch.testing.assert_close(of_row[start : start + n], alone, atol=1e-5, rtol=0)
            start, seen = start + n, seen + 1
    assert seen == 4


def test_a_model_that_mixes_texts_is_refused():
    model = tiny_model(16, 2, 2, 60, seed=0).eval()
    check_packs(model, "sft")
    forward = model.forward
    model.forward = lambda input_ids, position_ids=None, **kwargs: forward(input_ids, **kwargs)
    with pytest.raises(ConfigError, match=r"sft.packing: this model does not keep packed texts apart"):
        check_packs(model, "sft")


@pytest.fixture
def texts(workspace):
    """Twelve short raw texts beside twelve demonstrations."""
    rows = read_jsonl(workspace / "data/sft.jsonl")
    rows[:12] = [
        {"id": f"t{i}", "group": f"t{i}", "source": "t", "text": f"text {i} " * (i % 4 + 1)} for i in range(12)
    ]
    write_artifact(workspace / "data", {"sft.jsonl": rows}, tokenizer_of(workspace / "data"))


def test_training_on_packed_texts_is_training_on_the_texts(run_stage, workspace, texts):
    """One step on all rows: the same loss before and after it and the same gradient, of fewer rows."""
    found = {}
    for packing, n in ((False, 24), (True, None)):
        if n is None:
            rows, _ = tokenize_packed(read_jsonl(workspace / "data/sft.jsonl"), tiny_tokenizer(), 128, "sft")
            n = len(rows)
            assert n < 18
        config = {"batch_size": n, "epochs": 1, "packing": packing, "max_length": 128, "evaluate_every": 1}
        code, error, output = run_stage("sft", f"packing-{packing}", config=config)
        assert code == 0, error
        metrics = json.loads((output.parent / "metrics.json").read_text())
        found[packing] = (read_jsonl(output.parent / "history.jsonl")[0], metrics)
    (row, metrics), (other, packed_metrics) = found[False], found[True]
    for key in ("loss", "heldout_loss", "mean_token_accuracy", "grad_norm"):
        assert other[key] == pytest.approx(row[key], abs=1e-4), key
    assert packed_metrics["tokens"] == metrics["tokens"]
    assert packed_metrics["packed_texts"] == 12
    assert not {key for key in metrics if "packed" in key}


def test_packed_training_that_was_stopped_ends_with_the_same_bytes(run_stage, texts):
    config = {"batch_size": 4, "epochs": 2, "packing": True, "max_length": 64, "evaluate_every": 2, "patience": 9}
    code, error, straight = run_stage("sft", "straight", config=config)
    assert code == 0, error
    for _ in range(2):
        assert run_stage("sft", "stopped", config=config, time_limit="0")[0] == 75
    code, error, stopped = run_stage("sft", "stopped", config=config)
    assert code == 0, error
    assert stopped.read_bytes() == straight.read_bytes()


def test_packing_without_raw_text_is_one_clear_line(run_stage):
    code, error, output = run_stage("sft", "none", config={"packing": True})
    assert code == 78
    assert error.strip().splitlines()[-1].endswith("sft.packing: there is no raw text to pack; remove it")
    assert not output.exists()
