# Finds the library, which the head process needs to read a config, in the environment that Snakemake runs in.
import os
import re
import sys
from pathlib import Path

RULES = workflow.current_basedir
WORKFLOW = Path(RULES.get_path_or_uri(secret_free=True)).parent
IS_CLONE = WORKFLOW.is_dir()  # else Snakemake reads these rules from a remote repository, without the library


def how_to_install():
    if not IS_CLONE:
        url = f"https://{RULES.host}/{RULES.repo}" if hasattr(RULES, "host") else "<where these rules are from>"
        return f'install it into this environment: pip install "git+{url}@{RULES.ref}"'
    root = WORKFLOW.resolve().parent
    return (
        f"start the snakemake of the environment that `make` sets up ({root}/.venv/bin/snakemake), or install into "
        f"this one: pip install -r {root}/envs/requirements.txt -e {root}"
    )


def give_up(problem):
    print(problem, file=sys.stderr)
    sys.exit(78)


try:
    import tunetrail
    from tunetrail.config import loading
    from tunetrail.errors import ConfigError
    from tunetrail.monitor.snakemake_adapter import module_name
except ModuleNotFoundError as error:
    give_up(f"{sys.executable}: {error}; {how_to_install()}")

# Used as a module from a tag on the web, these rules may have another version than the installed library.
with workflow.sourcecache.open(RULES.join("../lib/tunetrail/__init__.py")) as file:
    version = re.search('__version__ = "(.+)"', file.read())[1]
if version != tunetrail.__version__:
    give_up(
        f"{sys.executable}: tunetrail {tunetrail.__version__} is installed, but the workflow is version {version}; "
        f"{how_to_install()}"
    )

MODULE = module_name(workflow)
"""The name under which another workflow uses these rules as a module; None if they are the workflow itself."""


def library(link):
    """The folder for a job's PYTHONPATH: the one next to the rules, or one with a link to the installed library."""
    return WORKFLOW.resolve() / "lib" if IS_CLONE else Path(link).absolute()


def link_library():
    """Makes that link. The installed library's own folder would add all other packages of this environment too."""
    if not IS_CLONE:
        link = Path(LIBRARY, "tunetrail")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(tunetrail.__file__).parent)


def default_config():
    """config/config.yaml in the folder where Snakemake runs, else the one that comes with the workflow.

    Exits with a message if it cannot be read.
    """
    path = Path("config/config.yaml")
    if not path.exists():
        path = Path(os.path.relpath(Path(workflow.current_basedir.get_path_or_uri(secret_free=True), path)))
    try:
        loading.read_yaml(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    return str(path)
