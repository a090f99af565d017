"""What is no target may be anything: tracing a model stops at nothing in it, and adapts nothing by mistake."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_models import WIDTH, Scaled, example
from odd_models import CASES, OUT, JittedOutside, Layers, NoMap, OtherCollection

from mor_jax.adapters import LoRA
from mor_jax.injection import (
    DEFAULT_KINDS,
    Adapted,
    Contraction,
    InjectionError,
    LinearKind,
    init_leaves,
    resolve_sites,
)
from mor_jax.merging import merge

pytestmark = pytest.mark.usefixtures("quick_compilation")
LORA = LoRA(rank=2, alpha=3.0)


def variables_of(model, x):
    found = model.init(jax.random.key(1), x)
    return found.pop("params"), found


def nudged(plan, params):
    leaves = init_leaves(jax.random.key(2), plan, params)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    return leaves._replace(
        params=jax.tree.map(lambda v: v + 0.3 * jax.random.normal(next(keys), v.shape), leaves.params)
    )


def changed_by_hand(params, leaves, paths):
    def change(tree, path):
        name, _, rest = path.partition("/")
        if name:
            return {**tree, name: change(tree[name], rest)}
        return {**tree, "kernel": tree["kernel"] + 1.5 * own["a"] @ own["b"]}

    for path in paths:
        own = leaves.params[path]
        params = change(params, path)
    return params


@pytest.mark.parametrize("name", CASES)
def test_adapted_equals_kernels_changed_by_hand(name):
    model, paths = CASES[name]
    x = example()
    params, rest = variables_of(model, x)
    for _ in range(2):  # a second time, when flax and jax remember the first
        plan = resolve_sites(model, LORA, "all-linear", x)
        assert plan.paths == paths or set(plan.paths) == set(paths)
    leaves = nudged(plan, params)
    changed = changed_by_hand(params, leaves, paths)
    assert jax.tree.structure(params) == jax.tree.structure(changed)
    expected = model.apply({"params": changed, **rest}, x)

    def run(leaves, plan=plan):
        return Adapted(model, plan).apply({"params": params, "adapters": leaves.params, **rest}, x)

    scale = float(jnp.abs(expected).max())
    assert float(jnp.abs(expected - model.apply({"params": params, **rest}, x)).max()) > 0.01 * scale
    for adapted in (jax.jit(run), run):
        np.testing.assert_allclose(adapted(leaves), expected, rtol=1e-5, atol=1e-5 * scale)
    merged = merge(params, leaves, plan)
    np.testing.assert_allclose(model.apply({"params": merged, **rest}, x), expected, rtol=1e-5, atol=1e-5 * scale)


def test_another_scale_is_no_trace_that_flax_remembers():
    """Eager calls of a model with nn.jit inside, whose inner trace knows nothing of the plan."""
    model, x = JittedOutside(), example()
    params, _ = variables_of(model, x)
    outputs = []
    for alpha in (2.0, 4.0):
        plan = resolve_sites(model, LoRA(rank=2, alpha=alpha), "proj", x)
        leaves = nudged(plan, params)
        outputs.append(Adapted(model, plan).apply({"params": params, "adapters": leaves.params}, x))
    base = model.apply({"params": params}, x)
    np.testing.assert_allclose(outputs[1] - base, 2 * (outputs[0] - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("scaled", r"'scaled' matches scaled, which can't be adapted: 'bsd,d->bsd' contracts no axis"),
        ("summed", r"'summed' matches summed, .* sums over 'k' alone"),
        ("pooled", r"'pooled' matches pooled, .* sums over 's' alone"),
    ],
)
def test_a_target_that_is_no_linear_map_says_why(target, message):
    with pytest.raises(InjectionError, match=message):
        resolve_sites(NoMap(), LORA, target, example())
    plan = resolve_sites(NoMap(), LORA, "proj", example())
    assert plan.paths == ("proj",)
    assert target in dict(plan.skipped)


def test_a_kernel_in_another_collection_is_named():
    kind = LinearKind(lambda module: type(module).__name__ == "Frozen")
    plan = resolve_sites(OtherCollection(), LORA, "proj", example(), kinds=(kind, *DEFAULT_KINDS))
    assert dict(plan.skipped) == {"frozen": "it has no 'kernel' in the collection 'params'"}
    with pytest.raises(InjectionError, match="frozen, which can't be adapted: it has no 'kernel' in the collection"):
        resolve_sites(OtherCollection(), LORA, "frozen", example(), kinds=(kind, *DEFAULT_KINDS))


def test_a_table_that_fails_at_modules_it_was_not_made_for():
    axes = {"proj": Contraction(in_axes=(-1,), out_axes=(-2,))}
    kind = LinearKind(
        lambda module: isinstance(module, Scaled), "weight", lambda module, x, shape: axes[module.name], "offset"
    )

    class Two(nn.Module):
        @nn.compact
        def __call__(self, h):
            return Scaled(OUT, name="other")(Scaled(WIDTH, name="proj")(h))

    plan = resolve_sites(Two(), LORA, "proj", example(), kinds=(kind,))
    assert plan.paths == ("proj",)
    assert dict(plan.skipped) == {"other": "its contraction raised KeyError: 'other'"}
    with pytest.raises(InjectionError, match="other, which can't be adapted: its contraction raised KeyError"):
        resolve_sites(Two(), LORA, "other", example(), kinds=(kind,))


@pytest.mark.parametrize(
    ("shape", "contraction", "message"),
    [
        ((WIDTH, 2, 3), Contraction(), r"leaves axis 0 out of a kernel of shape \(6, 2, 3\): give its LinearKind"),
        ((4, WIDTH), Contraction(), r"pairs axes \(2,\) of an x of shape \(2, 5, 6\) with axes \(-2,\) of a kernel"),
        ((WIDTH, 4), Contraction(out_axes=(-1, -2)), "names an axis twice, or one that is not there"),
        ((WIDTH, 2, 3), Contraction(in_axes=(-3,), out_axes=(-1,), batch_axes=(-2,)), r"whose sizes differ"),
        ((WIDTH, 4), Contraction(x_axes=(3,)), r"names axis 3 of an x of shape \(2, 5, 6\)"),
        ((WIDTH, 4), lambda: None, "must give a Contraction, not function"),
    ],
)
def test_a_contraction_that_does_not_fit_its_kernel(shape, contraction, message):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.normal(), shape)
            return jnp.zeros((*x.shape[:-1], kernel.size // WIDTH))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            return Heads(name="proj")(h)

    kind = LinearKind(lambda module: isinstance(module, Heads), "w", lambda module, x, shape: contraction)
    with pytest.raises(InjectionError, match=f"proj, which can't be adapted: .*{message}"):
        resolve_sites(Model(), LORA, "proj", example(), kinds=(kind,))


def test_positive_kernel_axes_are_as_good_as_negative_ones():
    kind = LinearKind(
        lambda module: isinstance(module, Scaled),
        "weight",
        lambda module, x, shape: Contraction(in_axes=(1,), out_axes=(0,)),
        "offset",
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            return Scaled(4, name="proj")(h)

    site = resolve_sites(Model(), LORA, "proj", example(), kinds=(kind,)).sites[0]
    assert (site.in_axes, site.out_axes, site.site.in_features, site.site.out_features) == ((-1,), (-2,), 6, 4)


def test_one_kernel_used_both_ways_has_no_adapter_that_fits():
    class Transposed(nn.Module):
        def setup(self):
            self.proj = nn.Einsum((WIDTH, WIDTH), use_bias=False)

        def __call__(self, h):
            return self.proj(jnp.tanh(self.proj(h, "bsd,df->bsf")), "bsf,df->bsd")

    with pytest.raises(InjectionError, match="called in ways that contract different axes of its kernel"):
        resolve_sites(Transposed(), LORA, "proj", example())


def test_a_call_unlike_the_plans_example_is_an_error():
    class Either(nn.Module):
        @nn.compact
        def __call__(self, h, equation):
            return nn.Einsum((WIDTH, WIDTH), use_bias=False, name="proj")(h, equation)

    model, x = Either(), example()
    plan = resolve_sites(model, LORA, "proj", x, "bsd,df->bsf")
    params = model.init(jax.random.key(0), x, "bsd,df->bsf")["params"]
    own = {"params": params, "adapters": init_leaves(jax.random.key(0), plan, params).params}
    assert Adapted(model, plan).apply(own, x[0], "sd,df->sf").shape == (5, WIDTH)
    with pytest.raises(InjectionError, match=r"proj is called with in_axes \(-1,\) and was planned with \(-2,\)"):
        Adapted(model, plan).apply(own, x, "bsf,df->bsd")


@pytest.mark.parametrize("target", ["weight_normed", "spectral_normed"])
def test_a_kernel_that_is_made_from_parameters_is_no_target(target):
    with pytest.raises(InjectionError, match=rf"{target}, .*Norm makes its kernel from its parameters"):
        resolve_sites(Layers(), LORA, target, example())


def test_a_model_that_is_itself_a_linear_module():
    with pytest.raises(InjectionError, match="the model itself, which .*make it part of a module"):
        resolve_sites(nn.Dense(4), LORA, "all-linear", example())


def test_a_transformation_that_nobody_knows_is_named():
    def transposed(tree):
        return jax.tree.map(lambda v: v.T if v.ndim == 2 else v, tree)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            dense = nn.map_variables(nn.Dense, "params", transposed, transposed, init=True)
            return dense(4, name="turned")(nn.Dense(WIDTH, name="proj")(h))

    assert resolve_sites(Model(), LORA, "proj", example()).paths == ("proj",)
    with pytest.raises(
        InjectionError, match=r"turned is stored as \(4, 6\) and called with \(6, 4\), which no nn.scan"
    ):
        resolve_sites(Model(), LORA, "turned", example())
