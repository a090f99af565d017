"""The tiny model and its files, made once for all tests of the command line."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_llama as tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def quick_compilation():
    """A third less time where each program is compiled for a few calls, and nothing is about speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
