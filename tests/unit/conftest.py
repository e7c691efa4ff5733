"""Label stores in either database; a run to audit."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.audited_run import make_run
from tests.labels import postgres, postgres_programs
from tunetrail.labeling.app.store import Store
from tunetrail.provenance.manifest import sha256_bytes


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A made-up run for the audit, which its tests only read."""
    return make_run(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A copy to damage; its records name raw data by the paths of the original."""
    shutil.copytree(original, tmp_path / "copy/r")
    return tmp_path / "copy/r"


@pytest.fixture
def keys(tmp_path) -> Path:
    """A folder with a key that a policy trusts, and one of a stranger."""
    folder = tmp_path / "keys"
    folder.mkdir()
    for name in ("lab", "stranger"):
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", folder / f"{name}.pem"], check=True)
        subprocess.run(
            ["openssl", "pkey", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}.pub"], check=True
        )
    (folder / "policy.yaml").write_text("keys: {lab: lab.pub}\nrequire_signature: true\nallow_dirty: false\n")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """The URL of a PostgreSQL server for one test module; None if it is not installed."""
    with postgres() if postgres_programs() else contextlib.nullcontext() as url:
        yield url


@pytest.fixture
def lite(tmp_path) -> Store:
    return Store(f"sqlite:///{tmp_path}/labels.db")


@pytest.fixture
def postgresql(cluster, request) -> Store:
    """A store in its own schema."""
    if cluster is None:
        pytest.skip("PostgreSQL is not installed")
    schema = f"t{sha256_bytes(request.node.name.encode())[:20]}"
    with Store(cluster).writing() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
    return Store(f"{cluster}&options=-csearch_path%3D{schema}")
