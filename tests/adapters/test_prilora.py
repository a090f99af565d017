"""The card of PRILoRA: ranks by depth, and pruning by feature norms."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import AdapterInputs, Kernel, Leaves, Site, make_adapter
from mor_jax.adapters.prilora import PruneFactors
from mor_jax.adapters.rules import EventCall

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
ORACLE = one_layer.oracle("prilora")


def _ranks(adapter, site):
    return [int(adapter.rank_of(site, layer)) for layer in range(site.num_layers)]


def test_default_ranks_average_eight_over_twelve_layers():
    adapter = make_adapter("prilora")
    ranks = _ranks(adapter, Site("layers/q_proj", 16, 16, 12))
    assert (ranks[0], ranks[-1], sum(ranks)) == (4, 12, 96)
    assert adapter.width == 12


@pytest.mark.parametrize(("first", "last", "layers"), [(4, 12, 12), (4, 12, 32), (2, 5, 3), (3, 3, 4), (9, 2, 6)])
def test_ranks_are_linear_in_depth_and_rounded_to_the_nearest(first, last, layers):
    adapter = make_adapter("prilora", first_rank=first, last_rank=last)
    expected = [ORACLE.layer_rank(first, last, layer, layers) for layer in range(layers)]
    assert _ranks(adapter, Site("layers/q_proj", 16, 16, layers)) == expected


def test_layers_that_are_modules_of_their_own_have_the_ranks_of_stacked_ones():
    adapter = make_adapter("prilora", rank=6)
    stacked = _ranks(adapter, Site("layers/q_proj", 16, 16, 5))
    alone = [Site(f"layers_{i}/q_proj", 16, 16, 1, first_layer=i, depth=5) for i in range(5)]
    assert [_ranks(adapter, site)[0] for site in alone] == stacked


def test_padding_neither_computes_nor_learns():
    adapter = make_adapter("prilora", rank=4)
    kernel = one_layer.kernel_of(KEY)
    first = adapter.init(KEY, Site("layers/proj", 7, 5, 3), jnp.int32(0), kernel)
    leaves = one_layer.scramble(first, KEY)
    x = jax.random.normal(KEY, (4, 7))
    assert leaves.state["mask"].tolist() == [1, 1, 0, 0, 0, 0]
    cut = {"a": leaves.params["a"][:, :2], "b": leaves.params["b"][:2]}
    lora = make_adapter("lora", rank=2)
    expected = one_layer.forward(lora, Leaves(cut), x, kernel)
    np.testing.assert_allclose(one_layer.forward(adapter, leaves, x, kernel), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(one_layer.forward(adapter, leaves._replace(params=p), x, kernel) ** 2))(
        leaves.params
    )
    assert not gradient["a"][:, 2:].any()
    assert not gradient["b"][2:].any()
    assert gradient["a"][:, :2].all()


def test_statistics_are_squares_of_real_tokens():
    adapter = make_adapter("prilora")
    x = jax.random.normal(KEY, (2, 3, 7), jnp.bfloat16)
    segments = jnp.array([[1, 2, 0], [1, 0, 0]])
    found = adapter.statistics(Leaves({}), x, None, AdapterInputs(segment_ids=segments))["feature_squares"]
    real = np.float64(x)[np.asarray(segments) > 0]
    np.testing.assert_allclose(found, (real**2).sum(0), rtol=1e-5)
    every = adapter.statistics(Leaves({}), x, None, AdapterInputs())["feature_squares"]
    np.testing.assert_allclose(every, (np.float64(x) ** 2).sum((0, 1)), rtol=1e-5)


def _event(a, event, norms):
    leaves = {"proj": Leaves({"a": a, "b": jnp.ones((len(a), 3, 5))})}
    state = {"proj": {"feature_norm": norms}}
    return event.apply(EventCall(leaves, state, {}, KEY, jnp.int32(40), lambda _: jnp.float32(0)))


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.0])
def test_pruning_equals_the_loop(fraction):
    """Zeros exactly where the float64 loop puts them, all else bit-equal, b untouched."""
    a = jax.random.normal(KEY, (2, 9, 3))
    norms = jnp.abs(jax.random.normal(jax.random.key(1), (2, 9)))
    result = _event(a, PruneFactors(40, fraction, 0.9), norms)
    after = result.leaves["proj"].params
    for layer in range(2):
        expected = ORACLE.prune(a[layer], np.asarray(norms[layer], np.float64), fraction)
        np.testing.assert_array_equal(after["a"][layer], expected.astype(np.float32))
    assert (after["b"] == 1).all()
    assert result.report["zeros"] == 2 * 3 * int(fraction * 9)
    assert result.moments is None


def test_pruned_entries_may_grow_again():
    """No mask is kept: the same event on values that grew back prunes others."""
    event, norms = PruneFactors(40, 0.5, 0.9), jnp.ones((1, 4))
    once = _event(jnp.array([[[1.0], [2.0], [3.0], [4.0]]]), event, norms).leaves["proj"].params["a"]
    again = _event(once + jnp.array([[[9.0], [0.0], [0.0], [0.0]]]), event, norms).leaves["proj"].params["a"]
    assert once[0, :, 0].tolist() == [0, 0, 3, 4]
    assert again[0, :, 0].tolist() == [9, 0, 0, 4]


def test_running_mean_of_norms():
    event = PruneFactors(40, 0.5, 0.9)
    state = event.init({"proj": Leaves({"a": jnp.ones((2, 3, 1))})})
    assert not state["proj"]["feature_norm"].any()
    expected = np.zeros((2, 3))
    for step in range(3):
        squares = jnp.abs(jax.random.normal(jax.random.key(step), (2, 3)))
        state = event.observe(state, {"proj": {"feature_squares": squares}})
        expected = 0.9 * expected + 0.1 * np.sqrt(np.float64(squares))
    np.testing.assert_allclose(state["proj"]["feature_norm"], expected, rtol=1e-6)


def test_defaults_and_merge_of_a_lone_layer():
    adapter = make_adapter("prilora")
    assert (adapter.prune_interval, adapter.prune_fraction, adapter.norm_decay) == (40, 0.5, 0.9)
    assert adapter.rules(1000) == (PruneFactors(40, 0.5, 0.9),)
    assert [step for step in range(1, 121) if adapter.rules(120)[0].due(step)] == [40, 80, 120]
    kernel = Kernel(jnp.ones((7, 5)))
    assert int(adapter.init(KEY, Site("proj", 7, 5), jnp.int32(0), kernel).state["mask"].sum()) == 8
    for options in ({"prune_fraction": 1.0}, {"prune_interval": 0}, {"first_rank": -1}):
        with pytest.raises(ValueError, match="PRILoRA"):
            make_adapter("prilora", **options)
