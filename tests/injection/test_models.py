"""An adapted model equals the base with its kernels changed by hand, in values and gradients, for any structure."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from hypothesis import given, settings
from hypothesis import strategies as st
from linen_models import CASES, LAYERS, Siamese, Stack, example

from mor_jax.adapters import AdapterInputs, LoRA
from mor_jax.injection import Adapted, InjectionError, init_leaves, resolve_sites

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA = LoRA(rank=2, alpha=3.0)


def adapted_case(name, fuse=True):
    case = CASES[name]
    x = example()
    params = case.model.init(jax.random.key(1), x)["params"]
    plan = resolve_sites(case.model, LORA, case.targets, x, kinds=case.kinds, fuse=fuse)
    leaves = init_leaves(jax.random.key(2), plan, params).params
    noise = iter(jax.random.split(jax.random.key(3), 100))
    return case, params, plan, jax.tree.map(lambda v: v + 0.3 * jax.random.normal(next(noise), v.shape), leaves), x


def changed_by_hand(case, params, adapters):
    flat = flax.traverse_util.flatten_dict(params)
    for path, change in case.changes.items():
        key = (*path.split("/"), case.kernel)
        kernel = meta.unbox(flat[key]) + LORA.alpha / LORA.rank * change(adapters[path]["a"], adapters[path]["b"])
        flat[key] = meta.replace_boxed(flat[key], kernel)
    return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("name", CASES)
def test_adapted_equals_kernels_changed_by_hand(name):
    case, params, plan, adapters, x = adapted_case(name)
    assert sorted(plan.paths) == sorted(case.changes)
    assert plan.num_params() == sum(leaf.size for leaf in jax.tree.leaves(adapters))

    def by_injection(adapters, x):
        return Adapted(case.model, plan).apply({"params": params, "adapters": adapters}, x)

    def by_hand(adapters, x):
        return case.model.apply({"params": changed_by_hand(case, params, adapters)}, x)

    def with_gradients(function):
        def loss(adapters, x):
            y = function(adapters, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(adapters, x)

    (_, actual), gradients = with_gradients(by_injection)
    (_, expected), expected_gradients = with_gradients(by_hand)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)
    assert float(jnp.abs(expected - case.model.apply({"params": params}, x)).max()) > 0.05 * scale
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(gradients))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), gradients, expected_gradients
    )


@pytest.mark.parametrize("name", ["setup, called twice", "heads", "broadcast x"])
def test_eager_equals_traced(name):
    case, params, plan, adapters, x = adapted_case(name)
    apply = Adapted(case.model, plan).apply
    variables = {"params": params, "adapters": adapters}
    np.testing.assert_allclose(apply(variables, x), jax.jit(apply)(variables, x), rtol=1e-5, atol=1e-5)


def test_another_method_of_the_base():
    case, params, plan, adapters, x = adapted_case("setup, called twice")
    variables = {"params": params, "adapters": adapters}
    actual = Adapted(case.model, plan).apply(variables, x, method="encode")
    changed = changed_by_hand(case, params, adapters)
    expected = case.model.apply({"params": changed}, x, method=Siamese.encode)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_plan_may_be_left_to_the_call():
    x = example()
    model = Adapted(Stack(0), adapter=LORA, targets=("query", "out"))
    variables = model.init(jax.random.key(0), x)
    assert set(variables["adapters"]) == {"layers/query", "layers/out"}
    np.testing.assert_allclose(model.apply(variables, x), Stack(0).apply({"params": variables["params"]}, x), atol=1e-6)


def test_a_site_that_does_not_run_is_an_error():
    case, params, _, _, x = adapted_case("setup, called twice")
    longer = resolve_sites(Stack(0), LORA, "query", x)
    params = {**params, **Stack(0).init(jax.random.key(0), x)["params"]}
    leaves = init_leaves(jax.random.key(0), longer, params).params
    with pytest.raises(InjectionError, match="layers/query has an adapter but did not run"):
        Adapted(case.model, longer).apply({"params": params, "adapters": leaves}, x)


def test_missing_adapters_are_an_error():
    case, params, plan, adapters, x = adapted_case("setup, called twice")
    with pytest.raises(InjectionError, match="no collection 'adapters'"):
        Adapted(case.model, plan).apply({"params": params}, x)
    del adapters["tower"]
    with pytest.raises(KeyError, match="no adapter leaves for tower"):
        Adapted(case.model, plan).apply({"params": params, "adapters": adapters}, x)


@settings(max_examples=5)
@given(
    st.sampled_from(["bsd,df->bsf", "bsd,ndh->bnsh", "bsnh,hnd->sbd", "bsnh,nhkd->kbsd", "bdn,fdn->fb"]),
    st.lists(st.integers(1, 4), min_size=7, max_size=7),
    st.booleans(),
)
def test_any_einsum(equation, sizes, bias):
    """For odd sizes, ones among them: delta by the kernel's own letters."""
    size = dict(zip("bsdnhkf", sizes, strict=True))
    x_letters, kernel_letters = equation.split("->")[0].split(",")
    draw = np.random.default_rng(sum(sizes)).standard_normal
    x = jnp.asarray(draw([size[c] for c in x_letters]), jnp.float32)
    contracted = [c for c in kernel_letters if c in x_letters]
    produced = [c for c in kernel_letters if c not in x_letters]
    a, b = draw([*(size[c] for c in contracted), 2]), draw([2, *(size[c] for c in produced)])

    class Outer(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            shape = [size[c] for c in kernel_letters]
            return flax.linen.Einsum(shape, equation, use_bias=bias, name="proj")(x)

    params = Outer().init(jax.random.key(0), x)["params"]
    if bias:
        params["proj"]["bias"] = jnp.asarray(draw(params["proj"]["bias"].shape), jnp.float32)
    plan = resolve_sites(Outer(), LORA, "proj", x)
    leaves = {"a": jnp.float32(a.reshape(-1, 2)), "b": jnp.float32(b.reshape(2, -1))}
    actual = Adapted(Outer(), plan).apply({"params": params, "adapters": {"proj": leaves}}, x)
    change = np.einsum(f"{''.join(contracted)}r,r{''.join(produced)}->{kernel_letters}", a, b)
    expected = np.float64(Outer().apply({"params": params}, x)) + 1.5 * np.einsum(equation, np.float64(x), change)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


class Emit(flax.linen.Module):
    """A scan that gives out what each layer's query and key produce."""

    @flax.linen.compact
    def __call__(self, h):
        class Layer(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, h, _):
                zero = flax.linen.initializers.zeros
                dense = [flax.linen.Dense(h.shape[-1], kernel_init=zero, name=n)(h) for n in ("query", "key")]
                return h, jnp.stack(dense)

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return flax.linen.scan(Layer, length=LAYERS, **axes)(name="layers")(h, None)[1]


def test_dropout_draws_anew_for_each_layer_site_and_key():
    x = 1 + jnp.zeros((8, 40, 6))
    model = Emit()
    params = model.init(jax.random.key(0), x)["params"]
    plan = resolve_sites(model, LoRA(rank=6, alpha=6.0, dropout=0.25), ("query", "key"), x)
    leaves = {k: jnp.broadcast_to(jnp.eye(6), (LAYERS, 6, 6)) for k in "ab"}
    variables = {"params": params, "adapters": {"layers/query": leaves, "layers/key": leaves}}

    @jax.jit
    def run(key):
        inputs = AdapterInputs(key=key, deterministic=False)
        return Adapted(model, plan).apply(variables, x, adapter_inputs=inputs)

    first = run(jax.random.key(0)).reshape(2 * LAYERS, -1)
    kept = np.asarray(first != 0)
    np.testing.assert_allclose(first[kept], 1 / 0.75, rtol=1e-6)
    assert np.all(np.abs(kept.mean(1) - 0.75) < 5 * (0.25 * 0.75 / kept.shape[1]) ** 0.5)
    agree = (kept[:, None] == kept[None]).mean(-1)[np.triu_indices(len(kept), 1)]
    assert np.all(agree < 0.7), "independent masks agree on 0.25^2 + 0.75^2 = 0.625 of the entries"
    np.testing.assert_array_equal(run(jax.random.key(0)).reshape(first.shape), first)
    assert bool((run(jax.random.key(1)).reshape(first.shape) != first).any())
    still = Adapted(model, plan).apply(variables, x, adapter_inputs=AdapterInputs(key=jax.random.key(0)))
    np.testing.assert_allclose(still, 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="layers/query: dropout needs AdapterInputs.key"):
        Adapted(model, plan).apply(variables, x, adapter_inputs=AdapterInputs(deterministic=False))
