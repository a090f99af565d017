"""What every event rule keeps with any optimiser: exact writes, moments that follow, one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_plan
from small_plan import SINGLE, STACKED

from mor_jax.adapters import Leaves
from mor_jax.optim import plan_rules

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 24
# Method -> (its options, steps on which its event is due in a run of STEPS, leaves that it may write).
CASES = {
    "prilora": ({"rank": 4, "prune_interval": 5}, (5, 10, 15, 20), {"a"}),
    "adalora": ({"rank": 2, "interval": 3}, (3, 6, 9, 12, 15, 17), {"e", "mask"}),
    "alora": ({"rank": 2, "moved": 3}, (8, 10, 12, 14, 16, 18, 20, 22), {"a", "b", "gamma"}),
    "beamlora": ({"rank": 4, "interval": 6, "first_share": 0.5}, (3, 6, 9, 12, 15, 18), {"a", "b", "gamma"}),
    "mora": ({"rank": 2, "reset_every": 5}, (5, 10, 15, 20), {"m", "accumulated", "group_type"}),
}
OPTIMIZERS = {
    "sgd": optax.sgd(1e-2),
    "adamw": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.linear_schedule(1e-2, 0, STEPS), weight_decay=0.1, mask=lambda p: jax.tree.map(lambda _: True, p)
        ),
    ),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "masked": optax.masked(
        optax.inject_hyperparams(optax.lion)(learning_rate=1e-3),
        lambda p: jax.tree.map_with_path(lambda path, _: path[-1].key != "b", p),
    ),
}


def score(leaves):
    """A stand-in for minus the loss that depends on every factor and switch."""
    total = jnp.float32(0)
    for path, own in leaves.params.items():
        if "a" not in own:
            continue
        weight = leaves.state.get(path, {}).get("gamma", jnp.float32(1))
        total += jnp.sum(jnp.sin(own["a"].sum(-2) * weight * own["b"].sum(-1)))
    return total


@functools.cache
def _trained(name, optimizer_name):
    """(plan rules, optimizer, leaves, optimiser state, rule state) after one step of observed statistics."""
    plan = small_plan.plan_of(name, **CASES[name][0])
    rules = plan_rules(plan, STEPS)
    leaves = small_plan.leaves_of(plan)
    optimizer = rules.wrap(OPTIMIZERS[optimizer_name])
    state = optimizer.init(leaves.params)
    gradient = small_plan.random_like(leaves.params, 3)
    updates, state = jax.jit(optimizer.update)(gradient, state, leaves.params)
    leaves = leaves._replace(params=optax.apply_updates(leaves.params, updates))
    statistics = {
        path: {"feature_squares": small_plan.random_like(own["a"][..., 0], 4) ** 2}
        for path, own in leaves.params.items()
        if "a" in own
    }
    return rules, optimizer, leaves, state, rules.observe(rules.init(leaves), statistics)


def _apply(name, optimizer_name, step, jit=True):
    rules, optimizer, leaves, state, rule_state = _trained(name, optimizer_name)
    (rule,) = rules.events
    run = lambda leaves, state, own, key, step: rule.apply(  # noqa: E731 - closes over what is static
        leaves, state, own, key, score, step=step, optimizer=optimizer
    )
    run = jax.jit(run) if jit else run
    return run, run(leaves, state, rule_state.get(f"0-{rule.name}", {}), jax.random.key(5), jnp.int32(step))


def _types(tree):
    return jax.tree.map(lambda v: (v.shape, str(v.dtype)), tree)


@pytest.mark.parametrize("name", CASES)
def test_due_on_exactly_these_steps(name):
    rules = plan_rules(small_plan.plan_of(name, **CASES[name][0]), STEPS)
    (rule,) = rules.events
    assert tuple(step for step in range(STEPS + 1) if step and rule.due(step)) == CASES[name][1]
    assert [bool(rules.due(step)) for step in (CASES[name][1][0], 1)] == [True, False]


@pytest.mark.parametrize(
    ("name", "optimizer_name"),
    [(name, other) for name in CASES for other in ("adamw", "sgd", "masked")]
    + [("beamlora", other) for other in ("adafactor", "multi_steps")],
)
def test_any_optimizer(name, optimizer_name):
    """Nothing but the event's own leaves is written, and neither structure nor type of any state changes."""
    _, _, leaves, state, _ = _trained(name, optimizer_name)
    _, (after, new_state, _, report) = _apply(name, optimizer_name, CASES[name][1][1])
    assert _types((after, new_state)) == _types((leaves, state))
    changed = {
        path[-1].key
        for (path, one), other in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(leaves), strict=True)
        if (one != other).any()
    }
    assert changed == CASES[name][2] - {"mask"}  # which AdaLoRA's last cut alone writes
    assert all(value.size == 1 for value in report.values())


