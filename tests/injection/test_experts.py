"""Experts have an adapter each and lie side by side: no layers, no chain among them, one rank in a layer."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_models import EXPERTS, INNER, KINDS, LAYERS, LAYOUTS, ROWS, WIDTH, Experts, Layers, Loop, example
from jax.sharding import PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import one_layer

from mor_jax.adapters import METHODS, AdapterInputs, LoRA, MoR, NotMergeable, PRILoRA, ResLoRA
from mor_jax.injection import Adapted, InjectionError, adapter_specs, init_leaves, init_probes, resolve_sites
from mor_jax.merging import least_squares, merge

pytestmark = pytest.mark.usefixtures("quick_compilation")
METHOD_CASES = [(name, layout) for name in METHODS for layout in LAYOUTS if layout != "vmap" or name in ("lora", "mor")]


def made(model, method, scale=0.3):
    x = example()
    params = model.init(jax.random.key(1), x)["params"]
    plan = resolve_sites(model, method, "proj", x, kinds=KINDS)
    leaves = init_leaves(jax.random.key(2), plan, params)
    return x, params, plan, leaves, one_layer.scramble(leaves, jax.random.key(3), scale)


def run(model, plan, params, leaves, x, **options):
    own = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
    return Adapted(model, plan).apply({"params": params, **own, **options}, x)


def apart(leaves, plan, path):
    """Per expert, the arrays of params, state, constants and what is shared, by name."""
    shared = plan[path].shared
    whole = {k: v for tree in leaves for k, v in tree.get(shared, {}).items()} if shared else {}
    own = {k: v for tree in leaves for k, v in tree.get(path, {}).items()}
    return [{**{k: np.asarray(v[e]) for k, v in own.items()}, **whole} for e in range(EXPERTS)]


@pytest.mark.parametrize(("name", "layout"), METHOD_CASES)
def test_each_expert_is_a_map_with_an_adapter_of_its_own(name, layout):
    """Against the method's equations in float64, expert by expert."""
    options = one_layer.oracle(name).VARIANTS[0]
    method, model = one_layer.small(name, options), Experts(layout)
    x, params, plan, first, leaves = made(model, method)
    _, _, arranged, kernel_leaf = LAYOUTS[layout]
    kernels = np.asarray(arranged(params["proj"][kernel_leaf]))
    bare = {"proj": {**params["proj"], kernel_leaf: jnp.zeros_like(params["proj"][kernel_leaf])}}
    bias = np.asarray(model.apply({"params": bare}, x))
    expected = bias + [
        one_layer.oracle(name).forward(own, kernels[e], np.asarray(x[e]), dataclasses.asdict(method))
        for e, own in enumerate(apart(leaves, plan, "proj"))
    ]
    actual = jax.jit(lambda leaves: run(model, plan, params, leaves, x))(leaves)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    unchanged = run(model, plan, params, first, x)
    np.testing.assert_allclose(unchanged, model.apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(leaves.params)) == method.padded_params(plan["proj"].site)
    drawn = [leaf for leaf in jax.tree.leaves(first.params) if bool((leaf[0] != leaf[0].reshape(-1)[0]).any())]
    assert all(bool((leaf[0] != leaf[1]).any()) for leaf in drawn), "each expert has its own draw"
    if method.routed:
        with pytest.raises(NotMergeable, match="proj"):
            merge(params, leaves, plan)
        return
    merged = model.apply({"params": merge(params, leaves, plan)}, x)
    if not getattr(method, "merge_condition", ""):
        np.testing.assert_allclose(merged, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_scanned_layers_equal_kernels_changed_by_hand(layout):
    model, method = Layers(layout), LoRA(rank=2, alpha=3.0)
    x, params, plan, _, leaves = made(model, method)
    path = plan.paths[0]
    kernel_leaf = LAYOUTS[layout][3]
    assert (plan[path].site.num_layers, plan[path].site.layers) == (LAYERS * EXPERTS, LAYERS)
    own = leaves.params[path]
    back = {"einsum": (0, 1, 3, 2), "own class": (0, 2, 1, 3)}.get(layout, (0, 1, 2, 3))

    def by_hand(adapters, x):
        change = 1.5 * jnp.einsum("leir,lero->leio", adapters[path]["a"], adapters[path]["b"]).transpose(back)
        whole = params["layers"]["experts"]["proj"]
        whole = {**whole, kernel_leaf: whole[kernel_leaf] + change}
        return model.apply({"params": {"layers": {"experts": {"proj": whole}}}}, x)

    def by_injection(adapters, x):
        return run(model, plan, params, leaves._replace(params=adapters), x)

    def gradients(function):
        return jax.jit(jax.value_and_grad(lambda a, x: jnp.sum(jnp.sin(function(a, x))), (0, 1)))(leaves.params, x)

    assert own["a"].shape == (LAYERS, EXPERTS, WIDTH, 2)
    np.testing.assert_allclose(by_injection(leaves.params, x), by_hand(leaves.params, x), rtol=1e-5, atol=1e-5)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(compare, gradients(by_injection), gradients(by_hand))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_go_from_layer_to_layer_within_one_expert(layout):
    """ResLoRA's W_n + s (a_n b_n + a_{n-1} b_{n-1}), n counting layers."""
    model, method = Layers(layout), ResLoRA(rank=2, alpha=3.0)
    x, params, plan, _, leaves = made(model, method)
    path, kernel_leaf = plan.paths[0], LAYOUTS[layout][3]
    a, b = (np.float64(leaves.params[path][name]) for name in "ab")
    own = np.einsum("leir,lero->leio", a, b)
    own[1:] = own[1:] + np.einsum("leir,lero->leio", a[:-1], b[:-1])
    arranged = np.vectorize(LAYOUTS[layout][2], signature="(a,b,c)->(d,e,f)")
    expected = arranged(np.float64(params["layers"]["experts"]["proj"][kernel_leaf])) + 1.5 * own
    merged = merge(params, leaves, plan)
    actual = arranged(np.asarray(merged["layers"]["experts"]["proj"][kernel_leaf]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    forward = run(model, plan, params, leaves, x)
    np.testing.assert_allclose(forward, model.apply({"params": merged}, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["vmap", "batch_dims"])
def test_ranks_grow_with_layers_and_not_with_experts(layout):
    _, _, plan, leaves, _ = made(Layers(layout), PRILoRA(rank=4, first_rank=2, last_rank=6))
    path = plan.paths[0]
    np.testing.assert_array_equal(leaves.state[path]["mask"].sum(-1), [[2, 2], [4, 4], [6, 6]])
    assert plan.num_params() == 2 * (2 + 4 + 6) * (WIDTH + WIDTH)
    _, _, alone, leaves, _ = made(Experts(layout), PRILoRA(rank=4))
    np.testing.assert_array_equal(leaves.state["proj"]["mask"].sum(-1), [4, 4])


@pytest.mark.parametrize("name_of", ["experts", "block"])
def test_numbered_modules_that_read_one_x_are_no_layers(name_of):
    x = example()
    plan = resolve_sites(Loop(name_of), ResLoRA(rank=2), "all-linear", x)
    assert len(plan.chains) == EXPERTS
    assert {s.site.depth for s in plan.sites} == {0}


@pytest.mark.parametrize("layout", ["vmap", "batch_dims"])
@pytest.mark.parametrize("form", ["input", "middle"])
def test_activations_are_not_handed_on_between_experts(layout, form):
    with pytest.raises(InjectionError, match=r"layers/experts/proj has experts .* ResLoRA .* form='block'"):
        resolve_sites(Layers(layout), ResLoRA(form=form), "proj", example(), kinds=KINDS)


def test_one_gate_of_a_block_does_not_weigh_several_maps():
    for layout in ("vmap", "batch_dims"):
        with pytest.raises(InjectionError, match=r"layers/experts/proj is several maps inside layers, .* scope='site'"):
            resolve_sites(Layers(layout), MoR(scope="block"), "proj", example(), kinds=KINDS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_specs_follow_the_kernels_expert_axis(layout):
    model = Layers(layout)
    _, params, plan, leaves, _ = made(model, LoRA(rank=2))
    path, kernel_leaf = plan.paths[0], LAYOUTS[layout][3]
    axes = {"einsum": ("layer", "expert", "out", "in"), "own class": ("layer", "in", "expert", "out")}
    names = axes.get(layout, ("layer", "expert", "in", "out"))
    specs = jax.tree.map(lambda _: PartitionSpec(), params)
    specs["layers"]["experts"]["proj"][kernel_leaf] = PartitionSpec(*names)
    found = adapter_specs(plan, specs)[path]
    assert found == {
        "a": PartitionSpec("layer", "expert", "in", None),
        "b": PartitionSpec("layer", "expert", None, "out"),
    }
    assert leaves.params[path]["b"].shape == (LAYERS, EXPERTS, 2, WIDTH)


@pytest.mark.parametrize("layout", ["vmap", "batch_dims"])
def test_statistics_and_dropout_are_those_of_each_expert(layout):
    model = Experts(layout)
    x, params, plan, _, leaves = made(model, MoR(rank=2, num_experts=3, dropout=0.5))
    probes = init_probes(plan)
    own = {"adapters": leaves.params, "params": params}
    inputs = AdapterInputs(key=jax.random.key(0), deterministic=False)

    def total(probes):
        return jnp.sum(Adapted(model, plan).apply({**own, "adapter_probes": probes}, x, adapter_inputs=inputs))

    found = jax.grad(total)(probes)["proj"]
    np.testing.assert_allclose(found["count"].reshape(-1), [ROWS] * EXPERTS)
    np.testing.assert_allclose(found["load"].sum(-1).reshape(-1), [ROWS] * EXPERTS, rtol=1e-5)
    assert bool((found["load"][0] != found["load"][1]).any())
    same = {"proj": jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), leaves.params["proj"])}
    x, params = jnp.broadcast_to(x[:1], x.shape), jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), params)
    y = Adapted(model, plan).apply({"params": params, "adapters": same}, x, adapter_inputs=inputs)
    assert bool((y[0] != y[1]).any()), "each expert drops other entries"


def test_segments_of_tokens_say_nothing_of_rows_that_were_sent_to_experts():
    model = Experts("vmap")
    x, params, plan, _, leaves = made(model, MoR(rank=2, num_experts=3, router="balanced"))
    inputs = AdapterInputs(segment_ids=jnp.ones((3, 7), jnp.int32))
    y = Adapted(model, plan).apply({"params": params, "adapters": leaves.params}, x, adapter_inputs=inputs)
    np.testing.assert_array_equal(y, run(model, plan, params, leaves, x))
    assert y.shape == (EXPERTS, ROWS, INNER)


@pytest.mark.parametrize("layout", ["vmap", "batch_dims"])
def test_a_routed_method_merges_by_least_squares_expert_by_expert(layout):
    """Against NumPy's solution of each expert's own regression in float64."""
    model = Experts(layout)
    x, params, plan, _, leaves = made(model, MoR(rank=2, num_experts=3))

    def call(batch):
        return (batch["x"],), {}, AdapterInputs()

    change = least_squares(model, params, leaves, plan, [{"x": x}], call=call, sequential=False, ridge=1e-3)
    change = change.changes["proj"]
    delta = np.float64(run(model, plan, params, leaves, x)) - np.float64(model.apply({"params": params}, x))
    for e, own in enumerate(np.float64(x)):
        moment = own.T @ own / ROWS
        ridge = 1e-3 * np.trace(moment) / WIDTH * np.eye(WIDTH)
        expected = np.linalg.solve(moment + ridge, own.T @ delta[e] / ROWS)
        np.testing.assert_allclose(change[e], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
