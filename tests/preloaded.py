"""Imports what stages import. The servers of `tests.killed` and `tests.stage_server` do so once and fork their
children."""

import gc

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import tests.killed  # noqa: F401
import tunetrail.stages.base
import tunetrail.stages.best_of_n
import tunetrail.stages.comparisons
import tunetrail.stages.completions
import tunetrail.stages.data
import tunetrail.stages.dpo
import tunetrail.stages.evaluation
import tunetrail.stages.head_to_head
import tunetrail.stages.kto
import tunetrail.stages.orpo
import tunetrail.stages.ppo
import tunetrail.stages.report
import tunetrail.stages.retention
import tunetrail.stages.reward
import tunetrail.stages.sft
import tunetrail.stages.simpo
import tunetrail.stages.tasks  # noqa: F401
from tunetrail.provenance.environment import code_state, packages

get_checkpoint_conversion_mapping("llama")
code_state()
packages()
gc.collect()
gc.freeze()  # so that garbage collection in a child does not copy our memory
