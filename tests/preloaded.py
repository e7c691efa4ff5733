"""What the children of `tests.killed` have in common: their forkserver imports it once, and they are forked from it."""

import gc

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import tests.killed  # noqa: F401
import tunetrail.stages.completions
import tunetrail.stages.dpo
import tunetrail.stages.ppo
import tunetrail.stages.reward
import tunetrail.stages.sft  # noqa: F401
from tunetrail.provenance.environment import code_state, packages

get_checkpoint_conversion_mapping("llama")
code_state()
packages()
gc.collect()
gc.freeze()  # what a child collects, and copies from us, is then its own
