import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.training.config import ConfigError, TrainConfig
from mor_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, optimizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {"layers/q_proj": {"a": jnp.ones((2, 5, 3)), "m": jnp.ones((2, 5))}, "head": {"kernel": jnp.ones((5, 3))}}


def _rates(**fields):
    schedule = make_schedule(TrainConfig(learning_rate=0.4, **fields))
    return np.array([schedule(step) for step in range(fields["steps"] + 1)])


def _expected(shape, steps, warmup, ratio):
    """The closed forms, one step at a time."""
    rates = []
    for step in range(steps + 1):
        if step < warmup:
            rates.append(0.4 * step / warmup)
            continue
        part = (step - warmup) / (steps - warmup)
        cosine = ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * part))
        rates.append(0.4 * {"constant": 1.0, "linear": 1 + (ratio - 1) * part, "cosine": cosine}[shape])
    return np.array(rates)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "ratio"), [(0, 0.0), (4, 0.0), (5, 0.1)])
def test_schedules_equal_their_closed_forms(shape, warmup, ratio):
    found = _rates(steps=20, schedule=shape, warmup_steps=warmup, final_learning_rate_ratio=ratio)
    np.testing.assert_allclose(found, _expected(shape, 20, warmup, ratio), atol=1e-7)


def test_matrices_decay_and_vectors_do_not():
    assert decay_mask(PARAMS) == {"layers/q_proj": {"a": True, "m": False}, "head": {"kernel": True}}
    unstacked = decay_mask({"layers_0/q_proj": {"a": jnp.ones((5, 3)), "m": jnp.ones(5)}}, lambda name: 0)
    assert unstacked == {"layers_0/q_proj": {"a": True, "m": False}}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_decay_shrinks_only_what_the_mask_says(name):
    config = TrainConfig(optimizer=name, learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=0.0)
    optimizer = make_optimizer(config)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layers/q_proj"]["a"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["layers/q_proj"]["m"])


@pytest.mark.parametrize("norm", [0.5, 100.0, 0.0])
def test_the_gradient_is_clipped_to_the_norm(norm):
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, schedule="constant", clip_norm=norm)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    own = math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(PARAMS)))
    np.testing.assert_allclose(optax.tree.norm(updates), min(own, norm or own), rtol=1e-6)


NAMES = [
    name
    for name in sorted(dir(optax))
    if inspect.isfunction(getattr(optax, name))
    and "learning_rate" in inspect.signature(getattr(optax, name)).parameters
    and not name.startswith("_")
    and name not in ("noisy_sgd", "optimistic_adam")  # optax warns that these will change
]
# Need the loss's value, or a rate that is a number: a plain step with a schedule has neither.
REFUSED = {"lbfgs", "polyak_sgd", "rprop", "scale_by_rprop", "sm3"}


@pytest.mark.parametrize("name", NAMES)
def test_any_optimizer_of_optax_by_name_moves_every_leaf_or_is_refused_at_once(name):
    config = TrainConfig(optimizer=name, learning_rate=0.1, schedule="constant")
    if name in REFUSED:
        with pytest.raises(ConfigError, match=f"optimizer='{name}': a plain step cannot run it"):
            make_optimizer(config)
        return
    optimizer = make_optimizer(config)
    gradient = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), PARAMS)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    assert all(np.abs(leaf).min() > 0 for leaf in jax.tree.leaves(updates))


def test_options_reach_the_optimizer_and_equal_optax():
    config = TrainConfig(optimizer="adam", optimizer_options={"b1": 0.5, "b2": 0.7}, schedule="constant", clip_norm=0.0)
    ours, theirs = make_optimizer(config), optax.adam(1e-3, b1=0.5, b2=0.7)
    states = [ours.init(PARAMS), theirs.init(PARAMS)]
    for scale in (1.0, -2.0):
        gradient = jax.tree.map(lambda leaf, scale=scale: scale * leaf, PARAMS)
        first, states[0] = ours.update(gradient, states[0], PARAMS)
        second, states[1] = theirs.update(gradient, states[1], PARAMS)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adamww"}, "optimizer='adamww': optax has no such optimiser: try adamw"),
        ({"optimizer": "global_norm"}, "optimizer='global_norm'"),
        ({"optimizer_options": {"beta2": 0.9}}, "optimizer_options: adamw has no 'beta2': try .*b2"),
        ({"optimizer_options": {"learning_rate": 0.9}}, "optimizer_options: .*learning_rate"),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9, "accumulator_dtype": "floaty"}},
            "accumulator_dtype.*floaty",
        ),
    ],
)
def test_errors_name_the_field_and_the_nearest(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(TrainConfig(**fields))


def test_an_optimizer_made_in_python_is_taken_as_it_is():
    own = optax.sgd(0.3)
    optimizer = make_optimizer(TrainConfig(optimizer="nonsense", clip_norm=0.0), own)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.3, rtol=1e-6)


def test_bytes_are_two_moments_and_counters():
    size = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    found = optimizer_bytes(make_optimizer(TrainConfig()), PARAMS)
    assert 8 * size <= found <= 8 * size + 16
