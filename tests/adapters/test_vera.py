"""The facts of VeRA (arXiv 2310.11454)."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest
from llama import ATTENTION, FFN, count

from mor_jax.adapters import Kernel, Site, VeRA

KEY = jax.random.key(0)


def test_parameters_are_rank_and_out_a_layer():
    assert count(VeRA(), ATTENTION) == 4 * 32 * (256 + 4096)
    assert count(VeRA(), ATTENTION + FFN) == 32 * (7 * 256 + 5 * 4096 + 2 * 11008)  # LLaMA-2-7B: 1,417,216
    assert count(VeRA(), ATTENTION + FFN) == 1_417_216
    assert VeRA().rank == 256


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


@pytest.mark.parametrize("options", [{"rank": 0}, {"d_initial": 0.0}])
def test_impossible_options_name_the_field(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VeRA(**options)
