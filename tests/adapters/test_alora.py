"""The card of ALoRA: ablation scores and ranks that move."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import Leaves, Site, make_adapter
from mor_jax.adapters.alora import ReallocateRanks, ablation_scores, reallocate
from mor_jax.adapters.rules import EventCall

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
ORACLE = one_layer.oracle("alora")


def test_starts_as_a_lora_without_scale():
    adapter = make_adapter("alora", rank=3, max_rank=5)
    kernel = one_layer.kernel_of(KEY)
    leaves = one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY)
    assert leaves.state["gamma"].tolist() == [1, 1, 1, 0, 0]
    x = jax.random.normal(KEY, (4, 7))
    lora = Leaves({"a": leaves.params["a"][:, :3], "b": leaves.params["b"][:3]})
    expected = one_layer.forward(make_adapter("lora", rank=3, alpha=3.0), lora, x, kernel)
    np.testing.assert_allclose(one_layer.forward(adapter, leaves, x, kernel), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]])
def test_any_switches_equal_the_loop(gamma):
    adapter = make_adapter("alora", rank=3, max_rank=5)
    kernel = one_layer.kernel_of(KEY)
    leaves = one_layer.scramble(one_layer.start(adapter, KEY, kernel), KEY)
    leaves = leaves._replace(state={"gamma": jnp.array(gamma, jnp.float32)})
    x = jax.random.normal(KEY, (3, 7))
    expected = ORACLE.forward(leaves.params, kernel.dense(), x, {"rank": 3, "gamma": gamma})
    np.testing.assert_allclose(one_layer.forward(adapter, leaves, x, kernel), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x @ adapter.merge(leaves, kernel), expected, rtol=1e-5, atol=1e-5)


def _score(weights):
    """Not additive, so that "all but" and "only" differ."""
    return lambda gamma: jnp.sin(jnp.sum(jnp.asarray(gamma) * weights)) - 0.1 * jnp.sum(jnp.asarray(gamma) @ weights.T)


@pytest.mark.parametrize(
    ("seed", "count", "empty"), [(0, 3, ()), (1, 3, ()), (2, 3, (1,)), (3, 5, (0, 3)), (4, 99, ())]
)
def test_scores_and_a_round_equal_the_loop(seed, count, empty):
    """Also with sites that have lost all their ranks, and with a count that is larger than what there is."""
    sites, width = 4, 5
    keys = jax.random.split(jax.random.key(seed), 2)
    gamma = (jax.random.uniform(keys[0], (sites, width)) < 0.6).at[:, 0].set(True).astype(jnp.float32)
    gamma = gamma.at[jnp.array(empty, jnp.int32)].set(0.0)
    score = _score(jax.random.normal(keys[1], (sites, width)))
    found = ablation_scores(gamma, score)
    rows = [[float(v) for v in row] for row in gamma]
    expected = ORACLE.scores(rows, lambda trial: float(score(trial)))
    assert np.isinf(np.asarray(found)[np.asarray(gamma) == 0]).all()
    for place, value in expected.items():
        np.testing.assert_allclose(found[place], value, rtol=1e-4, atol=1e-5)
    pruned, new = reallocate(gamma, found, count)
    gone, given = ORACLE.round_of(rows, {place: float(found[place]) for place in expected}, count)
    assert {tuple(map(int, place)) for place in np.argwhere(pruned)} == set(gone)
    assert np.asarray(new).sum(1).tolist() == given
    assert not (new & (gamma > 0)).any()


def _round(lost, means, count, width=20, rank=8):
    """A round in which the sites of ``lost`` lose ``count`` ranks together, with the other sites' mean scores."""
    gamma = jnp.zeros((len(lost), width)).at[:, :rank].set(1.0)
    scores = jnp.where(gamma > 0, jnp.asarray(means)[:, None] + 10.0, jnp.inf)
    for site, ranks in enumerate(lost):
        scores = scores.at[site, :ranks].set(-1.0)
    return reallocate(gamma, scores, count)


def test_eight_ranks_to_three_sites_are_three_three_two_by_mean_score():
    pruned, new = _round([8, 0, 0, 0], [0.0, 1.0, 3.0, 2.0], 8)
    assert np.asarray(pruned).sum(1).tolist() == [8, 0, 0, 0]
    assert np.asarray(new).sum(1).tolist() == [0, 2, 3, 3]


def test_where_every_site_lost_one_the_budget_shrinks():
    pruned, new = _round([1, 2, 1], [0.0, 1.0, 2.0], 4)
    assert pruned.sum() == 4
    assert not new.any()


def test_an_emptied_site_is_the_last_to_be_given_ranks():
    """Its mean score is -inf, where a mean of nothing would be 0: above those of the sites that hurt."""
    gamma = jnp.zeros((4, 6)).at[:3, :2].set(1.0)
    scores = jnp.where(gamma > 0, jnp.array([-9.0, -2.0, -1.0, 0.0])[:, None], jnp.inf)
    pruned, new = reallocate(gamma, scores, 2)
    assert np.asarray(pruned).sum(1).tolist() == [2, 0, 0, 0]
    assert np.asarray(new).sum(1).tolist() == [0, 1, 1, 0]
    for count, given in ((1, [0, 0, 1, 0]), (2, [0, 1, 1, 0])):
        assert np.asarray(reallocate(gamma, scores, count)[1]).sum(1).tolist() == given


