"""Files of tiny runs, made once for all tests of this room."""

import pytest
import tiny_runs


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The folder with the tiny model and its data."""
    return tiny_runs.make_files(tmp_path_factory.mktemp("files"))
