"""Patches for what libraries do slowly on a CPU. Each says when it can go.

    attention    computes the attention of short rows as plain matrix products. Not needed once torch's fused attention
                 uses the CPU's bf16 products for them (torch 2.13 does not).
    label_head   computes no logits for prompts in TRL's trainers. Not needed once TRL's fused head skips ignored
                 positions without Triton (trl 1.16 does not).
    memory       keeps freed blocks. Not needed with an allocator that keeps them (jemalloc, tcmalloc).

`make bench ONLY=parts` measures each with and without.
"""
