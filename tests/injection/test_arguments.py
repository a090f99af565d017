"""A public function that is given the wrong one of two things says so in one sentence."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from linen_models import OWN, Stack, example

from mor_jax.adapters import LoRA
from mor_jax.injection import (
    DEFAULT_KINDS,
    Adapted,
    InjectionError,
    LinearKind,
    cut_to_rank,
    init_leaves,
    prepare_leaves,
    resolve_sites,
)
from mor_jax.merging import as_lora, merge, merge_routed
from mor_jax.training.adapter_file import load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")
X, MODEL, LORA = example(), Stack(0), LoRA(rank=2)


@pytest.fixture(scope="module")
def made():
    variables = MODEL.init(jax.random.key(0), X)
    plan = resolve_sites(MODEL, LORA, ("query", "key"), X)
    return variables, plan, init_leaves(jax.random.key(1), plan, variables["params"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": OWN}, r"kinds must be a tuple, as kinds=\(kind, \*DEFAULT_KINDS\), not one LinearKind"),
        ({"kinds": (Stack,)}, "kinds must be a tuple of LinearKind, and holds"),
        ({"kinds": lambda module: True}, "kinds must be a tuple of LinearKind, and holds"),
        ({"adapter": "lora"}, r"the method must be one like LoRA\(rank=8\), .* not 'lora'"),
        ({"adapter": LoRA}, "the method must be one like .* not the class LoRA"),
        ({"overrides": ("key", LORA)}, r"overrides must be .* pairs, .* not 'key'"),
        ({"overrides": (("key", "dora"),)}, "the method must be one like .* not 'dora'"),
        ({"model": Stack}, "the model must be a flax.linen module, made with its fields, not the class Stack"),
        ({"model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "the model must be a flax.linen module, .* not Linear"),
    ],
)
def test_resolve_sites(options, message):
    given = {"model": MODEL, "adapter": LORA, "kinds": DEFAULT_KINDS, "overrides": (), **options}
    model, adapter = given.pop("model"), given.pop("adapter")
    with pytest.raises(InjectionError, match=message):
        resolve_sites(model, adapter, "query", X, **given)


def test_friendly_spellings_mean_the_same():
    expected = resolve_sites(MODEL, LORA, ("query",), X, overrides=(("key", LoRA(rank=3)),), trained_modules=("out",))
    overrides = {"key": LoRA(rank=3)}
    found = resolve_sites(
        MODEL, LORA, ["query"], X, overrides=overrides, trained_modules="out", kinds=list(DEFAULT_KINDS)
    )
    assert found == expected


def test_whole_variables_where_parameters_are_wanted(made, tmp_path):
    variables, plan, leaves = made
    folder = save_adapter(tmp_path / "adapter", plan, leaves)
    calls = [
        lambda: init_leaves(jax.random.key(0), plan, variables),
        lambda: merge(variables, leaves, plan),
        lambda: as_lora(plan, leaves, variables),
        lambda: prepare_leaves(plan, leaves, variables),
        lambda: load_adapter(folder, MODEL, variables, X),
        lambda: Adapted(MODEL, plan).apply({"params": variables, "adapters": leaves.params}, X),
    ]
    for call in calls:
        with pytest.raises(InjectionError, match=r"these are whole variables: give the parameters alone, variables\["):
            call()


def test_other_things_where_parameters_are_wanted(made):
    variables, plan, leaves = made
    for given, message in [
        (leaves, "the base's parameters are wanted, and this is a Leaves"),
        (leaves.params, "the base's parameters are wanted, and these are adapters"),
        (jnp.ones(3), "must be nested dictionaries of arrays, not ArrayImpl"),
        ({"other": {}}, "the parameters have no layers/query/kernel: are they of another model?"),
    ]:
        with pytest.raises(InjectionError, match=message):
            init_leaves(jax.random.key(0), plan, given)
        with pytest.raises(InjectionError, match=message):
            merge(given, leaves, plan)
        with pytest.raises(InjectionError, match=message):
            Adapted(MODEL, plan).apply({"params": given, "adapters": leaves.params}, X)
    with pytest.raises(InjectionError, match="the plan must be what resolve_sites returns, not dict"):
        init_leaves(jax.random.key(0), variables["params"], plan)


def test_adapters_alone_where_leaves_are_wanted(made, tmp_path):
    variables, plan, leaves = made
    params = variables["params"]
    for given, what in ((leaves.params, "a dictionary"), (None, "NoneType")):
        for call in [
            lambda given=given: merge(params, given, plan),
            lambda given=given: as_lora(plan, given, params),
            lambda given=given: prepare_leaves(plan, given, params),
            lambda given=given: cut_to_rank(plan, given, 1),
            lambda given=given: merge_routed(MODEL, params, given, plan, calibration=(), heldout=()),
            lambda given=given: save_adapter(tmp_path / "adapter", plan, given),
        ]:
            with pytest.raises(InjectionError, match=f"must be a Leaves, as init_leaves makes it, not {what}"):
                call()
    with pytest.raises(InjectionError, match="the plan must be what resolve_sites returns, not Leaves"):
        save_adapter(tmp_path / "adapter", leaves, plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, own: {**v, "adapters": own}, r"'adapters' must be leaves.params, and this is a whole Leaves"),
        (lambda v, own: {**v, "adapters": own.params, "adapter_state": own}, "'adapter_state' must be leaves.state"),
        (lambda v, own: {**v, "adapters": [1]}, "'adapters' must be leaves.params, not list"),
        (lambda v, own: {"adapters": own.params}, "no collection 'params' among the variables"),
        (lambda v, own: v, "no collection 'adapters' among the variables"),
        (lambda v, own: own, r'variables must be \{"params": base, "adapters": leaves.params\}, not Leaves'),
    ],
)
def test_collections_of_an_adapted_model(made, change, message):
    variables, plan, leaves = made
    with pytest.raises(InjectionError, match=message):
        Adapted(MODEL, plan).apply(change(variables, leaves), X)


def test_an_adapted_model_knows_a_plan_from_a_method(made):
    variables, plan, leaves = made
    own = {**variables, "adapters": leaves.params}
    for wrong in (LORA, "plan"):
        with pytest.raises(InjectionError, match="the plan must be what resolve_sites returns"):
            Adapted(MODEL, wrong).apply(own, X)
    with pytest.raises(InjectionError, match="the model must be a flax.linen module"):
        Adapted(Stack, plan).apply(own, X)


def test_a_kind_written_in_place_makes_no_other_plan(made):
    """Plans of the same inputs are equal, hash alike, and compile once."""
    variables, _, _ = made

    def resolved():
        kind = LinearKind(lambda module: type(module).__name__ == "Dense")
        return resolve_sites(MODEL, LORA, "query", X, kinds=(kind,))

    first, second = resolved(), resolved()
    assert first.kinds != second.kinds
    assert (first == second, hash(first) == hash(second)) == (True, True)
    traced = 0

    @jax.jit
    def run(adapters):
        nonlocal traced
        traced += 1
        return adapters

    def apply(plan, adapters):
        return Adapted(MODEL, plan).apply({**variables, "adapters": run(adapters)}, X)

    jitted = jax.jit(apply, static_argnums=0)
    leaves = init_leaves(jax.random.key(0), first, variables["params"])
    outputs = [jitted(plan, leaves.params) for plan in (first, second)]
    assert jitted._cache_size() == 1
    assert bool((outputs[0] == outputs[1]).all())
    other = resolve_sites(MODEL, LORA, "query", X, kinds=(LinearKind(lambda module: False), *DEFAULT_KINDS))
    assert other == first
    assert resolve_sites(MODEL, LoRA(rank=3), "query", X) != first
    assert resolve_sites(MODEL, LORA, "key", X) != first
