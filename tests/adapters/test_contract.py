"""What every registered method keeps, without a special case for any; a method adds its oracle file and nothing here.

The option sets that are run are the ``VARIANTS`` of tests/oracles/numpy_<method>.py. Its ``forward`` gets the arrays of
params, state and constants in one mapping. That each *entry* learns is in ``test_every_entry_learns.py``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.adapters import METHODS, Kernel, NotMergeable
from mor_jax.adapters.base import Adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
BLOCK = 6  # features of a block's input
# From the methods' papers and descriptions: everything else must merge, and must start at zero.
NOT_MERGEABLE = {"mor"}  # with a routed gate
NOT_ZERO_AT_START = set()
START_ROUNDING = {"dora": 1e-6}  # of the largest output, for a method that divides by a norm; others start at 0

CASES = [(name, options) for name in METHODS for options in one_layer.oracle(name).VARIANTS]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values())) or 'default'}" for n, o in CASES]
)


def _setup(name, options, in_features=7, out_features=5, tokens=4, dtype=jnp.float32, **more):
    adapter = one_layer.small(name, options, **more)
    keys = jax.random.split(KEY, 5)
    in_features, out_features = one_layer.fitting(name, in_features, out_features)
    kernel = one_layer.kernel_of(keys[0], in_features, out_features, dtype)
    first = one_layer.start(adapter, keys[1], kernel, block_features=BLOCK)
    x = jax.random.normal(keys[2], (tokens, in_features), dtype)
    block_input = jax.random.normal(keys[3], (tokens, BLOCK), dtype)
    return adapter, kernel, first, one_layer.scramble(first, keys[4]), x, block_input


def _expected(adapter, leaves, kernel, x, block_input):
    options = {**dataclasses.asdict(adapter), "block_input": block_input}
    arrays = {k: np.asarray(v) for tree in leaves for k, v in tree.items()}
    return one_layer.oracle(adapter.name).forward(arrays, np.asarray(kernel.dense()), np.asarray(x), options)


@pytest.mark.parametrize("name", METHODS)
def test_registry(name):
    method = METHODS[name]
    assert method.name == name
    assert issubclass(method, Adapter)
    assert method.title
    assert method.paper
    assert one_layer.oracle(name).VARIANTS, "each method needs an independent float64 oracle"


@each_case
def test_zero_at_start(name, options):
    adapter, kernel, first, _, x, block_input = _setup(name, options)
    assert adapter.starts_at_zero == (name not in NOT_ZERO_AT_START)
    change = one_layer.delta(adapter, first, x, kernel, block_input)
    if adapter.starts_at_zero:
        assert jnp.abs(change).max() <= START_ROUNDING.get(name, 0) * jnp.abs(x @ kernel.dense()).max()
    else:
        assert bool((change != 0).any())


@each_case
def test_init_shapes_are_num_params(name, options):
    adapter = one_layer.small(name, options)
    kernel = one_layer.kernel_of(KEY, *one_layer.fitting(name, 7, 5))
    site = one_layer.site_of(kernel, num_layers=3)
    layers = jnp.arange(3)
    leaves = jax.vmap(lambda layer: adapter.init(jax.random.fold_in(KEY, layer), site, layer, kernel))(layers)
    assert sum(leaf.size for leaf in leaves.params.values()) == adapter.padded_params(site) >= adapter.num_params(site)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.params.values())
    gate = adapter.init_gate(KEY, BLOCK)
    assert sum(leaf.size for leaf in gate.values()) == adapter.num_gate_params(BLOCK)


@each_case
def test_logical_axes_cover_exactly_the_params(name, options):
    adapter = one_layer.small(name, options)
    rows, columns = one_layer.fitting(name, 11, 13)
    kernel = one_layer.kernel_of(KEY, rows, columns)
    params = adapter.init(KEY, one_layer.site_of(kernel), jnp.int32(0), kernel).params
    axes = adapter.logical_axes(one_layer.site_of(kernel))
    assert set(axes) == set(params)
    sizes = {"in": rows, "out": columns}
    for leaf, names in axes.items():
        assert len(names) == params[leaf].ndim
        assert all(sizes.get(axis, size) == size for axis, size in zip(names, params[leaf].shape, strict=True))
        assert all(axis in ("in", "out", None) for axis in names)


@each_case
def test_init_is_deterministic_in_its_key(name, options):
    adapter = one_layer.small(name, options)
    kernel = one_layer.kernel_of(KEY, *one_layer.fitting(name, 7, 5))

    def start(seed):
        return one_layer.start(adapter, jax.random.key(seed), kernel, 0, BLOCK)

    one = start(1)
    jax.tree.map(np.testing.assert_array_equal, one, start(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, jax.jit(start)(1))
    pairs = list(zip(*map(jax.tree.leaves, (one.params, start(2).params)), strict=True))
    drawn = any(bool((a != a.reshape(-1)[0]).any()) for a, _ in pairs)  # not every leaf starts at one value throughout
    assert any(bool((a != b).any()) for a, b in pairs) == drawn


@each_case
@settings(max_examples=3)
@given(st.sampled_from([(1, 1, 1, 1), (1, 7, 1, 3), (7, 1, 2, 3), (5, 9, 5, 1), (6, 4, 2, 3), (9, 9, 1, 2)]))
def test_delta_equals_the_oracle(name, options, sizes):
    in_features, out_features, rank, tokens = sizes
    adapter, kernel, _, leaves, x, block_input = _setup(name, options, in_features, out_features, tokens, rank=rank)
    y = jax.jit(lambda *args: one_layer.forward(adapter, args[0], x, kernel, block_input))(leaves)
    expected = _expected(adapter, leaves, kernel, x, block_input)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


# From the methods' equations: DoRA divides by a norm, MoRA's matrix is square, and a change that reads more than a
# token's own x at its own layer is no constant matrix at all.
NO_FACTORS = {"dora", "mora"}


@each_case
def test_factors_are_the_whole_change(name, options):
    adapter, kernel, _, leaves, x, block_input = _setup(name, options)
    pair = adapter.factors(leaves, kernel)
    constant = adapter.merges_exactly and name not in NO_FACTORS
    assert (pair is not None) == constant
    if pair is not None:
        a, b = pair
        assert (a.shape[0], a.shape[1], b.shape[1]) == (x.shape[1], b.shape[0], kernel.shape[1])
        expected = one_layer.delta(adapter, leaves, x, kernel, block_input)
        np.testing.assert_allclose(x @ a @ b, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# The same matrix as Dense, DenseGeneral and Einsum store it: (view, its in axes, its out axes).
LAYOUTS = {
    "dense": (lambda w: w, (-2,), (-1,)),
    "heads out": (lambda w: w.reshape(6, 2, 4), (-3,), (-2, -1)),
    "heads in": (lambda w: w.reshape(2, 3, 8), (-3, -2), (-1,)),
    "heads first": (lambda w: w.reshape(6, 2, 4).transpose(1, 0, 2), (-2,), (-3, -1)),
}


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((name, jnp.float32) for name in LAYOUTS), ("heads first", jnp.bfloat16)]
)
@each_case
def test_merge_equals_forward(name, options, dtype, layout):
    adapter, kernel, _, leaves, _, _ = _setup(name, options, 6, 8, dtype=dtype)
    view, in_axes, out_axes = LAYOUTS[layout]
    kernel = Kernel(view(kernel.value), in_axes, out_axes)
    gates = None
    if adapter.routed:
        with pytest.raises(NotMergeable, match="approximation"):
            adapter.merge(leaves, kernel)
        assert name in NOT_MERGEABLE
        gates = jax.nn.softmax(jnp.arange(adapter.num_gates, dtype=jnp.float32))
    merged = adapter.merge(leaves, kernel, gates)
    assert merged.shape == kernel.value.shape
    assert merged.dtype == dtype
    block_input = jnp.ones((6, BLOCK))
    effective = one_layer.forward(adapter, leaves, jnp.eye(6), kernel, block_input, gates)
    rounding = 2e-6 if dtype == jnp.float32 else 2**-8  # bfloat16: half a unit in the last place, and a tie
    actual = Kernel(merged, in_axes, out_axes).dense()
    np.testing.assert_allclose(actual, effective, rtol=rounding, atol=2e-6 * jnp.abs(effective).max())
    if gates is None:
        expected = _expected(adapter, leaves, kernel, jnp.eye(6), block_input)
        np.testing.assert_allclose(actual, expected, rtol=rounding, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each_case
def test_delta_keeps_shape_and_dtype(name, options, dtype):
    adapter, kernel, _, leaves, x, block_input = _setup(name, options, tokens=6, dtype=dtype)
    x, block_input = x.reshape(2, 3, -1), block_input.reshape(2, 3, -1)
    change = one_layer.delta(adapter, leaves, x, kernel, block_input)
    assert change.dtype == dtype
    assert change.shape == (2, 3, kernel.shape[1])
    exact = one_layer.delta(adapter, leaves, *jax.tree.map(jnp.float32, (x,)), kernel, jnp.float32(block_input))
    if adapter.num_gates and getattr(adapter, "top_k", 0):
        return  # rounding the logits may choose another expert
    np.testing.assert_allclose(jnp.float32(change), exact, atol=0.05 * jnp.abs(exact).max())


def _stack(name, options, layers=3):
    adapter = one_layer.small(name, options)
    keys = jax.random.split(KEY, layers)
    kernels = Kernel(jnp.stack([one_layer.kernel_of(k, *one_layer.fitting(name, 7, 5)).value for k in keys]))
    each = [
        one_layer.scramble(one_layer.start(adapter, k, Kernel(w), i, BLOCK), k)
        for i, (k, w) in enumerate(zip(keys, kernels.value, strict=True))
    ]
    x = jax.random.normal(KEY, (layers, 4, kernels.shape[0]))
    block_input = jax.random.normal(KEY, (layers, 4, BLOCK))
    return adapter, each, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), kernels, x, block_input


@each_case
def test_prepare_is_idempotent_and_layer_by_layer(name, options):
    adapter, each, stacked, kernels, _, _ = _stack(name, options)
    prepared = adapter.prepare(stacked, kernels)
    jax.tree.map(np.testing.assert_array_equal, adapter.prepare(prepared, kernels), prepared)
    alone = [adapter.prepare(leaves, Kernel(w)) for leaves, w in zip(each, kernels.value, strict=True)]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), prepared, joined)


def _close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), one, other)


@each_case
def test_transformations_agree_with_eager(name, options):
    adapter, each, stacked, kernels, x, block_input = _stack(name, options)
    traced = 0

    def layer(params, rest, value, x, h):
        nonlocal traced
        traced += 1
        return one_layer.forward(adapter, rest._replace(params=params), x, Kernel(value), h)

    def loss(params, rest, value, x, h):
        return jnp.sum(jnp.sin(layer(params, rest, value, x, h)))

    rest = stacked._replace(params={})
    args = (stacked.params, rest, kernels.value, x, block_input)
    layers = [jax.tree.map(lambda v, i=i: v[i], args) for i in range(3)]
    eager = jnp.stack([layer(*one) for one in layers])
    gradients = [jax.grad(loss)(*one) for one in layers]
    gradients = jax.tree.map(lambda *g: jnp.stack(g), *gradients)

    jitted = jax.jit(layer)
    traced = 0
    _close(jnp.stack([jitted(*one) for one in layers]), eager)
    assert traced == 1, "the second call traced again"
    _close(jax.vmap(layer)(*args), eager)
    _close(jax.lax.scan(lambda carry, one: (carry, layer(*one)), None, args)[1], eager)
    _close(jax.jit(jax.vmap(jax.grad(loss)))(*args), gradients)

    def scanned(params):
        body = jax.checkpoint(lambda total, one: (total + loss(*one), None))
        return jax.lax.scan(body, 0.0, (params, *args[1:]))[0]

    _close(jax.jit(jax.grad(scanned))(stacked.params), gradients)

    def prepared(params):
        ready = adapter.prepare(rest._replace(params=params), kernels)
        body = jax.checkpoint(lambda total, one: (total + loss(*one), None))
        return jax.lax.scan(body, 0.0, (ready.params, ready._replace(params={}), *args[2:]))[0]

    _close(jax.jit(jax.grad(prepared))(stacked.params), gradients)


def _three_steps(adapter, leaves, kernel, x, block_input, optimizer):
    """The params after three steps of regression, and whether each leaf ever had a gradient."""
    target = jax.random.normal(jax.random.key(7), (x.shape[0], kernel.shape[1]), x.dtype)

    @jax.jit
    def step(params, state):
        def loss(params):
            y = one_layer.forward(adapter, leaves._replace(params=params), x, kernel, block_input)
            return jnp.sum(jnp.square((y - target).astype(params["b"].dtype if "b" in params else y.dtype)))

        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    params, state, seen = leaves.params, optimizer.init(leaves.params), []
    for _ in range(3):
        params, state, gradient = step(params, state)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
        seen.append(jax.tree.map(lambda g: bool((g != 0).any()), gradient))
    return params, jax.tree.map(lambda *steps: any(steps), *seen)


@each_case
def test_every_leaf_has_a_gradient_within_three_steps(name, options):
    with jax.enable_x64(True):
        adapter, kernel, first, _, x, block_input = _setup(name, options, dtype=jnp.float64, tokens=16)
        double = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf  # noqa: E731
        first = jax.tree.map(double, first)
        _, seen = _three_steps(adapter, first, kernel, x, block_input, optax.sgd(0.01))
    assert all(seen.values()), seen


@each_case
def test_every_leaf_moves_in_three_adam_steps_in_bfloat16(name, options):
    adapter, kernel, first, _, x, block_input = _setup(name, options, dtype=jnp.bfloat16, tokens=16)
    after, _ = _three_steps(adapter, first, kernel, x, block_input, optax.adam(1e-5))
    moved = {leaf: bool((after[leaf] != first.params[leaf]).any()) for leaf in after}
    assert all(moved.values()), moved
