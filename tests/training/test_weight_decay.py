"""Which leaves weight decay reaches: what each method says of its own, and of modules trained whole its matrices."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny

from mor_jax.adapters import METHODS, LoRA, MoR, make_adapter
from mor_jax.injection import init_leaves, resolve_sites
from mor_jax.training.config import ConfigError, TrainConfig
from mor_jax.training.optimizer import make_optimizer, plan_decay_mask

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOOP = dataclasses.replace(tiny.CONFIG, scan_layers=False)
# Of AdamW's usual practice: factors and routers, whose 0 changes nothing; no vector, no scale that is neutral at 1.
FACTORS = {"a", "b"}
DECAYED = {name: FACTORS for name in METHODS} | {"mor": FACTORS | {"router"}, "mora": {"m"}, "vera": set()}
SPARED = {"mor": {"lam_a", "lam_b"}, "dora": {"m"}, "vera": {"d", "lam_b"}, "adalora": {"e"}, "beamlora": {"gamma"}}
NORMS = ("input_layernorm", "norm")


def _flat(tree):
    pairs = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _looped(tree):
    """{path: leaf} of a scanned decoder's trained leaves, each row under the name that a loop has for it."""
    flat = {}
    for path, leaf in _flat(tree).items():
        rows = enumerate(leaf) if path.startswith("layers/") else [(None, leaf)]
        flat |= {path if n is None else path.replace("layers", f"layers_{n}", 1): row for n, row in rows}
    return flat


