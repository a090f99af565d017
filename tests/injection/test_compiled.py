"""What an adapted model compiles to and keeps in memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from linen_models import CASES, INNER, WIDTH, Heads, Stack, example

from mor_jax.adapters import DoRA, LoRA, MoR
from mor_jax.injection import Adapted, adapter_specs, count_bytes, init_leaves, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, abstract_params

METHODS = {
    "lora": LoRA(rank=3),
    "dora": DoRA(rank=3),
    "mor": MoR(rank=3, num_experts=5),
}  # no size of theirs is a kernel's


def adapted(model, method, targets=("all-linear",), fuse=True):
    x = example()
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, method, targets, x, fuse=fuse)
    leaves = init_leaves(jax.random.key(1), plan, params).params
    leaves = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(v.size), v.shape), leaves)
    return params, plan, leaves, x


def products(function, *args):
    """Result shapes of all matrix products in the program."""
    text = jax.jit(function).lower(*args).as_text()
    return re.findall(r"stablehlo\.dot_general.*-> tensor<([0-9x]*)xf32>", text)


@pytest.mark.parametrize(("name", "model"), [("mor", Stack(0, remat=True)), ("lora", Heads())], ids=["Stack", "Heads"])
def test_one_read_of_x_for_siblings(name, model):
    """query and key (query and value) read one x: one product less than each with its own."""
    found = {}
    for fuse in (True, False):
        params, plan, leaves, x = adapted(model, METHODS[name], fuse=fuse)
        assert sorted(len(s.group) for s in plan.sites if s.group) == ([2, 2] if fuse else [])

        def run(leaves, params, x, plan=plan):
            return Adapted(model, plan).apply({"params": params, "adapters": leaves}, x)

        found[fuse] = products(run, leaves, params, x), jax.jit(run)(leaves, params, x)
    assert len(found[False][0]) - len(found[True][0]) == 1
    np.testing.assert_allclose(found[True][1], found[False][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_no_product_for_a_frozen_kernels_gradient(name):
    model = Stack(0, remat=True)
    params, plan, leaves, x = adapted(model, METHODS[name])

    def loss(leaves, params):
        return jnp.sum(jnp.sin(Adapted(model, plan).apply({"params": params, "adapters": leaves}, x)))

    kernels = {f"{WIDTH}x{INNER}", f"{INNER}x{WIDTH}", f"3x{WIDTH}x{INNER}", f"3x{INNER}x{WIDTH}"}
    assert kernels & set(products(jax.grad(loss, 1), leaves, params)), "this would find it"
    assert not kernels & set(products(jax.grad(loss), leaves, params))


@pytest.mark.parametrize("name", METHODS)
def test_injection_allocates_the_adapter_and_nothing_else(name):
    model = Stack(1)
    x = example()
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, METHODS[name], "all-linear", x)
    key = jax.random.key(1)
    before = {id(a) for a in jax.live_arrays()}
    leaves = init_leaves(key, plan, params)
    new = sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)
    assert new == count_bytes(leaves) == 4 * plan.num_params()


@pytest.mark.parametrize("name", ["dora", "mor"])
def test_training_leaves_the_base_bit_identical_and_traces_once(name):
    model = Stack(0)
    params, plan, leaves, x = adapted(model, METHODS[name])
    before = jax.tree.map(np.array, params)
    optimizer = optax.adam(1e-2)
    traced = 0

    @jax.jit
    def step(leaves, state, params):
        nonlocal traced
        traced += 1

        def loss(leaves):
            return jnp.mean(jnp.square(Adapted(model, plan).apply({"params": params, "adapters": leaves}, x) - 1))

        value, gradient = jax.value_and_grad(loss)(leaves)
        updates, state = optimizer.update(gradient, state, leaves)
        return optax.apply_updates(leaves, updates), state, value

    state, first, values = optimizer.init(leaves), leaves, []
    for _ in range(4):
        leaves, state, value = step(leaves, state, params)
        values.append(float(value))
    assert values[-1] < values[0]
    assert traced == 1
    assert all(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (first, leaves)), strict=True))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_the_base_itself_is_untouched_by_interception():
    model = Stack(0)
    params, plan, leaves, x = adapted(model, METHODS["lora"])
    plain = jax.jit(lambda x: model.apply({"params": params}, x))
    before = plain(x)
    changed = Adapted(model, plan).apply({"params": params, "adapters": leaves}, x)
    assert bool((changed != before).any())
    np.testing.assert_array_equal(plain(x), before)
    np.testing.assert_allclose(model.apply({"params": params}, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scan_axis", "spec"), [(0, (None, "fsdp", "tensor")), (1, ("fsdp", None, "tensor"))])
def test_factors_are_sharded_as_their_kernels(scan_axis, spec):
    model = Stack(scan_axis)
    params, plan, leaves, x = adapted(model, MoR(rank=2, num_experts=3), ("query",))
    specs = jax.tree.map(lambda v: PartitionSpec(*spec) if v.ndim == 3 else PartitionSpec(), params)
    found = adapter_specs(plan, specs)["layers/query"]
    a, b = PartitionSpec(None, "fsdp", None), PartitionSpec(None, None, "tensor")
    assert found == {"a": a, "router": a, "b": b, "lam_b": b, "lam_a": PartitionSpec(None, None, None)}

    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(tree, specs):
        return jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(mesh, s)), tree, specs)

    run = jax.jit(lambda p, a: Adapted(model, plan).apply({"params": p, "adapters": a}, x))
    only = {"layers": {"query": specs["layers"]["query"]}}
    params_sharded = place(params, jax.tree.map(lambda _: PartitionSpec(), params))
    params_sharded["layers"]["query"] = place(params["layers"]["query"], only["layers"]["query"])
    sharded = run(params_sharded, place(leaves, {"layers/query": found}))
    np.testing.assert_allclose(sharded, run(params, leaves), rtol=1e-5, atol=1e-5)


def test_factors_of_kernels_with_several_axes_stay_whole():
    params, plan, _, _ = adapted(CASES["heads"].model, METHODS["lora"], ("query",))
    specs = jax.tree.map(lambda v: PartitionSpec("fsdp", "tensor"), params)
    assert adapter_specs(plan, specs)["query"] == {"a": PartitionSpec("fsdp", None), "b": PartitionSpec(None, None)}


@pytest.mark.parametrize("scope", ["site", "block"])
def test_full_remat_keeps_only_the_thin_product_of_a_widest_gate(scope):
    """Gates of the MLP's last map read (2, 4, 24) and decide by (2, 4, 3 + 5); a block's gate reads its input."""
    config = DecoderConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4)
    ids = jnp.arange(8).reshape(2, 4)
    params = abstract_params(config)
    plan = resolve_sites(Decoder(config), MoR(rank=3, num_experts=5, scope=scope), "all-linear", ids)
    leaves = jax.eval_shape(lambda params: init_leaves(jax.random.key(1), plan, params).params, params)
    model = Adapted(Decoder(dataclasses.replace(config, remat="full")), plan)

    def backward(leaves, params):
        return jax.vjp(lambda leaves: model.apply({"params": params, "adapters": leaves}, ids), leaves)[1]

    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, leaves, params))]
    activations = sorted(shape for shape in kept if shape[:3] == (2, 2, 4))  # of two layers
    assert activations == [(2, 2, 4, 8), (2, 2, 4, 16)][scope == "block" :]