@pytest.mark.parametrize("count", [5, 6, 100])
def test_the_best_rank_of_the_model_is_never_pruned(count):
    gamma, scores = jnp.ones((2, 3)), jnp.arange(6.0).reshape(2, 3)
    pruned, new = reallocate(gamma, scores, count)
    assert np.asarray(pruned).tolist() == [[True, True, True], [True, True, False]]
    assert not new.any()  # every site lost one
    again, _ = reallocate(jnp.zeros((2, 3)).at[1, 2].set(1.0), scores, count)
    assert not again.any()


def test_a_score_that_is_not_a_number_prunes_its_rank_first():
    scores = ablation_scores(jnp.ones((2, 2)), lambda trial: jnp.where(trial[0, 1] == 0, jnp.nan, trial.sum()))
    assert scores.tolist() == [[-jnp.inf, -jnp.inf], [-jnp.inf, -jnp.inf]]  # each is tried alone, without it
    only_without = lambda trial: jnp.where((trial[0, 1] == 0) & (trial.sum() == 3), jnp.nan, trial.sum())  # noqa: E731
    scores = ablation_scores(jnp.ones((2, 2)), only_without)
    assert scores.tolist() == [[2, -jnp.inf], [2, 2]]
    assert np.argwhere(reallocate(jnp.ones((2, 2)), scores, 1)[0]).tolist() == [[0, 1]]


def test_what_an_emptied_site_and_too_many_moves_warn_of():
    a, gamma = jnp.ones((3, 7, 4)), jnp.zeros((3, 4)).at[:, :2].set(1.0)
    leaves = {"proj": Leaves({"a": a, "b": jnp.ones((3, 4, 5))}, {"gamma": gamma})}
    weight = jnp.arange(12.0).reshape(3, 4)  # the two ranks of the first site are the worst
    event = ReallocateRanks((5,), 2, 4)
    score = lambda leaves: jnp.sum(weight * leaves["proj"].state["gamma"])  # noqa: E731 - a stand-in
    result = event.apply(EventCall(leaves, {}, {}, KEY, jnp.int32(5), score))
    assert result.report["emptied"] == 1
    assert "the last rank of 1 sites" in event.warning(result.report)
    assert event.warning({**result.report, "emptied": 0}) == ""
    again = event.apply(EventCall(result.leaves, {}, {}, KEY, jnp.int32(6), score))
    assert again.report["emptied"] == 0  # only those of a round itself
    sites = (Site("q", 7, 5, 2), Site("v", 7, 5, 2))
    caution = make_adapter("alora", rank=1).caution(sites)
    assert "moved = 7 ranks a round and all its 2 sites have 4 together" in caution
    assert make_adapter("alora", rank=2).caution(sites) == ""
    assert make_adapter("alora", rank=1, rounds=0).caution(sites) == ""


def test_full_sites_take_no_more():
    pruned, new = _round([4, 0, 0], [0.0, 5.0, 1.0], 4, width=9)
    assert pruned.sum() == 4
    assert np.asarray(new).sum(1).tolist() == [0, 1, 1]


def test_event_moves_ranks_and_never_adds_any():
    a, b = jax.random.normal(KEY, (3, 7, 6)), jax.random.normal(KEY, (3, 6, 5))
    gamma = jnp.zeros((3, 6)).at[:, :3].set(1.0)
    leaves = {"proj": Leaves({"a": a, "b": b}, {"gamma": gamma})}
    weight = jnp.arange(18.0).reshape(3, 6)
    score = lambda leaves: jnp.sum(jnp.sin(weight) * leaves["proj"].state["gamma"])  # noqa: E731 - a stand-in
    event = ReallocateRanks((5,), 2, 6)
    result = event.apply(EventCall(leaves, {}, {}, KEY, jnp.int32(5), score))
    after = np.asarray(result.leaves["proj"].state["gamma"])
    assert set(np.unique(after)) <= {0.0, 1.0}
    assert after.sum() == gamma.sum() == result.report["ranks"]
    assert result.report["pruned"] == result.report["added"] == 2
    lost = np.argwhere((after == 0) & (np.asarray(gamma) == 1))
    worst = np.argsort(np.where(np.asarray(gamma) > 0, np.sin(np.asarray(weight)), np.inf).ravel())[:2]
    assert sorted(np.ravel_multi_index(lost.T, (3, 6))) == sorted(worst)


def test_rounds_follow_the_steps_of_the_run():
    """K1 = 1/3 and K2 = 1/12 of the steps: 8 rounds, the last one 1/12 before the end."""
    adapter = make_adapter("alora")
    assert (adapter.rank, adapter.moved, adapter.rounds, adapter.width) == (8, 7, 8, 16)
    (event,) = make_adapter("alora").rules(1200)
    assert [step for step in range(1, 1201) if event.due(step)] == [400, 500, 600, 700, 800, 900, 1000, 1100]
    assert make_adapter("alora").rules(3)[0].steps == (1, 2)
    for options in ({"max_rank": 4}, {"moved": 0}, {"rounds": -1}):
        with pytest.raises(ValueError, match="ALoRA"):
            make_adapter("alora", **options)
