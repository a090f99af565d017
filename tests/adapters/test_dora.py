"""The facts of DoRA (arXiv 2402.09353)."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest
from jax.extend.core import jaxprs_in_params

from mor_jax.adapters import DoRA

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
ADAPTER = DoRA(rank=3, alpha=4.0)


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(KEY, 4)
    kernel = one_layer.kernel_of(keys[0], 12, 10)
    first = one_layer.start(ADAPTER, keys[1], kernel)
    return kernel, first, one_layer.scramble(first, keys[2]), jax.random.normal(keys[3], (6, 12))


def by_hand(params, kernel, x, constant_norm):
    direction = kernel.value + ADAPTER.scale * params["a"] @ params["b"]
    norm = jnp.linalg.norm(direction, axis=0)
    return x @ (direction * params["m"] / (jax.lax.stop_gradient(norm) if constant_norm else norm))


def test_the_magnitude_starts_as_the_norm_over_the_inputs(case):
    kernel, first, _, x = case
    np.testing.assert_allclose(
        first.params["m"], np.linalg.norm(np.asarray(kernel.value, np.float64), axis=0), rtol=1e-6
    )
    y = x @ kernel.value
    assert float(jnp.abs(one_layer.delta(ADAPTER, first, x, kernel)).max()) <= 1e-6 * float(jnp.abs(y).max())


def test_merged_columns_have_the_norm_m(case):
    kernel, _, leaves, _ = case
    merged = ADAPTER.merge(leaves, kernel)
    np.testing.assert_allclose(jnp.linalg.norm(merged, axis=0), jnp.abs(leaves.params["m"]), rtol=1e-5)


def test_the_norm_is_a_constant_in_the_backward_pass(case):
    kernel, _, leaves, x = case

    def gradient(forward):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(forward(params)))))(leaves.params)

    actual = gradient(lambda params: one_layer.forward(ADAPTER, leaves._replace(params=params), x, kernel))
    constant = gradient(lambda params: by_hand(params, kernel, x, True))
    moving = gradient(lambda params: by_hand(params, kernel, x, False))
    for name in ("a", "b", "m"):
        np.testing.assert_allclose(actual[name], constant[name], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(moving["b"] - constant["b"]).max()) > 0.1 * float(jnp.abs(constant["b"]).max())


def test_prepare_carries_gradients_as_delta_alone_does(case):
    kernel, _, leaves, x = case

    def loss(params, prepare):
        own = leaves._replace(params=params)
        own = ADAPTER.prepare(own, kernel) if prepare else own
        return jnp.sum(jnp.sin(one_layer.forward(ADAPTER, own, x, kernel)))

    once, inside = (jax.grad(loss)(leaves.params, prepare) for prepare in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), once, inside)


def test_the_norm_without_the_sum(case):
    kernel, _, leaves, _ = case
    a, b = (np.asarray(leaves.params[k], np.float64) for k in "ab")
    expected = np.linalg.norm(np.asarray(kernel.value, np.float64) + 4 / 3 * a @ b, axis=0)
    np.testing.assert_allclose(ADAPTER.prepare(leaves, kernel).constants["norm"], expected, rtol=1e-5)


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _shapes(inner)


def test_no_array_of_tokens_by_in_by_out():
    kernel = one_layer.kernel_of(KEY, 12, 10)
    leaves = one_layer.start(ADAPTER, KEY, kernel)
    x = jnp.ones((50, 12))

    def loss(params):
        return jnp.sum(one_layer.forward(ADAPTER, leaves._replace(params=params), x, kernel))

    traced = jax.make_jaxpr(jax.grad(loss))(leaves.params).jaxpr
    sizes = [np.prod(shape, initial=1) for shape in _shapes(traced)]
    assert len(sizes) > 10
    assert max(sizes) <= 50 * 12


@pytest.mark.parametrize("name", ["rank", "alpha"])
def test_options_out_of_range_name_the_field(name):
    with pytest.raises(ValueError, match=f"DoRA.{name} must be positive, got 0"):
        DoRA(**{name: 0})
