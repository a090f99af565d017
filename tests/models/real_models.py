"""Where the real models are: MOR_MODELS, the user's cache, or what ../shared/tools/get_models.py lays out there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "mor_jax" / "models"
SCRIPT = Path(__file__).resolve().parents[2].parent / "shared" / "tools" / "get_models.py"


def model_folder(name: str) -> Path:
    """The Hugging Face folder of a real model; skips the test where it cannot be had."""
    if "MOR_MODELS" in os.environ:
        folder = Path(os.environ["MOR_MODELS"]) / name
        if not folder.is_dir():
            pytest.skip(f"the real models are not on this machine: {folder} (from MOR_MODELS) does not exist")
        return folder
    if (CACHE / name / "golden.json").is_file() or (
        name == "minilm" and (CACHE / name / "model.safetensors").is_file()
    ):
        return CACHE / name
    if not SCRIPT.is_file():
        pytest.skip(f"the real models are not on this machine: neither {CACHE / name} nor {SCRIPT}; set MOR_MODELS")
    result = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"the real models are not on this machine: {SCRIPT.name} {name} failed: {reason}")
    return Path(result.stdout.strip().splitlines()[-1].split("\t")[1])
