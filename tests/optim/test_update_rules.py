"""What every update rule keeps around any optimiser, and what each rule does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_plan
from small_plan import SINGLE, STACKED

from mor_jax.adapters.adalora import Sensitivity
from mor_jax.adapters.dylora import DrawnRanksOnly
from mor_jax.optim import LearningRates, UpdateRule, mean_penalty, plan_rules

pytestmark = pytest.mark.usefixtures("quick_compilation")

RULES = {
    "frozen": UpdateRule(DrawnRanksOnly()),
    "prefix": UpdateRule(DrawnRanksOnly(prefix=True)),
    "sensitivity": UpdateRule(Sensitivity(0.85)),
    "rates": UpdateRule(LearningRates((("b", 16.0),))),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
PARAMS = small_plan.leaves_of(small_plan.plan_of("dylora", rank=3)).params
GRADIENT = small_plan.random_like(PARAMS)
EXTRA = {"rank": jnp.int32(2)}


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def _close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, other)


def _two_steps(optimizer, params=PARAMS):
    state = optimizer.init(params)
    for gradient in (GRADIENT, jax.tree.map(jnp.sin, GRADIENT)):
        updates, state = optimizer.update(gradient, state, params, **EXTRA)
        params = optax.apply_updates(params, updates)
    return params, state


@each_rule
def test_init_under_eval_shape_and_no_change_of_types(rule):
    wrapped = rule.wrap(optax.adamw(1e-2))
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), PARAMS)
    abstract, state = jax.eval_shape(wrapped.init, params), wrapped.init(params)
    gradient = jax.tree.map(lambda v: v.astype(jnp.bfloat16), GRADIENT)
    updates, after = jax.jit(wrapped.update)(gradient, state, params, **EXTRA)
    types = lambda tree: jax.tree.map(lambda v: (v.shape, str(v.dtype)), tree)  # noqa: E731
    assert types(abstract) == types(state) == types(after)
    assert types(updates) == types(params)


@each_rule
def test_chain(rule):
    """The rule is outermost: what stands before it in a chain comes first, what stands after it sees its updates."""
    chained = optax.chain(optax.scale(0.5), rule.wrap(optax.sgd(1e-2)), optax.scale(2.0))
    halved = jax.tree.map(lambda g: g * 0.5, GRADIENT)
    alone = rule.wrap(optax.sgd(1e-2))
    expected, _ = alone.update(halved, alone.init(PARAMS), PARAMS, **EXTRA)
    actual, _ = chained.update(GRADIENT, chained.init(PARAMS), PARAMS, **EXTRA)
    _close(actual, jax.tree.map(lambda u: 2 * u, expected))


@each_rule
def test_inject_hyperparams(rule):
    injected = optax.inject_hyperparams(lambda learning_rate: rule.wrap(optax.adam(learning_rate)))(learning_rate=1e-2)
    _close(_two_steps(injected)[0], _two_steps(rule.wrap(optax.adam(1e-2)))[0])


@each_rule
def test_multi_steps(rule):
    accumulated = optax.MultiSteps(rule.wrap(optax.adam(1e-2)), 2)
    after, _ = _two_steps(accumulated.gradient_transformation())
    mean = jax.tree.map(lambda g: (g + jnp.sin(g)) / 2, GRADIENT)
    alone = rule.wrap(optax.adam(1e-2))
    updates, _ = alone.update(mean, alone.init(PARAMS), PARAMS, **EXTRA)
    _close(after, optax.apply_updates(PARAMS, updates))


@each_rule
def test_masked(rule):
    mask = jax.tree.map(lambda _: True, PARAMS) | {SINGLE: {"a": False, "b": False}}
    masked = optax.masked(rule.wrap(optax.adam(1e-2)), mask)
    updates, state = masked.update(GRADIENT, masked.init(PARAMS), PARAMS, **EXTRA)
    alone = rule.wrap(optax.adam(1e-2))
    expected, _ = alone.update(GRADIENT, alone.init(PARAMS), PARAMS, **EXTRA)
    _same(updates[STACKED], expected[STACKED])
    _same(updates[SINGLE], GRADIENT[SINGLE])
    for name in rule.transform.accumulators:
        assert isinstance(optax.tree.get(state, name)[SINGLE]["a"], optax.MaskedNode)


@each_rule
def test_other_sites_pass_unchanged(rule):
    bound = UpdateRule(rule.transform, (STACKED,))
    after, state = _two_steps(bound.wrap(optax.adamw(1e-2)))
    plain, _ = _two_steps(optax.with_extra_args_support(optax.adamw(1e-2)))
    _same(after[SINGLE], plain[SINGLE])
    for name in rule.transform.accumulators:
        assert not any(leaf.any() for leaf in optax.tree.get(state, name)[SINGLE].values())
    if not rule.transform.accumulators:
        assert (after[STACKED]["b"] != plain[STACKED]["b"]).any()


@each_rule
def test_no_second_compilation(rule):
    wrapped = rule.wrap(optax.adam(1e-2))
    update, state = jax.jit(wrapped.update), wrapped.init(PARAMS)
    for rank in (1, 3):
        _, state = update(GRADIENT, state, PARAMS, rank=jnp.int32(rank))
    assert update._cache_size() == 1


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2, weight_decay=0.3), optax.sgd(1e-2, momentum=0.9)])
@pytest.mark.parametrize("prefix", [False, True])
def test_dylora_moves_the_drawn_ranks_alone(optimizer, prefix):
    """Whatever moments and weight decay say: the ranks that were not drawn are bit-equal after every step."""
    wrapped = UpdateRule(DrawnRanksOnly(prefix=prefix)).wrap(optimizer)
    params, state = PARAMS, wrapped.init(PARAMS)
    for rank in (2, 1, 3, 2):
        updates, state = wrapped.update(GRADIENT, state, params, rank=jnp.int32(rank))
        after = optax.apply_updates(params, updates)
        for site in (STACKED, SINGLE):
            moved_a = np.asarray(after[site]["a"] != params[site]["a"]).reshape(-1, 3).all(0)
            moved_b = np.moveaxis(np.asarray(after[site]["b"] != params[site]["b"]), -2, 0).reshape(3, -1)
            expected = [index < rank if prefix else index == rank - 1 for index in range(3)]
            assert moved_a.tolist() == expected
            assert moved_b.all(1).tolist() == moved_b.any(1).tolist() == expected
        params = after


def test_dylora_needs_the_rank():
    wrapped = RULES["frozen"].wrap(optax.sgd(1.0))
    with pytest.raises(ValueError, match="rank=scalar"):
        wrapped.update(GRADIENT, wrapped.init(PARAMS), PARAMS)


def test_sensitivity_is_of_the_raw_gradient_in_float64():
    """Equations 9 to 11, entry by entry, with an optimiser that clips its gradient to almost nothing."""
    wrapped = RULES["sensitivity"].wrap(optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-2)))
    params, state = PARAMS, wrapped.init(PARAMS)
    mean, spread = 0.0, 0.0
    for seed in range(3):
        gradient = small_plan.random_like(PARAMS, seed)
        now = abs(np.float64(params[SINGLE]["a"]) * np.float64(gradient[SINGLE]["a"]))
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * abs(now - mean)
        updates, state = wrapped.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(optax.tree.get(state, "sensitivity")[SINGLE]["a"], mean, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "uncertainty")[SINGLE]["a"], spread, rtol=1e-4, atol=1e-6)


def test_learning_rate_ratio_equals_an_optimizer_of_that_rate():
    """LoRA+: b under AdamW at 16 times the rate, weight decay included."""
    plan = small_plan.plan_of("lora", rank=3, learning_rate_ratio=16.0)
    rules = plan_rules(plan, 10)
    after, _ = _two_steps(rules.wrap(optax.adamw(1e-3, weight_decay=0.1)))
    for rate, leaf in ((1e-3, "a"), (16e-3, "b")):
        expected, _ = _two_steps(optax.with_extra_args_support(optax.adamw(rate, weight_decay=0.1)))
        for site in (STACKED, SINGLE):
            np.testing.assert_allclose(after[site][leaf], expected[site][leaf], rtol=1e-5, atol=1e-7)
    assert not plan_rules(small_plan.plan_of("lora"), 10).updates


def test_the_penalty_is_the_mean_over_sites_and_layers():
    """HaLoRA's of three stacked layers and one alone: four terms of equal weight, in NumPy."""
    plan = small_plan.plan_of("halora", rank=2, penalty_weight=0.3)
    leaves = small_plan.leaves_of(plan)
    layers = [{leaf: value[n] for leaf, value in leaves.params[STACKED].items()} for n in range(3)]
    each = []
    for own in (*layers, leaves.params[SINGLE]):
        a, b = np.float64(own["a"]), np.float64(own["b"])
        each.append(0.3 * (np.linalg.norm(a.T @ a, 2) + np.linalg.norm(b @ b.T, 2)))
    np.testing.assert_allclose(mean_penalty(plan, leaves), np.mean(each), rtol=1e-5)
    assert mean_penalty(small_plan.plan_of("lora"), leaves) is None
