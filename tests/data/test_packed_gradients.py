"""Through a decoder, no example of a packed row reaches another: neither its loss nor its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.data import DataSource, load_examples, make_iterator, make_plan
from mor_jax.models import Decoder, DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROW = 20
MODES = ("best_fit", "padded")


@pytest.fixture(scope="module")
def packed(tokenizer, tmp_path_factory):
    """A batch of one row of three examples without a common letter, beside one row for each alone."""
    path = tmp_path_factory.mktemp("letters") / "data.jsonl"
    path.write_text('{"text": "abcdef"}\n{"text": "ghij"}\n{"prompt": "klm", "completion": "no"}\n')
    examples = load_examples([DataSource(str(path))], tokenizer, ROW)
    return [next(make_iterator(examples, make_plan(examples, ROW, mode=m), 1 + 2 * (m == "padded"))) for m in MODES]


@pytest.fixture(scope="module")
def losses_and_gradients(packed, tokenizer):
    """(loss, gradient of the embedding (V, D)) of each segment of a row: {first token of the segment: (...)}."""
    size = len(tokenizer)
    config = DecoderConfig(
        vocab_size=size, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, initializer_range=0.4
    )
    model = Decoder(config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))

    @jax.jit
    @jax.value_and_grad
    def loss(params, row, segment):
        logits = model.apply({"params": params}, row["input_ids"], row["positions"], row["segment_ids"])
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), row["targets"][..., None], axis=-1)[..., 0]
        return -(taken * row["loss_mask"] * (row["segment_ids"] == segment)).sum()

    def of(batch):
        found = {}
        for number in range(len(batch["input_ids"])):
            row = {name: values[number : number + 1] for name, values in batch.items()}
            for segment in range(1, row["segment_ids"].max() + 1):
                first = int(row["input_ids"][row["segment_ids"] == segment][0])
                value, gradient = loss(variables["params"], row, segment)
                found[first] = float(value), np.asarray(gradient["embed_tokens"]["embedding"])
        return found

    return [of(batch) for batch in packed]


def test_the_row_is_packed(packed):
    assert packed[0]["segment_ids"].max() == 3
    assert packed[1]["segment_ids"].max() == 1


def test_no_gradient_reaches_the_tokens_of_other_segments(packed, losses_and_gradients, tokenizer):
    row, segments = packed[0]["input_ids"][0], packed[0]["segment_ids"][0]
    for first, (value, gradient) in losses_and_gradients[0].items():
        own = set(row[segments == segments[list(row).index(first)]].tolist())
        touched = set(np.flatnonzero(np.abs(gradient).sum(axis=1)).tolist())
        assert value > 0
        assert touched == own - {tokenizer.eos_token_id}  # the end token is only predicted, and nothing after it counts


def test_losses_and_gradients_are_those_of_each_example_alone(losses_and_gradients):
    together, alone = losses_and_gradients
    assert together.keys() == alone.keys()
    for first, (value, gradient) in together.items():
        assert value == pytest.approx(alone[first][0], abs=1e-5)
        np.testing.assert_allclose(gradient, alone[first][1], atol=1e-6)
