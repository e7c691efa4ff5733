"""What libraries do badly on a CPU, done better: each module patches one of them and says when it becomes needless.

    attention    attention of short rows as plain products. Needless once torch's fused attention uses a CPU's bf16
                 products for them (torch 2.13 does not).
    label_head   no logits for prompts in TRL's trainers. Needless once TRL's fused head skips ignored positions without
                 Triton (trl 1.16 does not).
    memory       freed blocks are kept. Needless with an allocator that keeps them (jemalloc, tcmalloc).

`make bench ONLY=parts` measures each with and without.
"""
