"""tunetrail: InstructGPT-style and DPO post-training as one auditable Snakemake DAG."""

__version__ = "0.1.0"
