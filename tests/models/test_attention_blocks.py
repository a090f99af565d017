"""Attention over blocks of queries is plain attention: in values, in gradients, with windows, segments and padding."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.models import Decoder, DecoderConfig
from mor_jax.models.attention import Tokens, attend, attend_in_blocks, visible

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 11
SEGMENTS = np.array([[1] * 4 + [2] * 6 + [0], [1] * 11])
POSITIONS = np.array([[*range(4), *range(6), 0], [*range(11)]])


TOKENS = Tokens(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))


def _inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (2, LENGTH, n, 8)) for k, n in zip(keys, (4, 2, 2), strict=True))


def _in_blocks(query, key, value, window, block):
    return attend_in_blocks(query, TOKENS, TOKENS, window, block, lambda query, mask: attend(query, key, value, mask))


def test_visible_keys_are_those_of_a_loop():
    expected = np.zeros((2, LENGTH, LENGTH), bool)
    for row, query, key in np.ndindex(expected.shape):
        same = SEGMENTS[row, query] == SEGMENTS[row, key] > 0
        expected[row, query, key] = same and 0 <= POSITIONS[row, query] - POSITIONS[row, key] < 3
    np.testing.assert_array_equal(visible(TOKENS, TOKENS, 3), expected)


@pytest.mark.parametrize("block", [2, 3, 5])  # 11 is a multiple of none
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_equal_the_whole_in_values_and_gradients(block, window):
    arrays = _inputs()
    seen = (SEGMENTS > 0)[..., None, None]  # what padding attends to is nobody's concern

    def total(block, *arrays):
        out = jnp.where(seen, _in_blocks(*arrays, window, block), 0)
        return jnp.sum(jnp.sin(out)), out

    gradients = jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True)
    (_, whole), expected = gradients(0, *arrays)
    (_, blocked), found = gradients(block, *arrays)
    np.testing.assert_allclose(blocked, whole, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_short_rows_and_block_zero_are_attended_at_once():
    for block in (0, 6, LENGTH):
        assert "scan" not in str(jax.make_jaxpr(partial(_in_blocks, window=None, block=block))(*_inputs()))


def test_the_decoder_with_blocks_is_the_decoder_and_never_holds_all_scores():
    plain = DecoderConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        sliding_window=6,
        sliding_layers=(True, False),
        attention_block=0,
    )
    blocked = dataclasses.replace(plain, attention_block=4)
    ids = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 17)
    params = Decoder(plain).init(jax.random.key(0), ids)

    def loss(config, params):
        logits = Decoder(config).apply(params, ids, None, jnp.asarray(SEGMENTS))
        return jnp.sum(jnp.where((SEGMENTS > 0)[..., None], logits, 0) ** 2)

    expected, found = (jax.jit(jax.grad(partial(loss, config)))(params) for config in (plain, blocked))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)
    whole, parts = (str(jax.make_jaxpr(jax.grad(partial(loss, config)))(params)) for config in (plain, blocked))
    for large in (f"f32[2,2,2,{LENGTH},{LENGTH}]", f"bool[2,{LENGTH},{LENGTH}]"):  # scores and mask
        assert large in whole
        assert large not in parts
