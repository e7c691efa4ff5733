"""The engines that sample episodes: our own decoder, or vLLM on a GPU. Both are called in the same way:

engine(prompts, keys, k, seed) -> for each prompt, k lists of token ids, ending with EOS if finished
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

from accelerate import Accelerator

from tunetrail.config.ppo import PpoConfig
from tunetrail.errors import ConfigError, DataError
from tunetrail.models.sampling import decoding_weights, sample
from tunetrail.ppo.sharding import is_sharded


class Engine(Protocol):
    def __call__(
        self, prompts: Sequence[list[int]], keys: Sequence[str], k: int, seed: int
    ) -> list[list[list[int]]]: ...


class LocalEngine:
    """`models.sampling` with the policy's own weights. The same seed and keys give the same episodes."""

    def __init__(self, config: PpoConfig, policy: Any, accelerator: Accelerator, eos_id: int, pad_id: int):
        self.config, self.policy, self.eos_id, self.pad_id = config, policy, eos_id, pad_id
        self.accelerator = accelerator
        # A sharded model cannot be copied: its adapter stays unmerged, and autocast casts its weights.
        self.copies = not any(is_sharded(module) for module in policy.modules())

    def __call__(self, prompts: Sequence[list[int]], keys: Sequence[str], k: int, seed: int) -> list[list[list[int]]]:
        bf16 = self.accelerator.mixed_precision == "bf16"
        with nullcontext() if self.copies else self.accelerator.autocast():
            return sample(
                decoding_weights(self.policy, bf16) if self.copies else self.policy,
                prompts,
                keys,
                k=k,
                seed=seed,
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                batch_size=max(len(prompts) * k, 1),
                eos_id=self.eos_id,
                pad_id=self.pad_id,
            )


class VllmEngine:
    """vLLM through TRL, on the training GPUs or as a server. It gets the policy's weights before each rollout.

    It has never been run: the tests use a stand-in for vLLM. vLLM has its own random numbers, and merging and unmerging
    a LoRA adapter to send it causes rounding, so an interrupted run resumes but does not end with the same bytes.
    """

    def __init__(self, config: PpoConfig, policy: Any, accelerator: Accelerator, tokenizer: Any):
        assert config.vllm is not None
        if config.prompts_per_batch % accelerator.num_processes:
            raise DataError(
                f"ppo: with vllm the {config.prompts_per_batch} prompts of a batch must be a multiple of the "
                f"{accelerator.num_processes} processes"
            )
        server = config.vllm.server
        try:
            from trl.generation.vllm_generation import VLLMGeneration  # only here, since it imports vLLM if installed

            self.generation = VLLMGeneration(
                policy,
                accelerator,
                tokenizer,
                mode="server" if server else "colocate",
                server_base_url=server,
                gpu_memory_utilization=config.vllm.gpu_memory,
                temperature=config.temperature,
                max_completion_length=config.max_new_tokens,
                generation_kwargs={"stop_token_ids": [tokenizer.eos_token_id], "ignore_eos": True},  # no other stop
            )
        except ImportError as error:
            raise ConfigError(
                f"ppo: vllm is set but cannot be imported ({error}); pip install vllm, or set vllm to null"
            ) from None
        except ConnectionError as error:
            raise ConfigError(f"ppo: no vLLM server answers at {server} ({error})") from None

    def __call__(self, prompts: Sequence[list[int]], keys: Sequence[str], k: int, seed: int) -> list[list[list[int]]]:
        self.generation.sync_weights()
        repeated = [prompt for prompt in prompts for _ in range(k)]
        _, responses, _, _ = self.generation.generate(repeated, images=None, num_generations=k)
        return [[list(r) for r in responses[i : i + k]] for i in range(0, len(responses), k)]
