"""What single optimisations gain: python -m tests.benchmarks.parts NAME {with|without}"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any


def llama(layers: int, **changes: Any) -> Any:
    """A random Llama of SmolLM2's width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"num_hidden_layers": layers, "vocab_size": 8192} | changes)))


def seconds_a_step(step: Callable[[], None], n: int) -> float:
    """The mean over n steps, after one to warm up."""
    step()
    start = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - start) / n


def forwards_and_backwards(model: Any, ids: Any) -> None:
    """The gradient of the loss on these tokens, in bf16 autocast."""
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()


def training_steps(keep_memory: bool) -> float:
    """Seconds per training step of a 30-layer Llama of SmolLM2's width."""
    import torch

    from tunetrail.models.cpu.memory import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    model = llama(layers=30)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 8192, (8, 64))

    def step() -> None:
        forwards_and_backwards(model, ids)
        optimizer.step()
        optimizer.zero_grad()

    return seconds_a_step(step, 4)


def fine_tuning(ours: bool) -> float:
    """Seconds per step of SFT on 16 rows of 50 prompt and 14 response tokens, with our loss or TRL's."""
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tunetrail.models.cpu.label_head import score_labels_only
    from tunetrail.models.tiny import tiny_tokenizer

    model = llama(layers=8, vocab_size=49152, tie_word_embeddings=True)
    rows = [
        {
            "input_ids": [7 + (i * j) % 49000 for j in range(64)],
            "labels": [-100] * 50 + [7 + (i * j) % 49000 for j in range(50, 64)],
        }
        for i in range(1, 65)
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=16, bf16=True, use_cpu=True,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, report_to=[], disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    if ours:
        score_labels_only(trainer.model)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    return (time.perf_counter() - start) / 4 / 3


def reward_steps(share_prompts: bool) -> float:
    """Seconds per step of the K-wise loss on 4 prompts of 43 tokens with 4 responses of 14 each."""
    import torch

    from tunetrail.models.tree import without_sharing
    from tunetrail.reward.kwise import KWiseCollator, initialise, kwise_loss, kwise_scores

    model = initialise(llama(layers=8, pad_token_id=0), seed=0)
    responses = [[7 + (i * j) % 8000 for j in range(14)] for i in range(1, 5)]
    prompts = [[7 + (i * j) % 8000 for j in range(43)] for i in range(5, 9)]
    examples = [{"prompt": p, "responses": responses, "targets": torch.full((4, 4), 0.5).tolist()} for p in prompts]
    if not share_prompts:
        without_sharing(model)
    batch = KWiseCollator(0)(examples)

    def step() -> None:
        kwise_loss(kwise_scores(model, batch), batch["targets"], batch["mask"]).backward()
        model.zero_grad()

    return seconds_a_step(step, 8)


def scoring(shared_start: bool) -> float:
    """Seconds to score 96 responses of 12 tokens to prompts of 20 shared and 24 other tokens."""
    import torch

    from tunetrail.models.scoring import map_batches, response_logprobs
    from tunetrail.models.tiny import tiny_model
    from tunetrail.models.tree import share_prefixes

    model = tiny_model(576, 8, 9, 8192, seed=0)
    if shared_start:
        share_prefixes(model)
    prompts = [list(range(2, 22)) + [22 + (i * j) % 8000 for j in range(24)] for i in range(1, 97)]
    responses = [[22 + (i + j) % 8000 for j in range(12)] for i in range(96)]

    def logprobs(batch):
        return response_logprobs(model, batch)

    map_batches(logprobs, prompts[:8], responses[:8], 0, torch.device("cpu"))
    start = time.perf_counter()
    map_batches(logprobs, prompts, responses, 0, torch.device("cpu"))
    return time.perf_counter() - start


def attending(by_products: bool) -> float:
    """Seconds per bf16 training step of 8 layers on 16 rows of 90 tokens, with plain products or fused attention."""
    import torch

    from tunetrail.models.cpu.attention import plain_attention

    model = llama(layers=8)
    if by_products:
        plain_attention(model)
    ids = torch.randint(0, 8192, (16, 90))

    def step() -> None:
        forwards_and_backwards(model, ids)
        model.zero_grad()

    return seconds_a_step(step, 8)


def decoding(packed: bool) -> float:
    """Seconds per decoding step of 30 layers in bf16 for 16 rows, with packed or plain weights."""
    import torch

    from tunetrail.models.sampling import inference_weights

    model = llama(layers=30, vocab_size=49152).eval()
    model = inference_weights(model, True) if packed else model.to(torch.bfloat16)
    ids = torch.ones(16, 1, dtype=torch.long)

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    return seconds_a_step(step, 20)


PARTS = {
    "training step, freed memory kept / given back": training_steps,
    "fine-tuning step, logits where labels are / TRL's fused head": fine_tuning,
    "reward-model step, what sequences share computed once / repeated": reward_steps,
    "training step in bf16, attention as products / torch's fused": attending,
    "decoding step of 16 rows in bf16, weights packed / plain": decoding,
    "scoring, what all prompts begin with once / repeated": scoring,
}

if __name__ == "__main__":
    name, with_or_without = sys.argv[1:]
    print(json.dumps({"seconds": PARTS[name](with_or_without == "with")}))
