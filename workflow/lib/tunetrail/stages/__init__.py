"""The stages: one module each, run as `python -m tunetrail.stages.<stage>`."""

import os

# Here, because these are read when transformers and torch are imported, and this runs first. Their
# progress bars would tear ours apart; cuBLAS is deterministic only with a workspace of its own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