@pytest.mark.parametrize("config", [tiny.CONFIG, LOOP], ids=["scanned", "looped"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_says_which_of_its_leaves_decay(name, config):
    plan = tiny.adapted_decoder(name, config, targets=("o_proj",), rank=2).plan
    leaves = jax.eval_shape(lambda p: init_leaves(jax.random.key(0), plan, p), tiny.params_of(config))
    for own in plan_decay_mask(plan)(leaves.params).values():
        assert {leaf for leaf, decays in own.items() if decays} == DECAYED[name]
        assert {leaf for leaf, decays in own.items() if not decays} == SPARED.get(name, set())


def test_a_router_of_a_block_decays_and_its_sites_lam_does_not():
    plan = tiny.adapted_decoder("mor", rank=2, scope="block").plan
    leaves = jax.eval_shape(lambda p: init_leaves(jax.random.key(0), plan, p), tiny.params_of())
    mask = plan_decay_mask(plan)(leaves.params)
    assert mask["layers"] == {"router": True}
    assert mask["layers/mlp/up_proj"] == {"a": True, "b": True, "lam_a": False, "lam_b": False}


class Layer(nn.Module):
    """Kernels, biases and scales of one, two and three axes."""

    @nn.compact
    def __call__(self, h, _=None):
        h = nn.LayerNorm(name="norm")(h)
        h = nn.LayerNorm(name="wide", reduction_axes=(-2, -1), feature_axes=(-2, -1))(h)
        h = nn.DenseGeneral((2, 4), name="heads")(h)
        h = nn.DenseGeneral(8, axis=(-2, -1), name="out")(h)
        gain = self.param("gain", nn.initializers.ones, (8,))
        return nn.Dense(8, name="proj")(h * gain), None


class Layers(nn.Module):
    scan_axis: int | None = 0

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(16, 8, name="embed")(ids)
        if self.scan_axis is None:
            for i in range(3):
                h, _ = Layer(name=f"layers_{i}")(h)
        else:
            options = {"variable_axes": {"params": self.scan_axis}, "split_rngs": {"params": True}, "length": 3}
            h, _ = nn.scan(Layer, **options)(name="layers")(h, None)
        return nn.Dense(5, name="head")(h)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_of_a_trained_module_kernels_and_embeddings_decay_wherever_its_layers_are_stacked(axis):
    ids = jnp.zeros((2, 4), jnp.int32)
    modules = ("norm", "wide", "heads", "out", "embed", "head")
    plan = resolve_sites(Layers(axis), LoRA(rank=2), ("proj",), ids, trained_modules=modules)
    params = jax.eval_shape(Layers(axis).init, jax.random.key(0), ids)["params"]
    mask = plan_decay_mask(plan)(jax.eval_shape(lambda p: init_leaves(jax.random.key(0), plan, p), params).params)
    decayed = {path.removeprefix("layers/").removeprefix("layers_1/") for path, on in _flat(mask).items() if on}
    decayed = {path for path in decayed if not path.startswith("layers_")}
    assert decayed == {"proj/a", "proj/b", "heads/kernel", "out/kernel", "embed/embedding", "head/kernel"}


def test_a_vector_of_a_trained_layer_of_a_scan_is_a_vector():
    """Named by nobody: only its axes in one layer tell."""
    ids = jnp.zeros((2, 4), jnp.int32)
    plan = resolve_sites(Layers(), LoRA(rank=2), ("head",), ids, trained_modules=("layers",))
    params = jax.eval_shape(Layers().init, jax.random.key(0), ids)["params"]
    mask = plan_decay_mask(plan)(jax.eval_shape(lambda p: init_leaves(jax.random.key(0), plan, p), params).params)
    assert {path for path, on in _flat(mask["layers"]).items() if on} == {
        f"{m}/kernel" for m in ("heads", "out", "proj")
    }
    assert "gain" in mask["layers"]


def _trained(config, start=None):
    """Adapters at the start and after 20 steps of AdamW with decay, norms trained; from ``start``, {path: leaf}."""
    fields = {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.5}
    adapted = tiny.adapted_decoder("mor", config, NORMS, rank=2, num_experts=3)
    optimizer = make_optimizer(TrainConfig(**fields), None, plan_decay_mask(adapted.plan))
    step, state, params = tiny.setup(adapted, optimizer, config=config)
    state = tiny.nudge(state)
    if start is not None:
        where = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
        placed = lambda path, leaf: jax.device_put(start[where(path)].reshape(leaf.shape), leaf.sharding)  # noqa: E731
        state = state._replace(adapters=jax.tree.map_with_path(placed, state.adapters))
        rows = lambda tree, n: jax.tree.map(lambda leaf: leaf[n], tree)  # noqa: E731
        scanned = tiny.params_of()
        params = {k: v for k, v in scanned.items() if k != "layers"}
        params |= {f"layers_{n}": rows(scanned["layers"], n) for n in range(config.num_layers)}
    first = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state.adapters)
    for number in range(20):
        state, _ = step(state, params, tiny.random_batch(seed=number))
    return first, jax.tree.map(np.asarray, state.adapters)


def test_scanned_and_looped_layers_train_to_the_same_with_norms_and_decay():
    first, scanned = _trained(tiny.CONFIG)
    _, looped = _trained(LOOP, _looped(first))
    looped = {path: leaf for path, leaf in _flat(looped).items()}
    for path, leaf in _looped(scanned).items():
        np.testing.assert_allclose(looped[path].reshape(leaf.shape), leaf, rtol=0, atol=1e-6, err_msg=path)
    assert any("layernorm" in path for path in looped)


NAMES = [
    name
    for name in sorted(dir(optax))
    if inspect.isfunction(getattr(optax, name))
    and not name.startswith(("_", "scale_by"))
    and "learning_rate" in inspect.signature(getattr(optax, name)).parameters
    and name not in ("noisy_sgd", "optimistic_adam", "lbfgs", "polyak_sgd", "rprop", "sm3")
]


@pytest.mark.parametrize("name", NAMES)
def test_no_optimizer_decays_what_is_neutral_elsewhere(name):
    """MoR's lam and a norm's scale move with decay as they do without; factors and kernels do not."""
    plan = tiny.adapted_decoder("mor", trained_modules=NORMS, targets=("o_proj",), rank=2).plan
    params = init_leaves(jax.random.key(0), plan, tiny.params_of()).params
    gradient = jax.tree.map(lambda leaf: 0.01 * jnp.ones_like(leaf), params)

    def updates(decay):
        config = TrainConfig(optimizer=name, schedule="constant", weight_decay=decay, clip_norm=0.0)
        optimizer = make_optimizer(config, None, plan_decay_mask(plan))
        return _flat(jax.jit(lambda: optimizer.update(gradient, optimizer.init(params), params)[0])())

    plain, decayed = updates(0.0), updates(0.3)
    for path in plain:
        if path.endswith(("lam_a", "lam_b", "scale")):
            np.testing.assert_allclose(decayed[path], plain[path], rtol=1e-6, err_msg=path)
    if name not in ("sign_sgd", "signum"):  # which drop the size of what they get
        factor = "layers/self_attn/o_proj/a"
        assert float(jnp.abs(decayed[factor] - plain[factor]).max()) > 0


def test_adafactor_decays_by_the_learning_rate_as_adamw_does():
    plan = tiny.adapted_decoder("mor", targets=("o_proj",), rank=2).plan
    params = init_leaves(jax.random.key(0), plan, tiny.params_of()).params
    zero = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "lion", "adafactor"):
        config = TrainConfig(optimizer=name, learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=0.0)
        optimizer = make_optimizer(config, None, plan_decay_mask(plan))
        own, start = (
            tree["layers/self_attn/o_proj"]
            for tree in (optimizer.update(zero, optimizer.init(params), params)[0], params)
        )
        np.testing.assert_allclose(own["a"], -0.05 * start["a"], rtol=1e-5, err_msg=name)
        assert not np.any(own["lam_a"])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("adafactor", "weight_decay_rate"),
        ("lars", "weight_decay"),
        ("adadelta", "weight_decay"),
        ("adamw", "weight_decay"),
    ],
)
def test_decay_given_as_an_option_of_the_optimizer_is_masked_too(name, option):
    plan = tiny.adapted_decoder("mor", targets=("o_proj",), rank=2).plan
    params = init_leaves(jax.random.key(0), plan, tiny.params_of()).params
    zero = jax.tree.map(jnp.zeros_like, params)
    config = TrainConfig(optimizer=name, optimizer_options={option: 0.5}, schedule="constant", clip_norm=0.0)
    optimizer = make_optimizer(config, None, plan_decay_mask(plan))
    own = optimizer.update(zero, optimizer.init(params), params)[0]["layers/self_attn/o_proj"]
    assert not np.any(own["lam_a"])
    assert np.any(own["a"])


