"""A training loop of one's own is told what a method brings and the loop leaves out."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linen_models import Stack, example

from mor_jax.adapters import (
    METHODS,
    AdaLoRA,
    AdapterInputs,
    ALoRA,
    BeamLoRA,
    DyLoRA,
    HaLoRA,
    LoRA,
    MoR,
    MoRA,
    PRILoRA,
    make_adapter,
)
from mor_jax.injection import Adapted, InjectionError, init_leaves, resolve_sites, wiring
from mor_jax.optim import plan_rules

pytestmark = pytest.mark.usefixtures("quick_compilation")
X, MODEL = example(), Stack(0)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), X)["params"]


def gradient(method, params, inputs=None, through=jax.grad, jit=True, compute=False):
    """(the derivative, or its shapes, the loss, the leaves)."""
    plan = resolve_sites(MODEL, method, "query", X)
    leaves = init_leaves(jax.random.key(1), plan, params)
    own = {"params": params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}

    def loss(adapters):
        y = Adapted(MODEL, plan).apply({**own, "adapters": adapters}, X, adapter_inputs=inputs)
        return jnp.sum(jnp.sin(y))

    loss = jax.jit(loss) if jit else loss
    wiring._warn_once.cache_clear()
    run = jax.jit(through(loss)) if compute else lambda adapters: jax.eval_shape(through(loss), adapters)
    return run(leaves.params), loss, leaves


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (LoRA(rank=2, learning_rate_ratio=4.0), "LoRA's learning rates of its own"),
        (LoRA(rank=2, dropout=0.1), "dropout=0.1"),
        (PRILoRA(rank=2), "PRILoRA's pruning"),
        (HaLoRA(rank=2), "HaLoRA's noise_step"),
        (MoRA(rank=2, reset_every=5), "MoRA's fold"),
        (MoR(rank=2, router="balanced"), "MoR's balance loss"),
        (AdaLoRA(rank=2), "AdaLoRA's penalty"),
        (ALoRA(rank=2), "ALoRA's"),
        (BeamLoRA(rank=2), "BeamLoRA's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bare_loop_is_told_once(method, told, params, caplog):
    with caplog.at_level(logging.WARNING, "mor_jax"):
        _, loss, leaves = gradient(method, params)
        jax.eval_shape(jax.grad(loss), leaves.params)
    (record,) = [record for record in caplog.records if "this training loop leaves out" in record.getMessage()]
    assert told in record.getMessage()
    assert "wired=True" in record.getMessage()


@pytest.mark.parametrize("through", [jax.grad, jax.value_and_grad, jax.jacfwd], ids=["grad", "value", "forward mode"])
@pytest.mark.parametrize("jit", [False, True])
def test_every_way_of_differentiating_is_noticed(through, jit, params, caplog):
    with caplog.at_level(logging.WARNING, "mor_jax"):
        gradient(PRILoRA(rank=2), params, through=through, jit=jit)
    assert "PRILoRA's pruning" in caplog.text


def test_nothing_is_said_without_a_derivative_or_where_nothing_is_left_out(params, caplog):
    with caplog.at_level(logging.WARNING, "mor_jax"):
        _, loss, leaves = gradient(PRILoRA(rank=2), params, through=lambda loss: loss)
        jax.eval_shape(loss, leaves.params)
        gradient(LoRA(rank=2), params)
        gradient(MoR(rank=2, num_experts=2), params)
        gradient(PRILoRA(rank=2), params, AdapterInputs(wired=True))
        gradient(LoRA(rank=2, dropout=0.1), params, AdapterInputs(key=jax.random.key(0), deterministic=False))
    assert not caplog.records


def test_the_base_may_be_differentiated(params, caplog):
    """A derivative by the base or the input is no training of the adapter."""
    plan = resolve_sites(MODEL, DyLoRA(rank=2), "query", X)
    leaves = init_leaves(jax.random.key(1), plan, params)
    apply = Adapted(MODEL, plan).apply
    with caplog.at_level(logging.WARNING, "mor_jax"):
        by_x = jax.grad(lambda x: jnp.sum(apply({"params": params, "adapters": leaves.params}, x)))
        by_base = jax.grad(lambda params: jnp.sum(apply({"params": params, "adapters": leaves.params}, X)))
        assert jax.eval_shape(by_x, X).shape == X.shape
        assert jax.tree.structure(jax.eval_shape(by_base, params)) == jax.tree.structure(params)
    assert not caplog.records


@pytest.mark.parametrize("jit", [False, True])
def test_no_loop_trains_all_ranks_of_dylora_unawares(jit, params):
    message = r"DyLoRA learns one drawn rank a step, .* AdapterInputs\(rank=k\) with k drawn from 1 to 3 .* make_step"
    for inputs in (None, AdapterInputs(wired=True)):
        with pytest.raises(InjectionError, match=message):
            gradient(DyLoRA(rank=3), params, inputs, jit=jit)
    found, _, _ = gradient(DyLoRA(rank=3), params, AdapterInputs(rank=jnp.int32(2)), compute=True)
    b = found["layers/query"]["b"]
    assert bool((b[:, :2] != 0).any())
    np.testing.assert_array_equal(b[:, 2:], 0)


def test_a_loop_of_ones_own_that_does_it_all(params, caplog):
    """As the warning says: the drawn rank goes to the model and to the optimiser, whose rules let it alone learn."""
    plan = resolve_sites(MODEL, DyLoRA(rank=3), "query", X)
    leaves = init_leaves(jax.random.key(1), plan, params)
    leaves = leaves._replace(params=jax.tree.map(lambda v: v + 0.1, leaves.params))
    optimizer = plan_rules(plan, 10).wrap(optax.adam(1e-2))

    def loss(adapters, rank):
        inputs = AdapterInputs(rank=rank, wired=True)
        y = Adapted(MODEL, plan).apply({"params": params, "adapters": adapters}, X, adapter_inputs=inputs)
        return jnp.sum(jnp.sin(y))

    with caplog.at_level(logging.WARNING, "mor_jax"):
        found = jax.grad(loss)(leaves.params, jnp.int32(2))
        updates, _ = optimizer.update(found, optimizer.init(leaves.params), leaves.params, rank=jnp.int32(2))
    moved = np.asarray(updates["layers/query"]["b"])
    assert np.all(moved[:, 1] != 0)
    np.testing.assert_array_equal(np.delete(moved, 1, axis=1), 0)
    assert not caplog.records


WATCHED = [name for name in METHODS if name not in ("lora_mini", "melora", "vera")]  # these bring nothing


@pytest.mark.parametrize("name", WATCHED)
def test_watching_changes_no_number(name, params):
    """Gradients are those of a loop that says it is wired."""
    method = make_adapter(name, rank=3)
    rank = jnp.int32(2) if method.largest_drawn_rank else None
    one, two = (
        gradient(method, params, AdapterInputs(rank=rank, wired=wired), compute=True)[0] for wired in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)
