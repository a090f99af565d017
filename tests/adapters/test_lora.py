"""The facts of LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732)."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import LoRA, RsLoRA

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def test_scales():
    assert LoRA(rank=4, alpha=6.0).scale == 1.5
    assert RsLoRA(rank=4, alpha=6.0).scale == 3.0
    kernel = one_layer.kernel_of(KEY)
    x = jnp.ones((2, 7))
    leaves = one_layer.scramble(one_layer.start(LoRA(rank=4), KEY, kernel), KEY)
    plain, stable = (one_layer.delta(m(rank=4), leaves, x, kernel) for m in (LoRA, RsLoRA))
    np.testing.assert_allclose(stable, 2 * plain, rtol=1e-6)  # sqrt(rank)


@pytest.mark.parametrize(("zero", "other", "fan_in"), [("b", "a", 256), ("a", "b", 16)])
def test_either_factor_may_start_at_zero(zero, other, fan_in):
    kernel = one_layer.kernel_of(KEY, 256, 300)
    params = one_layer.start(LoRA(rank=16, zero=zero), KEY, kernel).params
    np.testing.assert_array_equal(params[zero], 0)
    bound = fan_in**-0.5
    assert 0.99 * bound < float(jnp.abs(params[other]).max()) <= bound
    np.testing.assert_allclose(params[other].std(), bound / 3**0.5, rtol=0.04)


def test_each_layer_starts_with_its_own_fan_in():
    """A stacked factor is drawn layer by layer: its leading axis counts for nothing."""
    kernel = one_layer.kernel_of(KEY, 16, 64)
    keys = jax.random.split(KEY, 64)
    layers = jax.vmap(lambda key, i: one_layer.start(LoRA(), key, kernel, i))(keys, jnp.arange(64)).params["a"]
    np.testing.assert_allclose(layers.std(), 16**-0.5 / 3**0.5, rtol=0.03)
    assert len(np.unique(np.asarray(layers[:, 0, 0]))) == 64


@pytest.mark.parametrize("method", [LoRA, RsLoRA])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"zero": "c"}, "zero must be 'a' or 'b', got 'c'"),
        ({"dropout": -0.1}, "dropout must be in"),
    ],
)
def test_options_out_of_range_name_the_field(method, options, message):
    with pytest.raises(ValueError, match=f"{method.__name__}.{message}"):
        method(**options)
