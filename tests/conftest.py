"""What several tests start from."""

import pytest
from samples import git


@pytest.fixture
def repository(tmp_path):
    """A repository of five commits; returns it and their ids."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    ids = []
    for number in range(5):
        git(folder, "commit", "-q", "--allow-empty", "-m", f"step {number}")
        ids.append(git(folder, "rev-parse", "HEAD"))
    return folder, ids
