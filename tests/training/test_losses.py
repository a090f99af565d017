import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_jax.training.losses import chunked_cross_entropy, cross_entropy, vocabulary_block
from mor_jax.training.mesh import make_mesh


def _case(batch=3, length=13, width=7, vocab=19):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    mask = jnp.asarray(rng.integers(0, 2, (batch, length)), jnp.int32)
    return hidden, head, targets, mask


def _oracle(hidden, head, targets, mask, softcap=None):
    """Token by token in float64 numpy: the loss and its gradient for hidden."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    loss, gradient = 0.0, np.zeros_like(hidden)
    for index in np.ndindex(*targets.shape):
        if not mask[index]:
            continue
        raw = hidden[index] @ head
        logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        loss -= np.log(p[targets[index]])
        p[targets[index]] -= 1
        if softcap is not None:
            p = p * (1 - np.tanh(raw / softcap) ** 2)
        gradient[index] = head @ p
    return loss, gradient


@pytest.mark.parametrize("chunk", [1, 6, 12, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary_axis", [0, 1])
def test_equals_float64_oracle(chunk, softcap, vocabulary_axis):
    hidden, head, targets, mask = _case()
    stored = head.T if vocabulary_axis == 0 else head

    def loss(h):
        total, count = chunked_cross_entropy(h, stored, targets, mask, chunk, softcap, vocabulary_axis)
        return 0.5 * total, count

    (value, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(hidden)
    expected, expected_gradient = _oracle(hidden, head, np.asarray(targets), np.asarray(mask), softcap)
    assert float(count) == int(mask.sum())
    np.testing.assert_allclose(value, 0.5 * expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.5 * expected_gradient, atol=1e-5)


def test_equals_the_naive_loss_under_autodiff():
    hidden, head, targets, mask = _case()
    naive = jax.value_and_grad(lambda h: cross_entropy(h @ head, targets, mask)[0])(hidden)
    ours = jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, targets, mask, 6)[0])(hidden)
    np.testing.assert_allclose(ours[0], naive[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], naive[1], atol=1e-5)


def test_the_head_is_frozen_and_masked_tokens_do_not_matter():
    hidden, head, targets, mask = _case()
    head_gradient = jax.grad(lambda w: chunked_cross_entropy(hidden, w, targets, mask, 6)[0])(head)
    assert not np.any(head_gradient)
    other = jnp.where(mask[..., None] > 0, hidden, jnp.inf)
    first = chunked_cross_entropy(hidden, head, targets, mask, 6)[0]
    assert float(first) == float(chunked_cross_entropy(other, head, targets, mask, 6)[0])


def test_no_whole_logits_in_the_program():
    hidden, head, targets, mask = _case(batch=2, length=64, width=8, vocab=4099)
    loss = jax.grad(lambda h: chunked_cross_entropy(h, head, targets, mask, 8)[0])
    text = jax.jit(loss).lower(hidden).compile().as_text()
    assert "4099" in text
    assert not any(shape in text for shape in ("[2,64,4099]", "[128,4099]", "[64,2,4099]", "[16,2,4,4099]"))


def test_bfloat16_hidden_keeps_its_dtype():
    hidden, head, targets, mask = _case()
    loss, gradient = jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, targets, mask)[0])(
        hidden.astype(jnp.bfloat16)
    )
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 23)),
    block=st.integers(1, 24),
    softcap=st.sampled_from([None, 3.0]),
    vocabulary_axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16]),
    without_gradient=st.booleans(),
)
def test_blocks_of_the_vocabulary_equal_the_float64_oracle(
    sizes, block, softcap, vocabulary_axis, dtype, without_gradient
):
    hidden, head, targets, mask = _case(*sizes)
    rounded, weights = hidden.astype(dtype), head.astype(dtype)
    hidden = jnp.where(mask[..., None] > 0, rounded, jnp.nan)  # what is masked must not matter
    stored = weights.T if vocabulary_axis == 0 else weights

    @jax.jit
    def loss(h):
        return chunked_cross_entropy(h, stored, targets, mask, 1, softcap, vocabulary_axis, block)[0]

    expected, expected_gradient = _oracle(rounded, weights, np.asarray(targets), np.asarray(mask), softcap)
    coarse = dtype == jnp.bfloat16
    if without_gradient:
        np.testing.assert_allclose(loss(hidden), expected, rtol=1e-5, atol=1e-5)
        return
    value, gradient = jax.value_and_grad(loss)(hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    largest = max(1.0, float(np.abs(expected_gradient).max()))
    atol = (0.02 if coarse else 1e-5) * largest
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected_gradient, atol=atol)
    assert not np.any(np.asarray(gradient, np.float64)[np.asarray(mask) == 0])


@pytest.mark.parametrize("block", [0, 8])
def test_the_gradient_of_a_sure_target_is_no_difference_of_two_roundings(block):
    """In bfloat16, p(target) = 0.998 rounds to a half more or less of what is left of 1."""
    hidden, head, targets, _ = _case(batch=1, length=5, width=32)
    hidden = jnp.asarray(7.0 * head[:, targets[0]].T / jnp.sum(head[:, targets[0]] ** 2, axis=0)[:, None])[None]
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    mask = jnp.ones(targets.shape)
    gradient = jax.grad(lambda h: chunked_cross_entropy(h, head, targets, mask, block=block)[0])(hidden)
    _, expected = _oracle(hidden, head, np.asarray(targets), np.asarray(mask))
    assert np.abs(expected).max() < 0.5
    off = np.linalg.norm(np.asarray(gradient, np.float64) - expected, axis=-1)
    assert np.all(off < 0.01 * np.linalg.norm(expected, axis=-1))


@pytest.mark.parametrize("vocabulary_axis", [0, 1])
def test_blocks_need_neither_whole_logits_nor_another_head(vocabulary_axis):
    hidden, head, targets, mask = _case(batch=2, length=64, width=64, vocab=8195)
    stored = head.T if vocabulary_axis == 0 else head
    loss = jax.grad(lambda h, w: chunked_cross_entropy(h, w, targets, mask, 128, None, vocabulary_axis, 1024)[0])
    compiled = jax.jit(loss).lower(hidden, stored).compile()
    text = compiled.as_text()
    other = "[8195,64]" if vocabulary_axis else "[64,8195]"
    assert not any(shape in text for shape in ("[2,64,8195]", "[128,8195]", other))
    assert compiled.memory_analysis().temp_size_in_bytes < head.nbytes


@given(tokens=st.integers(1, 10**6), vocabulary=st.integers(1, 300_000), chunk=st.integers(1, 10**4))
def test_blocks_chosen_hold_no_more_than_a_chunk_of_logits(tokens, vocabulary, chunk):
    block = vocabulary_block(tokens, vocabulary, chunk)
    assert block % 128 == 0
    assert tokens * block <= chunk * vocabulary
    assert block < vocabulary


def test_blocks_are_chosen_by_shape():
    assert vocabulary_block(1024, 131_072, 256) == 4096
    assert vocabulary_block(8192, 32_000, 1024) == 3584  # nine blocks, nearly even
    assert vocabulary_block(1024, 4096, 1024) == 0  # one block
    assert vocabulary_block(131_072, 131_072, 1024) == 0  # more tokens than blocks can hold
    with jax.sharding.use_abstract_mesh(make_mesh("fsdp=8").abstract_mesh):
        assert vocabulary_block(1024, 131_072, 256) == 0
