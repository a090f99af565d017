"""Leaves that sites share (VeRA) and constants by site (LoRA-Mini) inside scans, loops and remat; noise (HaLoRA)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import AdapterInputs, HaLoRA, Kernel, Leaves, LoRA, LoRAMini, PRILoRA, Site, VeRA
from mor_jax.injection import Adapted, init_leaves, resolve_sites
from mor_jax.merging import merge
from tests.merging.models import LAYERS, Stack, random_leaves, unrolled

IDS = np.random.default_rng(0).integers(0, 64, (2, 5)).astype(np.int32)
METHODS = [VeRA(rank=4, d_initial=1.0), LoRAMini(rank=2, inner_in=6, inner_out=5)]


def _made(method, **options):
    model = Stack(**options)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    plan = resolve_sites(model, method, ("up", "down"), IDS)
    return model, params, random_leaves(jax.random.key(1), plan, params), plan


def _run(model, plan, params, leaves, adapters=None, **inputs):
    own = {"adapters": leaves.params if adapters is None else adapters, "adapter_constants": leaves.constants}
    return Adapted(base=model, plan=plan).apply({"params": params, **own}, IDS, adapter_inputs=AdapterInputs(**inputs))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_foreign_scans_and_remat_equal_the_loop_and_the_merged_model(method):
    model, params, leaves, plan = _made(method)
    loss = lambda model: lambda a: jnp.sum(jnp.sin(_run(model, plan, params, leaves, a)))  # noqa: E731
    both = jax.jit(jax.value_and_grad(loss(model)))(leaves.params)
    again = jax.jit(jax.value_and_grad(loss(Stack(remat=True))))(leaves.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both, again)
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(both[1]))
    scanned = jax.jit(lambda: _run(model, plan, params, leaves))()
    loop_params, loop_leaves = unrolled(params, leaves)
    constants = unrolled(params, Leaves(leaves.constants))[1].params
    loop = Stack(scan_axis=None)
    loop_plan = resolve_sites(loop, method, ("up", "down"), IDS)
    looped = jax.jit(lambda: _run(loop, loop_plan, loop_params, Leaves(loop_leaves.params, {}, constants)))()
    tolerance = 2e-5 * float(jnp.abs(scanned).max())
    np.testing.assert_allclose(scanned, looped, rtol=0, atol=tolerance)
    merged = model.apply({"params": merge(params, leaves, plan)}, IDS)
    np.testing.assert_allclose(merged, scanned, rtol=0, atol=tolerance)
    assert float(jnp.abs(scanned - model.apply({"params": params}, IDS)).max()) > 0.1


def test_shared_factors_exist_once_and_never_by_site():
    _, params, leaves, plan = _made(VeRA(rank=4))
    assert set(leaves.constants) == {"shared/vera"}
    assert {k: v.shape for k, v in leaves.constants["shared/vera"].items()} == {"a": (20, 4), "b": (4, 20)}
    assert plan.num_params() == sum(leaf.size for leaf in jax.tree.leaves(leaves.params))
    assert {name for own in leaves.params.values() for name in own} == {"d", "lam_b"}
    again = init_leaves(jax.random.key(99), plan, params).constants
    jax.tree.map(np.testing.assert_array_equal, leaves.constants, again)


def test_sites_of_other_settings_share_nothing_with_these():
    model = Stack()
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    overrides = (("down", VeRA(rank=3)), ("head", LoRA(rank=2)))
    plan = resolve_sites(model, VeRA(rank=4), ("up", "down", "head"), IDS, overrides=overrides)
    leaves = random_leaves(jax.random.key(1), plan, params)
    assert {s.site.path: s.shared for s in plan.sites} == {
        "layers/up": "shared/vera",
        "layers/down": "shared/vera 2",
        "head": "",
    }
    assert leaves.constants["shared/vera 2"]["a"].shape == (20, 3)
    adapted = jax.jit(lambda: _run(model, plan, params, leaves))()
    plain = model.apply({"params": merge(params, leaves, plan)}, IDS)
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=2e-5 * float(jnp.abs(adapted).max()))


@pytest.mark.parametrize(
    ("method", "inputs"), [(VeRA(rank=4, d_initial=1.0), {}), (HaLoRA(rank=2), {"noise_step": jnp.int32(3)})]
)
def test_output_in_one_equals_base_and_change_and_drops_the_base_product(method, inputs):
    """A call that captures changes asks for them; any other may take the method's whole output."""
    model, params, leaves, plan = _made(method, scan_axis=None)

    def run(params, adapters, capture):
        own = {"adapters": adapters, "adapter_constants": leaves.constants}
        collections = {"params": params, **own}
        return Adapted(base=model, plan=plan).apply(
            collections, IDS, adapter_inputs=AdapterInputs(**inputs), capture=capture
        )

    seen = []
    made = [
        jax.jit(lambda p, a, c=capture: run(p, a, c)).lower(params, leaves.params).compile()
        for capture in (None, lambda path, x, delta: seen.append(path))
    ]
    assert len(seen) == len(plan.sites)
    whole, apart = (program(params, leaves.params) for program in made)
    np.testing.assert_allclose(whole, apart, rtol=0, atol=2e-5 * float(jnp.abs(apart).max()))
    if method.name == "halora":
        flops = [program.cost_analysis()["flops"] for program in made]
        product = 2 * IDS.size * sum(s.site.in_features * s.site.out_features for s in plan.sites)
        assert flops[1] - flops[0] > 0.8 * product


