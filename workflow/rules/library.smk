# What the head process needs before it can read a config: the library, in the environment that Snakemake runs in.
import os
import sys
from pathlib import Path

try:
    from tunetrail.config import loading
    from tunetrail.errors import ConfigError
except ModuleNotFoundError as error:
    root = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parents[1]
    print(
        f"{sys.executable}: {error}; start the snakemake of the environment that `make` sets up"
        f" ({root}/.venv/bin/snakemake), or install into this one: pip install -r {root}/envs/requirements.txt -e {root}",
        file=sys.stderr,
    )
    sys.exit(78)


def default_config():
    """config/config.yaml where Snakemake runs, else the one that comes with the workflow; it can be read."""
    path = Path("config/config.yaml")
    if not path.exists():
        path = Path(os.path.relpath(Path(workflow.current_basedir.get_path_or_uri(secret_free=True), path)))
    try:
        loading.read_yaml(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    return str(path)
