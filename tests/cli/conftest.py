"""The tiny model and its files, made once for all tests of the command line."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_llama as tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")
