"""The facts of MoRA and of ReMoRA's accumulators (arXiv 2405.12130)."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import Kernel, MoRA, Site

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
TYPES = ("sharing", "contiguous", "contiguous_tiled", "sharing_repeated", "rotation")


def _filled(adapter, size, seed=1):
    kernel = one_layer.kernel_of(KEY, *size)
    leaves = one_layer.start(adapter, KEY, kernel)
    return kernel, one_layer.scramble(leaves, jax.random.key(seed))


@pytest.mark.parametrize("group_type", TYPES)
@pytest.mark.parametrize("size", [(24, 24), (13, 29), (29, 13)])
def test_merge_is_exact_also_for_sizes_that_do_not_divide(group_type, size):
    adapter = MoRA(rank=1, group_type=group_type)
    kernel, leaves = _filled(adapter, size)
    effective = one_layer.forward(adapter, leaves, jnp.eye(size[0]), kernel)
    np.testing.assert_allclose(adapter.merge(leaves, kernel), effective, rtol=1e-5, atol=1e-5)


def test_the_change_has_a_higher_rank_than_lora():
    adapter = MoRA(rank=1)
    kernel, leaves = _filled(adapter, (32, 32))
    change = np.asarray(adapter.merge(leaves, kernel) - kernel.dense(), np.float64)
    assert np.linalg.matrix_rank(change, tol=1e-3) == adapter.size(Site("p", 32, 32)) == 8


def test_types_by_hand():
    """k = 2 for 4 inputs and 4 outputs of rank 0.5 would be; so M is set to the identity of a larger site by hand."""
    m, kernel, x = jnp.eye(4), Kernel(jnp.zeros((8, 8))), jnp.arange(1.0, 9.0)[None]
    results = {
        "sharing": [6, 8, 10, 12, 6, 8, 10, 12],  # x_j + x_{j+4}, tiled
        "contiguous": [3, 3, 7, 7, 11, 11, 15, 15],  # neighbours summed, repeated
        "contiguous_tiled": [3, 7, 11, 15, 3, 7, 11, 15],
        "sharing_repeated": [6, 6, 8, 8, 10, 10, 12, 12],
    }
    for group_type, expected in results.items():
        adapter = MoRA(rank=1, group_type=group_type)
        assert adapter.size(Site("p", 8, 8)) == 4
        leaves = adapter.init(KEY, Site("p", 8, 8), jnp.int32(0), kernel)._replace(params={"m": m})
        np.testing.assert_array_equal(one_layer.delta(adapter, leaves, x, kernel)[0], expected)
    adapter = MoRA(rank=1, group_type="rotation")
    leaves = adapter.init(KEY, Site("p", 8, 8), jnp.int32(0), kernel)._replace(params={"m": m})
    rotated = one_layer.delta(adapter, leaves, x, kernel)[0]
    np.testing.assert_array_equal(rotated[:4], x[0, :4])  # block 0 is not turned
    first, second = 5 + 7j, 6 + 8j  # block 1: entry j is paired with entry j + 2
    turned = [first * np.exp(1j), second * np.exp(0.01j)]
    np.testing.assert_allclose(rotated[4:], [*np.real(turned), *np.imag(turned)], rtol=1e-5)


def test_rotation_warns_where_it_ignores_inputs(caplog):
    site = Site("layers/down_proj", 11008, 4096)
    with caplog.at_level(logging.WARNING):
        jax.eval_shape(lambda: MoRA(group_type="rotation").init(KEY, site, 0, Kernel(jnp.zeros((1, 1)))))
    assert "layers/down_proj: MoRA's rotation reads 4176 of 11008 inputs" in caplog.text
    caplog.clear()
    jax.eval_shape(lambda: MoRA(group_type="rotation").init(KEY, Site("p", 4096, 11008), 0, Kernel(jnp.zeros((1, 1)))))
    assert not caplog.text
    assert MoRA().group_type == "sharing"


def test_folding_into_the_accumulator_changes_nothing():
    """What ReMoRA's event does: M into the accumulator of its type, M to zero, on to the next type."""
    adapter = MoRA(rank=2, reset_every=5, group_type="contiguous")
    kernel, leaves = _filled(adapter, (13, 9))
    assert leaves.state["group_type"].tolist() == [1]
    x = jax.random.normal(KEY, (4, 13))
    run = jax.jit(lambda leaves: one_layer.delta(adapter, leaves, x, kernel))
    before = run(leaves)
    plain = one_layer.delta(MoRA(rank=2, group_type="contiguous"), leaves, x, kernel)
    np.testing.assert_allclose(before, plain, rtol=1e-5, atol=1e-6)
    m, kept = leaves.params["m"], leaves.state["accumulated"]
    state = {"accumulated": kept.at[1].add(m), "group_type": jnp.array([2], jnp.int32)}
    after = leaves._replace(params={"m": jnp.zeros_like(m)}, state=state)
    np.testing.assert_allclose(run(after), before, rtol=1e-5, atol=1e-6)
    assert run._cache_size() == 1, "the type is a traced index"
    new = after._replace(params={"m": 0.1 * m})
    expected = before + 0.1 * one_layer.delta(MoRA(rank=2, group_type="contiguous_tiled"), leaves, x, kernel)
    np.testing.assert_allclose(run(new), expected, rtol=1e-4, atol=1e-5)
    effective = one_layer.forward(adapter, new, jnp.eye(13), kernel)
    np.testing.assert_allclose(adapter.merge(new, kernel), effective, rtol=1e-5, atol=1e-5)
    rules = adapter.rules(20)
    assert [step for step in range(1, 21) if rules[0].due(step)] == [5, 10, 15]
    assert MoRA().rules(20) == ()


def test_impossible_options_name_the_field():
    for options, message in (
        ({"group_type": "random"}, "group_type must be one of sharing, .* got 'random'"),
        ({"reset_every": -1}, "reset_every must not be negative"),
        ({"reset_every": 5, "group_type": "rotation"}, "reset_every cycles through sharing"),
    ):
        with pytest.raises(ValueError, match=message):
            MoRA(**options)
