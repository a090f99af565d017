"""Gates, the balance loss and router statistics against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_jax.adapters import AdapterInputs
from mor_jax.adapters.routing import gate_statistics, softmax_gates, switch_balance

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 99))
def test_gates(count, top_k, seed):
    top_k = min(top_k, count)
    logits = 3 * np.random.default_rng(seed).standard_normal((4, count)).astype(np.float32)
    options = {"router": "softmax", "num_experts": count, "top_k": top_k}
    expected = one_layer.oracle("mor").gates({"router": np.eye(count)}, logits, options)
    np.testing.assert_allclose(softmax_gates(logits, top_k), expected, rtol=1e-5, atol=1e-7)


def test_top_k_keeps_exactly_k_even_where_logits_are_equal():
    gates = softmax_gates(jnp.zeros((3, 5)), 2)
    np.testing.assert_array_equal((gates > 0).sum(-1), 2)
    np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("top_k", [0, 2])
def test_gradients_of_gates_are_finite_far_out(top_k):
    logits = jnp.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], jnp.bfloat16)
    gradient = jax.grad(lambda v: jnp.sum(softmax_gates(v, top_k) * jnp.arange(3.0)))(logits)
    assert bool(jnp.isfinite(gradient).all())
    assert softmax_gates(logits, top_k).dtype == jnp.float32


def test_balance_is_one_for_a_uniform_router_and_n_for_one_that_collapsed():
    uniform = jax.nn.one_hot(jnp.arange(12) % 4, 4)
    np.testing.assert_allclose(switch_balance(uniform, None), 1, rtol=1e-6)
    np.testing.assert_allclose(switch_balance(jax.nn.one_hot(jnp.zeros(12, int), 4), None), 4, rtol=1e-6)


def test_balance_equals_the_loop_and_sees_no_padding():
    gates = jax.nn.softmax(2 * jax.random.normal(KEY, (3, 7, 4)))
    mask = jnp.arange(7) < jnp.array([[7], [4], [1]])
    options = {"num_experts": 4, "balance_weight": 1.0}
    expected = one_layer.oracle("mor").balance(np.reshape(gates, (-1, 4)), np.ravel(mask), options)
    np.testing.assert_allclose(switch_balance(gates, mask), expected, rtol=1e-5)
    real = jnp.stack([g for row, keep in zip(gates, mask, strict=True) for g in row[keep]])
    np.testing.assert_allclose(switch_balance(real, None), expected, rtol=1e-5)
    gradient = jax.grad(switch_balance)(gates, mask)
    np.testing.assert_array_equal(gradient[~mask], 0)
    share = jax.nn.one_hot(real.argmax(-1), 4).mean(0)  # f is a constant of the gradient
    np.testing.assert_allclose(gradient[mask], jnp.tile(4 * share / len(real), (len(real), 1)), rtol=1e-5)


def test_balance_without_a_single_token_is_zero():
    gates = jnp.full((2, 3, 4), 0.25)
    assert float(switch_balance(gates, jnp.zeros((2, 3), bool))) == 0.0


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_equal_the_loop(masked):
    gates = softmax_gates(3 * jax.random.normal(KEY, (2, 6, 3)), 2)  # with gates that are exactly zero
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    tasks = jnp.array([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    inputs = AdapterInputs(segment_ids=segments if masked else None, task_ids=tasks, num_tasks=3)
    found = jax.jit(gate_statistics)(gates, inputs)
    load, entropy, count = np.zeros(3), 0.0, 0
    task_load, task_count = np.zeros((3, 3)), np.zeros(3)
    for row in range(2):
        for token in range(6):
            if masked and segments[row, token] == 0:
                continue
            g = np.asarray(gates[row, token], np.float64)
            load, count = load + g, count + 1
            entropy -= sum(v * np.log(v) for v in g if v > 0)
            task_load[tasks[row, token]] += g
            task_count[tasks[row, token]] += 1
    expected = {"load": load, "entropy": [entropy], "count": [count], "task_load": task_load, "task_count": task_count}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert set(gate_statistics(gates, AdapterInputs(task_ids=tasks))) == {"load", "entropy", "count"}
