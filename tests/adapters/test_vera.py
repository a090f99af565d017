"""The facts of VeRA (arXiv 2310.11454)."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, Kernel, Site, VeRA
from mor_jax.adapters.vera import merged_product

KEY = jax.random.key(0)


def test_start():
    kernel = one_layer.kernel_of(KEY)
    params = one_layer.start(VeRA(rank=3), KEY, kernel).params
    np.testing.assert_array_equal(params["d"], np.float32(0.1))
    np.testing.assert_array_equal(params["lam_b"], 0)


def test_one_pair_of_factors_for_all_sites_from_the_seed_alone():
    sites = (Site("a", 5, 40), Site("b", 30, 7))
    one = VeRA(rank=4).shared(KEY, sites)
    assert not one.params
    assert not one.state
    assert one.constants["a"].shape == (30, 4)  # the largest in
    assert one.constants["b"].shape == (4, 40)  # the largest out
    again = jax.jit(lambda key: VeRA(rank=4).shared(key, sites))(jax.random.key(9))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    other = VeRA(rank=4, seed=1).shared(KEY, sites)
    assert bool((one.constants["a"] != other.constants["a"]).any())
    bound = (6 / 30) ** 0.5  # Kaiming-uniform with gain sqrt(2)
    assert 0.8 * bound < float(jnp.abs(one.constants["a"]).max()) <= bound


def test_a_site_reads_the_upper_left_part():
    adapter, small, large = VeRA(rank=3), Site("a", 4, 5), Site("b", 9, 11)
    kernel = Kernel(jax.random.normal(KEY, (4, 5)))
    own = one_layer.scramble(adapter.init(KEY, small, jnp.int32(0), kernel), KEY)
    shared = adapter.shared(KEY, (small, large)).constants
    x = jax.random.normal(KEY, (6, 4))
    change = one_layer.delta(adapter, own._replace(constants=shared), x, kernel)
    expected = (x @ shared["a"][:4] * own.params["d"]) @ shared["b"][:, :5] * own.params["lam_b"]
    np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-6)


def _merged(tokens=(2, 5), rows=9, columns=7, rank=3):
    """The method, its leaves, kernel and x, and the arguments of ``merged_product``."""
    adapter, kernel = VeRA(rank=rank), one_layer.kernel_of(KEY, rows, columns)
    leaves = one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY, std=1.0)
    constants = adapter.shared(KEY, (one_layer.site_of(kernel), Site("large", rows + 3, columns + 2))).constants
    leaves = leaves._replace(constants=constants)
    x, params = jax.random.normal(KEY, (*tokens, rows)), leaves.params
    return adapter, leaves, kernel, (x, kernel.value, constants["a"], constants["b"], params["d"], params["lam_b"])


def test_the_merged_form_is_the_same_map_with_the_same_gradients():
    adapter, leaves, kernel, arguments = _merged()

    def plain(x, kernel, a, b, d, lam_b):
        return x @ kernel + ((x @ a[:9]) * d) @ b[:, :7] * lam_b

    expected = plain(*arguments)
    y = adapter.output(leaves, arguments[0], kernel, AdapterInputs())
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        y, arguments[0] @ kernel.value + one_layer.delta(adapter, leaves, arguments[0], kernel), rtol=1e-5, atol=1e-5
    )
    g = jax.random.normal(jax.random.key(1), expected.shape)
    gradients = [jax.vjp(function, *arguments)[1](g) for function in (merged_product, plain)]
    for actual, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_few_tokens_and_narrow_dtypes_keep_the_factors_apart():
    adapter, leaves, kernel, arguments = _merged(tokens=(3,))  # 9 * 7 / (9 + 7) = 3.9
    assert adapter.output(leaves, arguments[0], kernel, AdapterInputs()) is None
    adapter, leaves, kernel, arguments = _merged(tokens=(4,))
    assert adapter.output(leaves, arguments[0], kernel, AdapterInputs()) is not None
    assert adapter.output(leaves, arguments[0].astype(jnp.bfloat16), kernel, AdapterInputs()) is None


def test_the_step_computes_no_gradient_of_frozen_arrays():
    """Forward and backward are the five products that the trained vectors and x need, counted by XLA."""
    tokens, rows, columns, rank = 128, 48, 32, 8
    _, _, _, (x, kernel, a, b, d, lam_b) = _merged((tokens,), rows, columns, rank)

    def run(x, kernel, a, b, d, lam_b, g):
        y, pullback = jax.vjp(lambda x, d, lam_b: merged_product(x, kernel, a, b, d, lam_b), x, d, lam_b)
        return y, pullback(g)

    g = jnp.ones((tokens, columns))
    counted = jax.jit(run).lower(x, kernel, a, b, d, lam_b, g).compile().cost_analysis()["flops"]
    wanted = 2 * (rank * rows * columns + 2 * tokens * rows * columns + tokens * rank * (rows + columns))
    assert wanted <= counted <= 1.05 * wanted


@pytest.mark.parametrize("options", [{"rank": 0}, {"d_initial": 0.0}])
def test_impossible_options_name_the_field(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VeRA(**options)
