import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.training.losses import chunked_cross_entropy, cross_entropy


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
