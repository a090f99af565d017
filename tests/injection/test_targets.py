"""From names and patterns to sites: every pattern hits, no site is claimed twice, errors name the nearest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_models import OWN, Heads, Own, Stack, example

from mor_jax.adapters import DoRA, LoRA, MoR
from mor_jax.injection import DEFAULT_KINDS, Adapted, InjectionError, init_leaves, join, resolve_sites

LORA, SMALL, OTHER = LoRA(rank=4), LoRA(rank=2), DoRA(rank=2)
SCANNED = ("layers/query", "layers/key", "layers/out")


class Tagger(nn.Module):
    """A scanned stack with an embedding and two heads, only one of which is a linear module."""

    @nn.compact
    def __call__(self, ids):
        h = Stack(0, name="body")(nn.Embed(11, 6, name="embed")(ids))
        bias = self.param("prior", nn.initializers.zeros, (3,))
        return nn.Dense(5, name="lm_head")(h), nn.Dense(3, name="score")(nn.LayerNorm(name="norm")(h)) + bias


IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def tagger(targets, **options):
    return resolve_sites(Tagger(), LORA, targets, IDS, **options)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query",), {"layers/query"}),
        (("query", "out"), {"layers/query", "layers/out"}),
        (("layers.key",), {"layers/key"}),
        ((".*/(query|key)",), {"layers/query", "layers/key"}),
        (("all-linear",), set(SCANNED)),
        (("all-linear", "lm_head"), {*SCANNED, "lm_head"}),
    ],
)
def test_targets(targets, expected):
    plan = tagger(targets)
    assert {p.removeprefix("body/") for p in plan.paths} == expected


def test_one_target_needs_no_tuple():
    assert tagger("query") == tagger(("query",))


def test_sites_know_their_shapes():
    site = tagger("query")["body/layers/query"].site
    assert (site.in_features, site.out_features, site.num_layers) == (6, 4, 3)
    heads = resolve_sites(Heads(), LORA, "all-linear", example())
    shapes = {s.site.path: (s.site.in_features, s.site.out_features) for s in heads.sites}
    assert shapes == {"query": (6, 6), "value": (6, 6), "wide": (6, 4), "out": (6, 6)}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("querry",), "target 'querry' matches no linear module; nearest: query"),
        (("query", "layers.kye"), "target 'layers.kye' matches no linear module; nearest: .*layers/key"),
        ((), "no targets given; name modules or use 'all-linear'"),
        (("(",), r"target '\(' is no valid regular expression"),
        (("embed",), "'embed' matches body/embed|'embed' matches embed, which holds a matrix .* LinearKind"),
    ],
)
def test_a_target_that_hits_nothing_names_the_nearest(targets, message):
    with pytest.raises(InjectionError, match=message):
        tagger(targets)


def test_an_unknown_linear_class_is_named_and_can_be_registered():
    with pytest.raises(InjectionError, match="matches proj, which holds a matrix but is no known linear module"):
        resolve_sites(Own(), LORA, "proj", example())
    plan = resolve_sites(Own(), LORA, "proj", example(), kinds=(*DEFAULT_KINDS, OWN))
    assert plan.paths == ("proj",)


def test_overrides():
    plan = tagger("all-linear", overrides=(("query", SMALL), ("lm_head", OTHER)))
    found = {path.removeprefix("body/"): plan[path].adapter for path in plan.paths}
    assert found == {"layers/query": SMALL, "layers/key": LORA, "layers/out": LORA, "lm_head": OTHER}
    assert plan.num_params() == 3 * (2 * 10 + 4 * 10 + 4 * 10) + 2 * (6 + 5) + 5


def test_overrides_that_agree_are_no_conflict():
    plan = tagger("all-linear", overrides=(("query", SMALL), (".*/(query|key)", SMALL)))
    assert plan["body/layers/query"].adapter == SMALL


def test_conflicting_overrides_are_named():
    message = (
        r"body/layers/query is claimed by two overrides.*: 'query' and '\.\*/\(query\|key\)'; make one .* narrower"
    )
    with pytest.raises(InjectionError, match=message):
        tagger("all-linear", overrides=(("query", SMALL), (".*/(query|key)", OTHER)))
    with pytest.raises(InjectionError, match="'kez' matches no linear module; nearest: key"):
        tagger("all-linear", overrides=(("kez", SMALL),))


def test_another_method_and_rank_at_each_site_of_one_group():
    """Sites of different ranks and methods still share one read of x."""
    model, x = Stack(0), example()
    overrides = (("key", MoR(rank=3, num_experts=2)),)
    params = model.init(jax.random.key(0), x)["params"]
    outputs = []
    for fuse in (True, False):
        plan = resolve_sites(model, LORA, ("query", "key"), x, overrides=overrides, fuse=fuse)
        leaves = init_leaves(jax.random.key(1), plan, params).params
        leaves = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(jax.random.key(v.size), v.shape), leaves)
        outputs.append(Adapted(model, plan).apply({"params": params, "adapters": leaves}, x))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(outputs[0] - model.apply({"params": params}, x)).max()) > 0.01


def test_trained_modules():
    model, ids = Tagger(), jnp.arange(10).reshape(2, 5)
    params = model.init(jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    plan = tagger("query", trained_modules=("score", "norm"))
    assert plan.trained_modules == ("score", "norm")
    assert plan.num_params() == 3 * 4 * 10 + (6 * 3 + 3) + (6 + 6)
    leaves = init_leaves(jax.random.key(1), plan, params)
    assert leaves.params["score"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(leaves.params["score"]["kernel"], params["score"]["kernel"])

    def loss(adapters, params):
        scores = Adapted(model, plan).apply({"params": params, "adapters": adapters}, ids)[1]
        return jnp.sum(jnp.sin(scores.astype(jnp.float32)))

    def by_hand(own, params):
        return jnp.sum(jnp.sin(model.apply({"params": {**params, **own}}, ids)[1].astype(jnp.float32)))

    own = {name: leaves.params[name] for name in plan.trained_modules}
    own = jax.tree.map(lambda v: v + 0.5, own)
    value, gradient = jax.value_and_grad(loss)({**leaves.params, **own}, params)
    expected, expected_gradient = jax.value_and_grad(by_hand)(own, params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    actual, expected = {name: gradient[name] for name in own}, expected_gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize(
    ("targets", "modules", "message"),
    [
        (("query",), ("scores",), "trained module 'scores' matches nothing; nearest: score"),
        (("lm_head",), ("lm_head",), "lm_head is both a target and a trained module"),
        (("query",), ("body",), "body/layers/query is both a target and a trained module"),
    ],
)
def test_trained_modules_that_do_not_fit(targets, modules, message):
    with pytest.raises(InjectionError, match=message):
        tagger(targets, trained_modules=modules)


def test_arguments_may_be_static_and_nested():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, batch, double, *, flip=False):
            h = nn.Dense(4, name="proj")(batch["x"])
            return (2 * h if double else h)[..., ::-1] if flip else h

    x = {"x": jnp.ones((2, 3))}
    plan = resolve_sites(Switch(), LORA, "proj", x, True, flip=True)
    assert plan["proj"].site.in_features == 3
    model = Adapted(Switch(), adapter=LORA, targets=("proj",))
    variables = model.init(jax.random.key(0), x, True, flip=True)
    assert model.apply(variables, x, True, flip=True).shape == (2, 4)


def test_a_leaf_does_not_depend_on_what_else_is_adapted():
    params = Tagger().init(jax.random.key(0), jnp.zeros((2, 5), jnp.int32))["params"]
    alone, among = (init_leaves(jax.random.key(1), tagger(t), params).params for t in ("query", "all-linear"))
    jax.tree.map(np.testing.assert_array_equal, alone["body/layers/query"], among["body/layers/query"])
    a = alone["body/layers/query"]["a"]
    assert bool((a[0] != a[1]).any()), "each layer has its own draw"


def test_a_plan_is_hashable_and_joining_copies_no_base_leaf():
    plan = tagger("query")
    assert hash(plan) == hash(tagger("query"))
    params = Tagger().init(jax.random.key(0), jnp.zeros((2, 5), jnp.int32))["params"]
    joined = join(plan, params, init_leaves(jax.random.key(1), plan, params), {})
    assert all(a is b for a, b in zip(jax.tree.leaves(params), _without_adapters(joined), strict=True))


def _without_adapters(tree):
    flat = jax.tree.leaves_with_path(tree)
    return [leaf for path, leaf in flat if all(getattr(part, "key", "") != "adapter" for part in path)]


class NoBlock(nn.Module):
    @nn.compact
    def __call__(self, h):
        return nn.Dense(4, name="proj")(h)


def test_a_gate_needs_its_block():
    with pytest.raises(InjectionError, match="proj: no enclosing module matches"):
        resolve_sites(NoBlock(), MoR(scope="block"), "proj", example())
