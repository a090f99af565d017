"""The folders of the real models."""

import pytest
from real_models import model_folder


@pytest.fixture(scope="module")
def minilm_folder():
    """The folder of all-MiniLM-L6-v2."""
    return model_folder("minilm")


@pytest.fixture(scope="module", params=["stories260k", "smollm2"])
def real_model(request):
    """(name, folder) of each real model."""
    return request.param, model_folder(request.param)
