"""The card of BeamLoRA: weights that sum to the rank, pruning past a share, and strong ranks that are copied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import Leaves, make_adapter
from mor_jax.adapters.beamlora import ExpandStrong, pair_ranks, pruned_counts
from mor_jax.adapters.rules import EventCall
from mor_jax.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
ORACLE = one_layer.oracle("beamlora")
EVENT = ExpandStrong(interval=6, total_steps=60, rank=6, temperature=0.5, first_share=0.9, end=40.0)


def _leaves(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    gamma = jax.random.normal(keys[2], (4, 6))
    return Leaves(
        {"a": jax.random.normal(keys[0], (4, 7, 6)), "b": jax.random.normal(keys[1], (4, 6, 5)), "gamma": gamma}
    )


def _apply(leaves, state, step, key=KEY, event=EVENT):
    return event.apply(EventCall({"proj": leaves}, state, {}, key, jnp.int32(step), lambda _: jnp.float32(0)))


def test_starts_as_lora():
    adapter = make_adapter("beamlora", rank=3)
    kernel = one_layer.kernel_of(KEY)
    first = one_layer.start(adapter, KEY, kernel)
    assert not first.params["gamma"].any()
    factors = {leaf: value for leaf, value in one_layer.scramble(first, KEY).params.items() if leaf != "gamma"}
    x = jax.random.normal(KEY, (4, 7))
    here = first._replace(params={**factors, "gamma": first.params["gamma"]})
    expected = one_layer.forward(make_adapter("lora", rank=3), Leaves(factors), x, kernel)
    np.testing.assert_allclose(one_layer.forward(adapter, here, x, kernel), expected, rtol=1e-5, atol=1e-6)
    assert (adapter.temperature, adapter.first_share, adapter.end_fraction) == (0.05, 0.95, 2 / 3)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_weights_sum_to_the_rank(scale):
    adapter = make_adapter("beamlora", rank=8, alpha=8.0)
    gamma = scale * jax.random.normal(KEY, (8,))
    weights = adapter.rank_weights(Leaves({"gamma": gamma}), None)
    np.testing.assert_allclose(weights.sum(), 8.0, rtol=1e-6)
    np.testing.assert_allclose(weights, ORACLE.weights(np.float64(gamma).tolist(), 0.05), rtol=1e-4, atol=1e-6)


def test_threshold_of_the_card():
    """E = 24,688 of 37,032 steps: t(3000) = 0.9518; P0 at the start; 1 from E on."""
    (event,) = make_adapter("beamlora").rules(37_032)
    assert event.end == 24_688
    np.testing.assert_allclose(event.threshold(3000), 0.9518, atol=5e-5)
    np.testing.assert_allclose(event.threshold(0), 0.95, rtol=1e-6)
    assert event.threshold(24_688) == event.threshold(30_000) == 1


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_pruned_counts_equal_the_loop(share):
    gammas = _leaves(1).params["gamma"]
    weights = 6 * jax.nn.softmax(gammas / 0.5, axis=-1)
    expected = [len(ranks) for ranks in ORACLE.pruned(np.float64(gammas).tolist(), 0.5, share)]
    assert pruned_counts(weights, jnp.float32(share)).tolist() == expected
    assert max(expected) <= 3
    assert not pruned_counts(weights, jnp.float32(1.0)).any()


def test_the_rank_that_crosses_the_share_goes_too():
    """Of p = 1.6, 1.2, 0.8, 0.4 the third brings the sum from 2.8 past 3.0: it goes, as in the released code."""
    weights = jnp.array([[0.4, 1.6, 0.8, 1.2]])
    assert pruned_counts(weights, jnp.float32(0.75)).tolist() == [2]
    assert pruned_counts(weights, jnp.float32(0.95)).tolist() == [1]  # 3.8, crossed by the last
    assert pruned_counts(jnp.ones((2, 4)), jnp.float32(0.75)).sum() == 2  # the sixth reaches the share, to the dot


def test_pairs_join_the_weakest_with_the_strongest_at_random():
    weights = jnp.array([0.1, 3.0, 0.2, 2.0, 0.3, 1.0])
    seen = set()
    for seed in range(12):
        source, partner = pair_ranks(jax.random.key(seed), weights, jnp.int32(3))
        source, partner = source.tolist(), partner.tolist()
        assert sorted(source[weak] for weak in (0, 2, 4)) == [1, 3, 5]
        assert [source[strong] for strong in (1, 3, 5)] == [1, 3, 5]
        assert all(partner[partner[rank]] == rank != partner[rank] for rank in range(6))
        seen.add(tuple(source))
    assert len(seen) > 2
    source, partner = pair_ranks(KEY, weights, jnp.int32(0))
    assert source.tolist() == partner.tolist() == list(range(6))


def test_a_move_copies_the_factors_of_half_an_interval_ago():
    """Weak ranks get their donor's column and row as remembered; both gammas of a pair become their mean."""
    old, now = _leaves(2), _leaves(3)
    remembered = _apply(old, EVENT.init({"proj": old}), 3)
    jax.tree.map(np.testing.assert_array_equal, remembered.leaves["proj"], old)
    result = _apply(now, remembered.state, 6)
    after, gone = (
        result.leaves["proj"].params,
        ORACLE.pruned(np.float64(now.params["gamma"]).tolist(), 0.5, float(EVENT.threshold(6))),
    )
    assert sum(map(len, gone)) == result.report["moved"] > 0
    for site, ranks in enumerate(gone):
        strongest = np.argsort(-np.asarray(now.params["gamma"][site]))[: len(ranks)]
        donors = []
        for rank in ranks:
            (donor,) = (k for k in strongest if (after["b"][site, rank] == old.params["b"][site, k]).all())
            np.testing.assert_array_equal(after["a"][site, :, rank], old.params["a"][site, :, donor])
            mean = (now.params["gamma"][site, rank] + now.params["gamma"][site, donor]) / 2
            assert after["gamma"][site, rank] == after["gamma"][site, donor] == mean
            donors.append(donor)
        assert len(set(donors)) == len(ranks)
        for rank in set(range(6)) - set(ranks):
            np.testing.assert_array_equal(after["b"][site, rank], now.params["b"][site, rank])
            np.testing.assert_array_equal(after["a"][site, :, rank], now.params["a"][site, :, rank])
            if rank not in donors:
                assert after["gamma"][site, rank] == now.params["gamma"][site, rank]
    jax.tree.map(np.testing.assert_array_equal, result.state, remembered.state)


