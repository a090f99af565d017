"""Exact merges: the merged base computes what the adapted model computes; dtype, structure and sharding stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mor_jax.adapters import DoRA, LoRA, MoR, NotMergeable, RsLoRA
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.merging import merge
from tests.merging.models import LAYERS, WIDTH, Stack, batches, call, make, random_leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Scales near 1: with alpha 16 the random factors drive tanh's argument to 170, where float32 itself is off by 1e-5.
METHODS = [
    LoRA(rank=3, alpha=3),
    RsLoRA(rank=3, alpha=3),
    DoRA(rank=3, alpha=3),
    MoR(rank=3, alpha=3, num_experts=4, router="mean"),
]
CASES = [(method, 0) for method in METHODS] + [(METHODS[2], 1), (METHODS[1], None)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def adapted_output(model, params, leaves, plan, batch):
    args, kwargs, inputs = call(batch)
    return Adapted(base=model, plan=plan).apply(
        {"params": params, "adapters": leaves.params}, *args, adapter_inputs=inputs, **kwargs
    )


@functools.partial(jax.jit, static_argnums=0)
def plain_output(model, params, batch):
    return model.apply({"params": params}, batch["input_ids"])


@pytest.mark.parametrize(("method", "scan_axis"), CASES, ids=lambda v: getattr(v, "name", f"axis-{v}"))
def test_merged_base_equals_adapted_model(method, scan_axis):
    model, params, leaves, plan = make(method, ("up", "down", "head"), scan_axis=scan_axis)
    merged = merge(params, leaves, plan)
    (batch,) = batches(1)
    adapted = adapted_output(model, params, leaves, plan, batch)
    plain = plain_output(model, merged, batch)
    base = plain_output(model, params, batch)
    assert float(jnp.abs(adapted - base).max()) > 0.1
    # float32 rounding (6e-8) of logits as large as their maximum, through three residual layers
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=3e-6 * float(jnp.abs(adapted).max()))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(merged["embed"]["embedding"], params["embed"]["embedding"])


def test_bfloat16_kernels_are_rounded_once_from_a_float32_sum():
    method = LoRA(rank=3, alpha=6)
    _, params, leaves, plan = make(method, ("up",), dtype=jnp.bfloat16)
    merged = merge(params, leaves, plan)["layers"]["up"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    own = {k: np.asarray(v, np.float64) for k, v in leaves.params["layers/up"].items()}
    exact = np.asarray(params["layers"]["up"]["kernel"], np.float64) + 2 * own["a"] @ own["b"]
    # half a unit in the last place of bfloat16 (8 significant bits), and the float32 sum's own rounding
    bound = np.abs(exact) * 2.0**-8 * (1 + 1e-4) + 1e-6
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("scope", ["site", "block"])
def test_routed_method_names_the_site_and_merges_with_constant_gates(scope):
    model, params, leaves, plan = make(MoR(rank=3, num_experts=4, scope=scope))
    with pytest.raises(NotMergeable, match=r"layers/up: .*least_squares"):
        merge(params, leaves, plan)
    paths = ["layers"] if scope == "block" else ["layers/up", "layers/down"]
    for path in paths:
        leaves.params[path]["router"] = jnp.zeros_like(leaves.params[path]["router"])
    gates = {path: jnp.full((LAYERS, 4), 0.25) for path in paths}
    merged = merge(params, leaves, plan, gates)
    (batch,) = batches(1)
    adapted = adapted_output(model, params, leaves, plan, batch)
    plain = plain_output(model, merged, batch)
    np.testing.assert_allclose(plain, adapted, rtol=0, atol=1e-5 * float(jnp.abs(adapted).max()))
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        merge(params, leaves, plan, {path: jnp.full((LAYERS, 5), 0.2) for path in paths})


def test_trained_modules_replace_the_base_in_its_dtype():
    model = Stack()
    ids = jnp.zeros((2, 4), jnp.int32)
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), jax.jit(model.init)(jax.random.key(0), ids)["params"])
    plan = resolve_sites(model, LoRA(rank=2), ("up",), ids, trained_modules=("head",))
    leaves = random_leaves(jax.random.key(1), plan, params)
    merged = merge(params, leaves, plan)
    for name in ("kernel", "bias"):
        assert merged["head"][name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(merged["head"][name], leaves.params["head"][name].astype(jnp.bfloat16))


def test_sharding_of_every_kernel_is_kept():
    model, params, leaves, plan = make(LoRA(rank=2))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spec = lambda v: PartitionSpec(*[None] * (v.ndim - 1), "fsdp") if v.shape[-1] % 4 == 0 else PartitionSpec()  # noqa: E731
    sharded = jax.tree.map(lambda v: jax.device_put(v, NamedSharding(mesh, spec(v))), params)
    merged = merge(sharded, leaves, plan)
    assert jax.tree.map(lambda v: v.sharding, merged) == jax.tree.map(lambda v: v.sharding, sharded)
    assert merged["layers"]["down"]["kernel"].sharding.spec[-1] == "fsdp"
    assert WIDTH % 4 == 0
    plain = merge(params, leaves, plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, plain)
