"""A clone may lie anywhere: what its path holds is never read as shell, as a pattern or as anything but a path."""

import pytest

from ..conftest import Project

NAME = 'it\'s "a" {clone} {{x}}; touch broken; $(touch broken) `touch broken` & ü*?'


@pytest.fixture
def clone(stage_server, tmp_path) -> Project:
    folder = tmp_path / NAME
    folder.mkdir()
    return Project(folder, stage_server.path)


def test_a_clone_runs_whatever_its_path_holds(clone):
    """The whole plan, and a stage through the real shell with its config, its log and its state."""
    assert "report" in clone.pending()
    clone.run("--until", "base")
    for name in ("results/tiny/base/model/config.json", "logs/tiny/base.log", "state/tiny/base"):
        assert (clone.folder / name).exists()
    found = [path for path in clone.folder.parent.rglob("*") if path.name == "broken" or "touch" in path.name]
    assert found == [clone.folder]