@pytest.mark.parametrize("name", CASES)
def test_jitted_once_and_equal_to_eager(name):
    due = CASES[name][1]
    rules, _, leaves, state, rule_state = _trained(name, "adamw")
    run, first = _apply(name, "adamw", due[1])
    (rule,) = rules.events
    own = rule_state.get(f"0-{rule.name}", {})
    run(leaves, state, own, jax.random.key(6), jnp.int32(due[0]))
    assert run._cache_size() == 1
    _, eager = _apply(name, "adamw", due[1], jit=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), first, eager)


def test_pruned_entries_are_exactly_zero_and_the_rest_untouched():
    _, _, leaves, _, _ = _trained("prilora", "adamw")
    _, (after, _, _, report) = _apply("prilora", "adamw", 5)
    zeros = 0
    for path in (STACKED, SINGLE):
        a, old = np.asarray(after.params[path]["a"]), np.asarray(leaves.params[path]["a"])
        assert ((a == 0).sum(-2) == a.shape[-2] // 2).all()
        assert ((a == old) | (a == 0)).all()
        zeros += (a == 0).sum()
    assert report["zeros"] == zeros


def test_new_ranks_of_alora_start_fresh_with_moments_that_are_exactly_zero():
    _, _, leaves, state, _ = _trained("alora", "adamw")
    _, (after, new_state, _, report) = _apply("alora", "adamw", 8)
    moments = optax.tree.get(new_state, "mu"), optax.tree.get(new_state, "nu")
    before = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    added = 0
    for path in (STACKED, SINGLE):
        new = np.asarray((after.state[path]["gamma"] == 1) & (leaves.state[path]["gamma"] == 0))
        added += new.sum()
        a = np.moveaxis(np.asarray(after.params[path]["a"]), -2, -1)
        b = np.asarray(after.params[path]["b"])
        assert (b[new] == 0).all()
        assert (np.abs(a[new]) <= a.shape[-1] ** -0.5).all()
        assert (b[~new] == np.asarray(leaves.params[path]["b"])[~new]).all()
        for moment, old in zip(moments, before, strict=True):
            assert (np.asarray(moment[path]["b"])[new] == 0).all()
            assert (np.moveaxis(np.asarray(moment[path]["a"]), -2, -1)[new] == 0).all()
            assert (np.asarray(moment[path]["b"])[~new] == np.asarray(old[path]["b"])[~new]).all()
    assert added == report["added"] > 0
    assert int(optax.tree.get(new_state, "count", filtering=lambda path, _: "ScaleByAdam" in str(path))) == 1


def test_moments_of_beamlora_follow_the_copied_ranks():
    _, _, leaves, state, _ = _trained("beamlora", "adamw")
    _, (after, new_state, _, report) = _apply("beamlora", "adamw", 6)
    gamma, old = after.params[STACKED]["gamma"], leaves.params[STACKED]["gamma"]
    paired = np.asarray(gamma != old)
    mu, before = (optax.tree.get(s, "mu")[STACKED] for s in (new_state, state))
    for path in (STACKED, SINGLE):  # of all gammas, as the released code does
        assert optax.tree.get(state, "mu")[path]["gamma"].all()
        assert not any(optax.tree.get(new_state, name)[path]["gamma"].any() for name in ("mu", "nu"))
    copied = (after.params[STACKED]["b"] != leaves.params[STACKED]["b"]).any(-1)
    assert (copied == (mu["b"] != before["b"]).any(-1)).all()
    for layer, rank in np.argwhere((mu["b"] != before["b"]).any(-1)):
        rows = np.asarray(before["b"][layer])
        assert any((np.asarray(mu["b"][layer, rank]) == row).all() for row in rows)
    total = paired.sum() + np.asarray(after.params[SINGLE]["gamma"] != leaves.params[SINGLE]["gamma"]).sum()
    assert total == 2 * report["moved"] > 0


def test_beamlora_takes_the_moments_of_its_memory():
    """Remembered at step 3, written at step 6 where a rank is copied: not what Adam has in between."""
    rules, optimizer, leaves, early, _ = _trained("beamlora", "adamw")
    (rule,) = rules.events
    gradient = small_plan.random_like(leaves.params, 9)
    _, late = jax.jit(optimizer.update)(gradient, early, leaves.params)
    own = rules.init(leaves, optimizer.init(leaves.params), optimizer)[f"0-{rule.name}"]
    run = jax.jit(lambda state, own, step: rule.apply(
        leaves, state, own, jax.random.key(5), score, step=step, optimizer=optimizer
    ))  # fmt: skip
    _, same, own, _ = run(early, own, jnp.int32(3))
    jax.tree.map(np.testing.assert_array_equal, same, early)
    after, moved, _, report = run(late, own, jnp.int32(6))
    assert report["moved"] > 0
    for path in (STACKED, SINGLE):
        copied = np.asarray((after.params[path]["b"] != leaves.params[path]["b"]).any(-1))
        for name in ("mu", "nu"):
            new, old, between = (np.asarray(optax.tree.get(s, name)[path]["b"]) for s in (moved, early, late))
            assert (new[~copied] == between[~copied]).all()
            rows = {row.tobytes() for row in old.reshape(-1, old.shape[-1])}
            assert all(row.tobytes() in rows for row in new[copied])


def test_remora_folds_m_and_starts_again_with_the_next_type():
    """The accumulator of the current type takes M up, moments of M are 0, and the step count of Adam goes on."""
    _, _, leaves, state, _ = _trained("mora", "adamw")
    run, (after, new_state, _, report) = _apply("mora", "adamw", 5)
    assert report["group_type"] == 1
    for path in (STACKED, SINGLE):
        m, old, new = leaves.params[path]["m"], leaves.state[path], after.state[path]
        assert (m != 0).all()
        assert not after.params[path]["m"].any()
        assert (new["group_type"] == old["group_type"] + 1).all()
        np.testing.assert_array_equal(new["accumulated"][..., 0, :, :], m)  # the accumulators were 0
        assert not new["accumulated"][..., 1:, :, :].any()
        for name in ("mu", "nu"):
            assert optax.tree.get(state, name)[path]["m"].any()
            assert not optax.tree.get(new_state, name)[path]["m"].any()
    assert int(optax.tree.get(new_state, "count", filtering=lambda path, _: "ScaleByAdam" in str(path))) == 1
    types, again = [1], after
    for step in (10, 15, 20):
        again, *_ = run(again, new_state, {}, jax.random.key(5), jnp.int32(step))
        types.append(int(again.state[SINGLE]["group_type"][0]))
    assert types == [1, 2, 3, 0]  # after the fourth comes the first


def test_other_sites_and_frozen_leaves_are_left_alone():
    """A rule bound to one site writes nothing at another, and knows only its own site's statistics."""
    rules, optimizer, leaves, state, _ = _trained("prilora", "sgd")
    rule = type(rules.events[0])(rules.events[0].event, rules.events[0].sites[:1])
    rule_state = rule.init(leaves)
    assert list(rule_state) == [STACKED]
    constants = leaves._replace(constants={STACKED: {"c": jnp.ones(3)}})
    after, *_ = rule.apply(
        constants, state, rule_state, jax.random.key(0), score, step=jnp.int32(5), optimizer=optimizer
    )
    assert after.params[SINGLE] is leaves.params[SINGLE]
    assert after.constants == constants.constants
    assert isinstance(after, Leaves)
