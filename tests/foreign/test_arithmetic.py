"""Modules that are not x @ kernel + bias of the stored kernel: unchanged at the start, and no merge that is wrong."""

import dataclasses
import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax import check_merge
from mor_jax.adapters import METHODS, AdapterInputs, NotMergeable, make_adapter
from mor_jax.injection import Adapted, InjectionError, init_leaves, resolve_sites
from mor_jax.injection.judgement import Judgement
from mor_jax.merging import MergeCheck, lower_merge, merge, merge_changes, merge_routed

sys.path.insert(0, str(Path(__file__).parent))

from arithmetic_modules import (
    KINDS,
    NOT_PRODUCTS,
    PRODUCTS,
    WIDTH,
    Mapped,
    Normed,
    Side,
    Tied,
    double,
    doubled_all,
    kernel_alone,
    rounded,
    turned,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jax.random.normal(jax.random.key(3), (4, 16, WIDTH))
LORA = make_adapter("lora", rank=3)


class Case:
    """A model with a method at some of its modules, nudged off its start."""

    def __init__(self, model, targets, method=LORA):
        self.model = model
        self.variables = model.init(jax.random.key(0), X)
        self.params = self.variables["params"]
        self.plan = resolve_sites(model, method, targets, X, kinds=KINDS)
        self.start = init_leaves(jax.random.key(1), self.plan, self.params)
        keys = iter(jax.random.split(jax.random.key(2), 1000))
        moved = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(next(keys), v.shape), self.start.params)
        self.leaves = self.start._replace(params=moved)

    def forward(self, leaves, **inputs):
        own = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
        adapted = Adapted(base=self.model, plan=self.plan)
        return adapted.apply({**self.variables, **own}, X, adapter_inputs=AdapterInputs(**inputs))

    def base(self, params=None):
        return self.model.apply({**self.variables, "params": self.params if params is None else params}, X)


ALL = tuple({**NOT_PRODUCTS, **PRODUCTS})


@functools.cache
def judgements():
    """What is known of all modules, which does not depend on the method and takes a second to find out."""
    plan = resolve_sites(Side(ALL), LORA, ALL, X, kinds=KINDS)
    return {s.site.path: Judgement(s.unmergeable, s.kernel_seen) for s in plan.sites}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_every_module_as_it_is(name, monkeypatch):
    known = judgements()
    monkeypatch.setattr("mor_jax.injection.resolve.judge_sites", lambda *args: known)
    case = Case(Side(ALL), ALL, make_adapter(name))
    base, adapted = case.base(), case.forward(case.start)
    for module in ALL:
        np.testing.assert_allclose(adapted[module], base[module], atol=1e-6, rtol=1e-6, err_msg=module)


@pytest.mark.parametrize("noise_unit", ["absolute", "tile_max"])
def test_noise_on_the_base_is_a_change_of_the_modules_own_output(noise_unit):
    """x nu beside what the module does, nu being what a plain module gets."""
    method = make_adapter("halora", noise_unit=noise_unit)
    names = ("dense_dot_general", "clipped")
    case = Case(Side(names), names, method)
    change = jax.tree.map(jnp.subtract, case.forward(case.start, noise_step=jnp.int32(0)), case.forward(case.start))
    for adapted in case.plan.sites:
        kernel = np.asarray(case.params[adapted.site.path]["kernel"], np.float64)
        nu = np.linalg.lstsq(
            np.asarray(X.reshape(-1, WIDTH)), np.asarray(change[adapted.site.path]).reshape(-1, WIDTH)
        )[0]
        unit = method.sigma * (np.abs(kernel).max() if noise_unit == "tile_max" else 1)
        assert 0.8 * unit < nu.std() < 1.2 * unit


@pytest.mark.parametrize("name", NOT_PRODUCTS)
def test_what_is_no_product_is_not_merged(name):
    case = Case(Side((name,)), (name,))
    with pytest.raises(NotMergeable, match=f"^{name}: .*keep the adapter beside the base"):
        merge(case.params, case.leaves, case.plan)
    with pytest.raises(NotMergeable, match=f"^{name}: "):
        merge_changes(case.params, case.leaves, case.plan, {name: jnp.ones((WIDTH, WIDTH))})
    with pytest.raises(NotMergeable, match=f"^{name}: "):
        list(lower_merge(case.params, case.leaves, case.plan))
    with pytest.raises(NotMergeable, match=f"^{name}: "):
        merge_routed(case.model, case.params, case.leaves, case.plan, calibration=[], heldout=[])
    forced = dataclasses.replace(
        case.plan, sites=tuple(dataclasses.replace(s, unmergeable="") for s in case.plan.sites)
    )
    if name not in ("integers", "quantised"):  # the refusal was right: the merge is wrong
        merged = merge(case.params, case.leaves, forced)
        with pytest.raises(NotMergeable, match="of what the adapters do"):
            check_merge(case.model, case.params, case.leaves, case.plan, X, merged=merged)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_other_spellings_are_merged(name):
    case = Case(Side((name,)), (name,))
    merged = merge(case.params, case.leaves, case.plan)
    half = name.endswith(("half", "type"))
    adapted, expected = case.base(merged)[name], case.forward(case.leaves)[name]
    assert jnp.abs(expected - case.base()[name]).max() > 0.1
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(np.float32(adapted), np.float32(expected), atol=(0.02 if half else 1e-6) * scale, rtol=0)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("function", [double, turned])
def test_a_kernel_that_the_module_sees_through_a_function_is_not_merged(function, scanned):
    case = Case(Mapped(function, scanned), ("proj",))
    np.testing.assert_allclose(case.forward(case.start), case.base(), atol=1e-6)
    with pytest.raises(NotMergeable, match="^layer/proj: it sees its kernel through a function"):
        merge(case.params, case.leaves, case.plan)
    with pytest.raises(InjectionError, match=r"^layer/proj: .*reads the kernel"):
        Case(Mapped(function, scanned), ("proj",), make_adapter("dora", rank=3))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_function_that_only_rounds_is_merged(scanned):
    case = Case(Mapped(rounded, scanned), ("proj",))
    merged = merge(case.params, case.leaves, case.plan)
    assert jnp.abs(case.forward(case.leaves) - case.base()).max() > 0.3
    np.testing.assert_allclose(case.base(merged), case.forward(case.leaves), atol=0.05)


