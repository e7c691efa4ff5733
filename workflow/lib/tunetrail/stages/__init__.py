"""The stages: one module each, run as `python -m tunetrail.stages.<stage>`."""

import os

# transformers and torch read these when they are imported, so they are set here, which runs first. Other libraries'
# progress bars would garble ours, and cuBLAS is deterministic only with this workspace setting.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
