"""The card of DyLoRA: one adapter for every rank up to its own."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, LoRA, make_adapter
from mor_jax.adapters.dylora import DrawnRanksOnly

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
ADAPTER = make_adapter("dylora", rank=5, alpha=6.0)
KERNEL = one_layer.kernel_of(KEY, 7, 6)
LEAVES = one_layer.scramble(one_layer.start(ADAPTER, KEY, KERNEL), KEY)
X = jax.random.normal(KEY, (4, 7))


def _drawn(rank):
    factored = X @ ADAPTER.input_factor(LEAVES)
    return ADAPTER.delta(LEAVES, factored, X @ KERNEL.dense(), KERNEL, None, AdapterInputs(rank=rank))


def test_defaults_and_start():
    adapter = make_adapter("dylora")
    assert (adapter.rank, adapter.alpha, adapter.mode) == (8, 16.0, "frozen")
    params = adapter.init(KEY, one_layer.site_of(KERNEL), jnp.int32(0), KERNEL).params
    assert (params["b"] == 0).all()
    assert 0.9 * 7**-0.5 < jnp.abs(params["a"]).max() <= 7**-0.5


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_cut_to_a_rank_it_is_the_lora_of_that_rank(rank):
    """The same factors in a LoRA of rank k, the forward pass of a drawn k and the float64 loop all agree."""
    lora, leaves = ADAPTER.at_rank(LEAVES, rank)
    assert isinstance(lora, LoRA)
    assert (lora.rank, lora.scale) == (rank, 6.0 / rank)
    np.testing.assert_array_equal(leaves.params["a"], LEAVES.params["a"][:, :rank])
    np.testing.assert_array_equal(leaves.params["b"], LEAVES.params["b"][:rank])
    options = {"alpha": 6.0, "rank": 5, "drawn": rank}
    expected = one_layer.oracle("dylora").forward(LEAVES.params, KERNEL.dense(), X, options)
    np.testing.assert_allclose(one_layer.forward(lora, leaves, X, KERNEL), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(X @ KERNEL.dense() + _drawn(rank), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(X @ lora.merge(leaves, KERNEL), expected, rtol=1e-5, atol=1e-5)


def test_layers_are_cut_together():
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), LEAVES)
    _, cut = ADAPTER.at_rank(stacked, 2)
    assert cut.params["a"].shape == (2, 7, 2)
    np.testing.assert_array_equal(cut.params["b"][1], 2 * LEAVES.params["b"][:2])


@pytest.mark.parametrize("rank", [0, 6])
def test_other_ranks_are_refused(rank):
    with pytest.raises(ValueError, match="between 1 and the trained rank 5"):
        ADAPTER.at_rank(LEAVES, rank)
    with pytest.raises(ValueError, match="LoRA has one rank only"):
        make_adapter("lora").at_rank(LEAVES, 2)


def test_a_draw_needs_no_compilation():
    run = jax.jit(_drawn)
    for rank in (1, 4):
        np.testing.assert_allclose(run(jnp.int32(rank)), _drawn(rank), rtol=1e-5, atol=1e-6)
    assert run._cache_size() == 1


def test_a_site_of_a_smaller_rank_uses_all_of_it():
    np.testing.assert_array_equal(_drawn(jnp.int32(9)), _drawn(None))


def test_rule():
    assert ADAPTER.largest_drawn_rank == 5
    assert ADAPTER.rules(10) == (DrawnRanksOnly(prefix=False),)
    assert make_adapter("dylora", mode="train_prefix").rules(10) == (DrawnRanksOnly(prefix=True),)
    with pytest.raises(ValueError, match="mode must be"):
        make_adapter("dylora", mode="both")