class Proj(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, use_bias=False, name="proj")(x)


def _dropped_out(method, kernel, adapters, x, deterministic=False, **collections):
    """One adapted map with dropout, all methods drawing the same mask."""
    model = Proj(kernel.shape[1])
    plan = resolve_sites(model, method, ("proj",), x)
    inputs = AdapterInputs(key=jax.random.key(2), deterministic=deterministic, noise_step=jnp.int32(3))
    own = {"params": {"proj": {"kernel": kernel}}, "adapters": {"proj": adapters}, **collections}
    return Adapted(model, plan).apply(own, x, adapter_inputs=inputs)


@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_spares_the_noisy_product(deterministic):
    """HaLoRA in float64: x (W + nu) + s (dropped x) a b. The dropped x is what a LoRA of identities hands out."""
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    identities = {"a": jnp.eye(6), "b": jnp.eye(6)}
    dropped = _dropped_out(LoRA(rank=6, alpha=6.0, dropout=0.4), jnp.zeros((6, 6)), identities, x, deterministic)
    assert bool((dropped == 0).any()) != deterministic
    method, kernel = HaLoRA(rank=2, sigma=0.5, dropout=0.4), jax.random.normal(jax.random.key(1), (6, 5))
    leaves = method.init(jax.random.key(2), Site("proj", 6, 5), jnp.int32(0), Kernel(kernel))
    params = {name: leaf + 0.3 for name, leaf in leaves.params.items()}
    constants = {"adapter_constants": {"proj": leaves.constants}}
    y = _dropped_out(method, kernel, params, x, deterministic, **constants)
    noise = method.noise(leaves, Kernel(kernel), jnp.int32(3))
    wide = [np.asarray(v, np.float64) for v in (x, kernel, noise, dropped, params["a"], params["b"])]
    expected = wide[0] @ (wide[1] + wide[2]) + 8 / 2 * wide[3] @ wide[4] @ wide[5]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_feature_norms_are_of_x_before_dropout():
    """PRILoRA prunes by the features that a layer gets, not by those that dropout left of them."""
    method, x = PRILoRA(rank=2, dropout=0.4), jax.random.normal(jax.random.key(0), (3, 4, 6))
    leaves = method.init(jax.random.key(2), Site("proj", 6, 5), jnp.int32(0), Kernel(jnp.zeros((6, 5))))
    state = {"adapter_state": {"proj": leaves.state}}

    def total(squares):
        probes = {"adapter_probes": {"proj": {"feature_squares": squares}}}
        return jnp.sum(_dropped_out(method, jnp.zeros((6, 5)), leaves.params, x, **state, **probes))

    np.testing.assert_allclose(jax.grad(total)(jnp.zeros(6)), np.sum(np.float64(x) ** 2, (0, 1)), rtol=1e-5)


def test_noise_is_one_draw_an_epoch_and_off_without_a_step():
    model, params, leaves, plan = _made(HaLoRA(noise_steps=10))
    run = jax.jit(lambda step: _run(model, plan, params, leaves, noise_step=step))
    first = run(jnp.int32(0))
    np.testing.assert_array_equal(first, run(jnp.int32(9)))
    assert bool((first != run(jnp.int32(10))).any())
    assert run._cache_size() == 1
    clean = _run(model, plan, params, leaves)
    assert 0 < float(jnp.abs(first - clean).max())
    lora = resolve_sites(model, LoRA(rank=4, alpha=8.0), ("up", "down"), IDS)
    plain = _run(model, lora, params, Leaves(leaves.params))
    np.testing.assert_allclose(clean, plain, rtol=0, atol=2e-5 * float(jnp.abs(plain).max()))
    assert leaves.constants["layers/up"]["place"].shape == (LAYERS, 2)