@pytest.mark.parametrize("function", [doubled_all, kernel_alone])
def test_a_function_that_would_change_the_adapter_itself_is_an_error(function):
    with pytest.raises(InjectionError, match="^layer/proj: its parameters reach it through a function"):
        Case(Mapped(function), ("proj",))


def test_weight_normalisation():
    case = Case(Normed(nn.WeightNorm), ("proj", "beside"))
    np.testing.assert_allclose(case.forward(case.start), case.base(), atol=1e-6)
    with pytest.raises(NotMergeable, match="^proj: it sees its kernel through a function"):
        merge(case.params, case.leaves, case.plan)
    beside = Case(Normed(nn.WeightNorm), ("beside",), make_adapter("dora", rank=3))
    merged = merge(beside.params, beside.leaves, beside.plan)
    np.testing.assert_allclose(beside.base(merged), beside.forward(beside.leaves), atol=1e-5)


def test_spectral_normalisation():
    with pytest.raises(InjectionError, match=r"^proj: its parameters reach it .*SpectralNorm"):
        Case(Normed(nn.SpectralNorm), ("proj",))
    beside = Case(Normed(nn.SpectralNorm), ("beside",))
    merged = merge(beside.params, beside.leaves, beside.plan)
    np.testing.assert_allclose(beside.base(merged), beside.forward(beside.leaves), atol=1e-5)
    others = {"batch_stats": beside.variables["batch_stats"]}
    check_merge(beside.model, beside.params, beside.leaves, beside.plan, X, collections=others)


@pytest.mark.parametrize("remat", [False, True])
def test_a_kernel_that_two_maps_share_is_not_merged(remat):
    case = Case(Tied(remat), ("proj", "beside"))
    assert [s.site.path for s in case.plan.sites if s.unmergeable] == ["proj"]
    with pytest.raises(NotMergeable, match="^proj: its kernel is also used outside of it"):
        merge(case.params, case.leaves, case.plan)


def test_the_plan_is_found_inside_of_a_compiled_program():
    case = Case(Side(("own", "scaled")), ("own", "scaled"))
    plans = []
    jax.jit(lambda x: plans.append(resolve_sites(case.model, LORA, ("own", "scaled"), x, kinds=KINDS)))(X)
    assert plans == [case.plan]


def test_check_merge_measures_what_a_merge_misses():
    case = Case(Side(("own",)), ("own",))
    found = check_merge(case.model, case.params, case.leaves, case.plan, X)
    assert isinstance(found, MergeCheck)
    assert found.relative_difference < 1e-5
    base, adapted = case.base()["own"], case.forward(case.leaves)["own"]
    half = jax.tree.map(lambda v, m: v + 0.5 * (m - v), case.params, merge(case.params, case.leaves, case.plan))
    found = check_merge(case.model, case.params, case.leaves, case.plan, X, merged=half, tolerance=None)
    np.testing.assert_allclose(found.relative_difference, 0.5, rtol=1e-4)
    np.testing.assert_allclose(found.difference, jnp.abs(adapted - base).max() / 2, rtol=1e-4)
    np.testing.assert_allclose(found.effect, jnp.linalg.norm(adapted - base) / jnp.linalg.norm(base), rtol=1e-4)
    with pytest.raises(NotMergeable, match=r"misses 50.00% .*tolerance of 10.00%"):
        check_merge(case.model, case.params, case.leaves, case.plan, X, merged=half, tolerance=0.1)
    check_merge(case.model, case.params, case.leaves, case.plan, X, merged=half, tolerance=0.6)
    unfinite = jax.tree.map(lambda v: v * jnp.nan, half)
    with pytest.raises(NotMergeable):
        check_merge(case.model, case.params, case.leaves, case.plan, X, merged=unfinite, tolerance=0.6)
