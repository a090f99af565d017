"""The tokenizers of this room: a small one, and the real one of SmolLM2 where its files are."""

import json
import os
from pathlib import Path

import pytest
from byte_tokenizers import SHARED, byte_tokenizer
from transformers import AutoTokenizer

SMOLLM2 = (
    Path(os.environ.get("MOR_MODELS", Path.home() / ".cache/mor_jax/models")) / "smollm2",
    SHARED / "data/models/smollm2-135m-instruct",
)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2():
    for folder in SMOLLM2:
        if (folder / "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(folder)
    pytest.skip(f"the real models are not on this machine: no tokenizer of SmolLM2 in {' or '.join(map(str, SMOLLM2))}")


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
