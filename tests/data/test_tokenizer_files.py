"""The tokenizer of a directory: read as it is, and named where it cannot be read."""

import json

import pytest
from byte_tokenizers import byte_tokenizer

from mor_jax.data import DataError, load_tokenizer


def test_it_is_the_one_that_was_saved(tmp_path):
    saved = byte_tokenizer()
    saved.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("hello?")["input_ids"] == saved("hello?")["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{not json",
        "{}",
        "[]",
        json.dumps({"added_tokens": []}),
        json.dumps({"added_tokens": [], "model": {"type": "of a later library"}}),
    ],
)
def test_what_cannot_be_read_is_bad_input(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=f"^{tmp_path}: no readable tokenizer"):
        load_tokenizer(str(tmp_path))
