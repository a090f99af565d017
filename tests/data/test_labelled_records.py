"""Records of a classifier: where their text may stand."""

import json

import numpy as np
import pytest

from mor_jax.data import DataSource, load_labelled


@pytest.mark.parametrize("field", ["text", "sentence", "sentence1"])
def test_one_text_may_stand_in_any_of_three_fields(tmp_path, tokenizer, field):
    path = tmp_path / "rows.jsonl"
    rows = [{field: "abc", "label": "good"}, {field: "defgh", "label": "bad"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, labels = load_labelled([DataSource(str(path))], tokenizer, 16)
    assert labels == ("bad", "good")
    np.testing.assert_array_equal(examples.labels, [1, 0])
    encoded = [tokenizer(row[field])["input_ids"] for row in rows]
    np.testing.assert_array_equal(examples.tokens, np.concatenate(encoded))
