"""Label stores in either database."""

import contextlib

import pytest
import sqlalchemy as sa

from tests.labels import postgres, postgres_programs
from tunetrail.labeling.app.store import Store
from tunetrail.provenance.manifest import sha256_bytes


@pytest.fixture(scope="module")
def cluster():
    """The URL of a PostgreSQL server for one test module; None where it is not installed."""
    with postgres() if postgres_programs() else contextlib.nullcontext() as url:
        yield url


@pytest.fixture
def lite(tmp_path) -> Store:
    return Store(f"sqlite:///{tmp_path}/labels.db")


@pytest.fixture
def postgresql(cluster, request) -> Store:
    """A store in a schema of its own."""
    if cluster is None:
        pytest.skip("PostgreSQL is not installed")
    schema = f"t{sha256_bytes(request.node.name.encode())[:20]}"
    with Store(cluster).writing() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
    return Store(f"{cluster}&options=-csearch_path%3D{schema}")
