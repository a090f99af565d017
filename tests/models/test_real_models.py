"""A 260k-parameter Llama and SmolLM2-135M-Instruct against the values that transformers gave for them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.models import Decoder, load_params, read_config
from tests.models.continuations import continue_prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def loaded(real_model):
    _, folder = real_model
    config = read_config(folder)
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return config, load_params(folder, config), golden


def test_parameter_count(loaded):
    _, params, golden = loaded
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == golden["parameters"]


def test_logits_and_losses(loaded):
    config, params, golden = loaded
    length = max(len(prompt["input_ids"]) for prompt in golden["prompts"])
    forward = jax.jit(Decoder(config).apply)
    for prompt in golden["prompts"]:
        ids = prompt["input_ids"]
        row = jnp.asarray([ids + [0] * (length - len(ids))], jnp.int32)
        segments = (jnp.arange(length)[None] < len(ids)).astype(jnp.int32)
        logits = np.asarray(forward({"params": params}, row, None, segments))[0, : len(ids)]
        # golden.json rounds to five digits; logits reach 20
        np.testing.assert_allclose(logits[-1, :8], prompt["last_logits_first8"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(np.sort(logits[-1])[::-1][:10], prompt["last_logits_top10"], atol=1e-4, rtol=0)
        assert np.argsort(-logits[-1])[:10].tolist() == prompt["last_logits_top10_ids"]
        losses = -np.asarray(jax.nn.log_softmax(logits[:-1]))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(losses, prompt["token_nll"], atol=1e-4, rtol=0)


def test_greedy_text_of_all_prompts_in_one_left_padded_batch(loaded):
    config, params, golden = loaded
    prompts = [prompt["input_ids"] for prompt in golden["prompts"]]
    wanted = [prompt["greedy_ids"][len(prompt["input_ids"]) :] for prompt in golden["prompts"]]
    steps = max(map(len, wanted))
    found = continue_prompts(Decoder(config), config, {"params": params}, prompts, max_new_tokens=steps, eos_ids=(2,))
    assert found == wanted
