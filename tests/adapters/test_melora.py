"""The facts of MELoRA (arXiv 2402.17263)."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import Kernel, LoRA, MELoRA, Site

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def _filled(adapter, size=(12, 8)):
    kernel = one_layer.kernel_of(KEY, *size)
    return kernel, one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY, std=1.0)


def test_one_mini_is_lora():
    kernel, leaves = _filled(MELoRA(rank=3, num_minis=1))
    x = jax.random.normal(KEY, (4, 12))
    lora = leaves._replace(params={name: leaf[0] for name, leaf in leaves.params.items()})
    expected = one_layer.delta(LoRA(rank=3), lora, x, kernel)
    actual = one_layer.delta(MELoRA(rank=3, num_minis=1), leaves, x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_change_is_block_diagonal_and_of_rank_n_times_r():
    adapter = MELoRA(rank=2, num_minis=4)
    kernel, leaves = _filled(adapter, (16, 12))
    change = np.asarray(adapter.merge(leaves, kernel) - kernel.dense(), np.float64)
    inside = np.kron(np.eye(4), np.ones((4, 3))) > 0
    assert np.abs(change[~inside]).max() == 0
    assert np.linalg.matrix_rank(change, tol=1e-4) == 8
    assert np.linalg.matrix_rank(change[:4, :3], tol=1e-4) == 2


def test_start():
    """a is uniform in the fan-in of its slice."""
    kernel = one_layer.kernel_of(KEY, 400, 8)
    params = one_layer.start(MELoRA(rank=8, num_minis=4), KEY, kernel).params
    assert 0.99 * 0.1 < float(jnp.abs(params["a"]).max()) <= 0.1  # 1 / sqrt(400 / 4)
    np.testing.assert_array_equal(params["b"], 0)
    assert MELoRA().scale == 16 / 8


@pytest.mark.parametrize(("size", "name"), [((9, 8), "in_features = 9"), ((8, 9), "out_features = 9")])
def test_n_must_divide_in_and_out(size, name):
    site, kernel = Site("layers/up", *size), Kernel(jnp.zeros(size))
    with pytest.raises(ValueError, match=f"layers/up: MELoRA.num_minis = 2 does not divide {name}"):
        MELoRA(num_minis=2).init(KEY, site, jnp.int32(0), kernel)
    with pytest.raises(ValueError, match=name):
        MELoRA(num_minis=2).num_params(site)
