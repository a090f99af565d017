"""Every registered method differentiated in other ways than by one reverse pass on one device.

The oracle is the reverse-mode gradient of one device, and its own are central differences.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from one_layer import oracle, small

from mor_jax.adapters import METHODS, AdapterInputs
from mor_jax.injection import Adapted, adapter_specs, init_leaves, init_probes, resolve_sites

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, ROWS, LENGTH = 12, 4, 6
CASES = [(name, options) for name in METHODS for options in oracle(name).VARIANTS]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values())) or 'default'}" for n, o in CASES]
)
each_method = pytest.mark.parametrize("name", METHODS)


class Block(nn.Module):
    """Two maps that read one x, and a third."""

    @nn.compact
    def __call__(self, x):
        gated = jnp.tanh(nn.Dense(WIDTH, name="gate")(x)) * nn.Dense(WIDTH, name="up", use_bias=False)(x)
        spec = jax.typeof(x).sharding.spec
        gated = jax.sharding.reshard(gated, spec) if any(spec) else gated
        return x + nn.Dense(WIDTH, name="down")(gated)


class Model(nn.Module):
    """(B, S, WIDTH) -> the same, through one block."""

    @nn.compact
    def __call__(self, x):
        return Block(name="layers")(x)


class Case:
    """A method at all three maps, nudged off its start, and the loss of its trained leaves."""

    def __init__(self, name, options, targets=("gate", "up", "down")):
        self.model = Model()
        self.x = jax.random.normal(jax.random.key(3), (ROWS, LENGTH, WIDTH))
        self.params = self.model.init(jax.random.key(0), self.x)["params"]
        self.plan = resolve_sites(self.model, small(name, options), targets, self.x)
        leaves = init_leaves(jax.random.key(1), self.plan, self.params)
        keys = iter(jax.random.split(jax.random.key(2), 100))
        moved = jax.tree.map(lambda v: v + 0.2 * jax.random.normal(next(keys), v.shape), leaves.params)
        self.leaves = leaves._replace(params=moved)
        self.inputs = AdapterInputs(noise_step=jnp.int32(3), rank=jnp.int32(2), wired=True)

    def forward(self, adapters, x=None, params=None, probes=None):
        variables = {
            "params": self.params if params is None else params,
            "adapters": adapters,
            "adapter_state": self.leaves.state,
            "adapter_constants": self.leaves.constants,
        }
        if probes is not None:
            variables["adapter_probes"] = probes
        adapted = Adapted(base=self.model, plan=self.plan)
        return adapted.apply(variables, self.x if x is None else x, adapter_inputs=self.inputs)

    def loss(self, adapters, x=None, params=None, probes=None):
        return jnp.sum(jnp.sin(self.forward(adapters, x, params, probes)))

    def direction(self, seed=5):
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        return jax.tree.map(lambda v: jax.random.normal(next(keys), v.shape, v.dtype), self.leaves.params)


def _close(one, other, rounding=2e-5):
    size = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=rounding * size), one, other)


CONSTANT_IN_BACKWARD = {"dora"}  # the norm, by section 4.3 of its paper


def _moved(leaves, direction, size):
    return jax.tree.map(lambda v, d: v + size * d, leaves, direction)


def _dot(one, other):
    return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def _put(mesh, tree, specs):
    return jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(mesh, s)), tree, specs)


@each_case
def test_inside_shard_map_with_its_check(name, options):
    case = Case(name, options)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = PartitionSpec("data"), PartitionSpec()

    def total(adapters, x):
        return jax.lax.psum(case.loss(adapters, x), "data")

    def gradient(adapters, x):
        return jax.grad(case.loss)(adapters, x)  # of leaves that all devices share: summed over them

    run = lambda f: jax.shard_map(f, mesh=mesh, in_specs=(whole, split), out_specs=whole)  # noqa: E731
    expected = jax.jit(jax.grad(case.loss))(case.leaves.params)
    both = jax.jit(lambda *args: (run(gradient)(*args), jax.grad(run(total))(*args)))
    _close(both(case.leaves.params, case.x), (expected, expected))


@each_case
def test_statistics_inside_shard_map_are_those_of_all_devices(name, options):
    case = Case(name, options)
    probes = init_probes(case.plan)
    if not probes:
        return
    case.inputs = dataclasses.replace(case.inputs, auxiliary_scale=jnp.float32(1))
    statistics = jax.grad(lambda probes, x: case.loss(case.leaves.params, x, probes=probes))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = PartitionSpec("data"), PartitionSpec()
    found = jax.jit(jax.shard_map(statistics, mesh=mesh, in_specs=(whole, split), out_specs=whole))(probes, case.x)
    expected = jax.jit(statistics)(probes, case.x)
    for path, own in expected.items():
        for kind, value in own.items():
            if kind != "balance":  # of each device's own rows
                np.testing.assert_allclose(found[path][kind], value, rtol=1e-5, atol=1e-5, err_msg=f"{path} {kind}")


@pytest.mark.parametrize("leaves", ["whole", "split"])
@each_method
def test_axes_of_explicit_type(name, leaves):
    """Rows and the features of kernels, biases and, where they are split, factors live on different devices."""
    case = Case(name, {}, targets=("gate", "up"))
    expected = jax.jit(jax.value_and_grad(case.loss))(case.leaves.params)
    columns = {
        "layers": {
            "gate": {"kernel": PartitionSpec(None, "tensor"), "bias": PartitionSpec("tensor")},
            "up": {"kernel": PartitionSpec(None, "tensor")},
            "down": {"kernel": PartitionSpec(), "bias": PartitionSpec()},
        }
    }
    own = adapter_specs(case.plan, columns)
    if leaves == "whole":
        own = jax.tree.map(lambda _: PartitionSpec(), case.leaves.params)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = _put(mesh, case.params, columns)
        adapters, x = _put(mesh, case.leaves.params, own), _put(mesh, case.x, PartitionSpec("data"))
        value, gradient = jax.jit(jax.value_and_grad(case.loss))(adapters, x, params)
        placed = jax.tree.map(lambda g, v: g.sharding.is_equivalent_to(v.sharding, g.ndim), gradient, adapters)
        assert jax.tree.all(placed)
    _close((value, gradient), expected)


@each_method
def test_forward_mode_and_second_derivatives(name):
    """Of what reverse mode differentiates: some methods hold a part constant in it."""
    case = Case(name, {}, targets=("gate", "down"))
    leaves, direction = case.leaves.params, case.direction()
    gradient = jax.grad(case.loss)

    @jax.jit
    def run(leaves, direction):
        slope = jax.jvp(case.loss, (leaves,), (direction,))[1]
        linear = jax.linearize(case.loss, leaves)[1](direction)
        forward_over_reverse = jax.jvp(gradient, (leaves,), (direction,))[1]
        reverse_over_reverse = jax.grad(lambda own: _dot(gradient(own), direction))(leaves)
        return slope, linear, _dot(gradient(leaves), direction), forward_over_reverse, reverse_over_reverse

    slope, linear, expected, hessian, backward = run(leaves, direction)
    size = sum(float(jnp.abs(v).sum()) for v in jax.tree.leaves(jax.jit(gradient)(leaves)))
    np.testing.assert_allclose([slope, linear], [expected] * 2, atol=1e-5 * size)
    _close(hessian, backward)
    if name not in CONSTANT_IN_BACKWARD:
        loss, step = jax.jit(case.loss), 1e-2
        ahead, behind = (loss(_moved(leaves, direction, s * step)) for s in (1, -1))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), atol=2e-2 * size)


@each_method
def test_gradients_of_single_rows_add_up(name):
    case = Case(name, {})
    rows = jax.jit(jax.vmap(jax.grad(case.loss), in_axes=(None, 0)))(case.leaves.params, case.x[:, None])
    _close(jax.tree.map(lambda g: g.sum(0), rows), jax.jit(jax.grad(case.loss))(case.leaves.params))