def test_decay_that_an_optimizer_cannot_be_kept_from_is_refused():
    config = TrainConfig(optimizer="novograd", optimizer_options={"weight_decay": 0.1})
    with pytest.raises(
        ConfigError, match="optimizer_options: novograd's weight_decay reaches every leaf: set weight_decay"
    ):
        make_optimizer(config)


def test_lam_stays_where_it_is_under_decay_alone():
    """At decay 0.1 and rate 1e-2 a leaf that decays has lost a quarter after 300 steps."""
    plan = tiny.adapted_decoder("mor", targets=("o_proj",), rank=2).plan
    params = init_leaves(jax.random.key(0), plan, tiny.params_of()).params
    config = TrainConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1)
    optimizer = make_optimizer(config, None, plan_decay_mask(plan))
    zero = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def run(params):
        one = lambda _, kept: (optax.apply_updates(kept[0], (u := optimizer.update(zero, kept[1], kept[0]))[0]), u[1])  # noqa: E731
        return jax.lax.fori_loop(0, 300, one, (params, optimizer.init(params)))[0]

    after, start = run(params)["layers/self_attn/o_proj"], params["layers/self_attn/o_proj"]
    np.testing.assert_array_equal(after["lam_a"], 1)
    np.testing.assert_array_equal(after["lam_b"], 1)
    np.testing.assert_allclose(after["a"], start["a"] * (1 - 1e-3) ** 300, rtol=1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undecayed(LoRA):
    """A user's own method that wants no decay of a."""

    def decays(self, leaf, ndim):
        return leaf != "a" and super().decays(leaf, ndim)


def test_a_method_of_one_s_own_declares_its_own_leaves():
    ids = jnp.zeros((2, 4), jnp.int32)
    plan = resolve_sites(Layers(), Undecayed(rank=2), ("proj",), ids)
    params = jax.eval_shape(Layers().init, jax.random.key(0), ids)["params"]
    leaves = jax.eval_shape(lambda p: init_leaves(jax.random.key(0), plan, p), params)
    assert plan_decay_mask(plan)(leaves.params) == {"layers/proj": {"a": False, "b": True}}
    assert make_adapter("lora").decays("a", 2)
    assert not MoR().decays("lam_a", 2)