def _with_moments(leaves, state, step, moments):
    call = EventCall({"proj": leaves}, state, {}, KEY, jnp.int32(step), lambda _: jnp.float32(0), {"proj": moments})
    return EVENT.apply(call)


def test_a_copied_rank_gets_the_moments_that_its_donor_had_half_an_interval_ago():
    """Adam's two moments, told apart by number; those of every gamma, in a pair or not, are 0 after a move."""
    old, now = _leaves(2), _leaves(3)
    before, today = ({leaf: (_leaves(n).params[leaf], _leaves(n + 1).params[leaf]) for leaf in "ab"} for n in (5, 7))
    state = EVENT.init({"proj": old}, {"proj": today})
    remembered = _with_moments(old, state, 3, before)
    assert (remembered.moments("proj", "gamma", 0, old.params["gamma"]) == old.params["gamma"]).all()
    jax.tree.map(np.testing.assert_array_equal, remembered.state["proj"]["moments"]["1"]["a"], before["a"][1])
    result = _with_moments(now, remembered.state, 6, today)
    gone = ORACLE.pruned(np.float64(now.params["gamma"]).tolist(), 0.5, float(EVENT.threshold(6)))
    assert sum(map(len, gone)) > 0
    for number in (0, 1):
        moments = {leaf: result.moments("proj", leaf, number, today[leaf][number]) for leaf in "ab"}
        for site, ranks in enumerate(gone):
            for rank in range(6):
                source = today if rank not in ranks else before
                place = rank
                if rank in ranks:  # the donor is told by the row of b that was copied
                    rows = old.params["b"][site]
                    (place,) = np.flatnonzero((rows == result.leaves["proj"].params["b"][site, rank]).all(1))
                np.testing.assert_array_equal(moments["a"][site, :, rank], source["a"][number][site, :, place])
                np.testing.assert_array_equal(moments["b"][site, rank], source["b"][number][site, place])
        assert not result.moments("proj", "gamma", number, now.params["gamma"]).any()
    jax.tree.map(np.testing.assert_array_equal, result.state, remembered.state)


def test_a_move_resets_the_moments_of_every_gamma():
    """Of ranks and sites without a pair too, as in the released code; remembering resets none."""
    event = ExpandStrong(interval=6, total_steps=60, rank=6, temperature=0.5, first_share=0.995, end=40.0)
    leaves = _leaves(3)
    state = event.init({"proj": leaves})
    result = _apply(leaves, state, 6, event=event)
    moment = jnp.ones((4, 6))
    alone = np.asarray(result.leaves["proj"].params["gamma"] == leaves.params["gamma"])
    assert 0 < result.report["moved"]
    assert alone.any()
    assert not result.moments("proj", "gamma", 0, moment).any()
    assert (_apply(leaves, state, 3, event=event).moments("proj", "gamma", 0, moment) == 1).all()


def test_a_single_rank_is_refused():
    with pytest.raises(ValueError, match=r"BeamLoRA.rank must be at least 2, got 1: .* choose method lora"):
        make_adapter("beamlora", rank=1)


def test_the_temperature_follows_the_learning_rate_of_the_run():
    """The released code: 0.05 for learning rates from 1e-4 on, 0.03 below."""
    for learning_rate, expected in ((3e-4, 0.05), (1e-4, 0.05), (9e-5, 0.03)):
        config = TrainConfig(method="beamlora", learning_rate=learning_rate)
        assert config.adapter().temperature == expected
        given = dataclasses.replace(config, options={"temperature": 0.2})
        assert given.adapter().temperature == 0.2
        assert dict(given.override_adapters()) == {}
        mixed = TrainConfig(learning_rate=learning_rate, overrides={"up_proj": {"method": "beamlora"}})
        assert dict(mixed.override_adapters())["up_proj"].temperature == expected


def test_moves_stop_an_interval_before_the_end():
    """Every T steps while T steps are left, each remembered T / 2 steps before."""
    (event,) = make_adapter("beamlora", interval=10).rules(45)
    assert [step for step in range(1, 46) if event.due(step)] == [5, 10, 15, 20, 25, 30]
    assert [step for step in range(1, 46) if event.moves(step)] == [10, 20, 30]
    assert make_adapter("beamlora").rules(120)[0].interval == 10
    for options in ({"interval": 1}, {"temperature": 0.0}, {"first_share": 1.5}):
        with pytest.raises(ValueError, match="BeamLoRA"):
            make_adapter("beamlora", **options)
