"""tunetrail: InstructGPT-style and DPO post-training as one auditable Snakemake DAG."""

__version__ = "0.2.0.dev0"
