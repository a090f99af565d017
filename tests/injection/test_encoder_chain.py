"""ResLoRA through the encoder: layers scanned, looped and recomputed, against an explicit loop in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import AdapterInputs, Leaves, ResLoRA
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.merging import merge
from mor_jax.models import Encoder, EncoderConfig
from tests.merging.models import random_leaves
from tests.oracles.numpy_reslora import changes

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS = 3
CONFIG = EncoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=LAYERS,
    num_heads=2,
    head="linear",
    labels=("no", "yes"),
)
IDS = np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32)
SEGMENTS = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
TARGETS = ("query", "pooler.dense", "output.dense")  # the pooler is a chain of one layer, outside of the layers
CHAINED = ("attention/self/query", "attention/output/dense", "output/dense")


def _made(method, config):
    model = Encoder(config)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    params = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(jax.random.key(3), v.shape), params)
    plan = resolve_sites(model, method, TARGETS, IDS)
    return model, params, random_leaves(jax.random.key(1), plan, params), plan


def _looped(params, leaves):
    """A scanned model's parameters and leaves as those of loop layers."""
    encoder = params["encoder"]["layer"]
    layers = {f"layer_{n}": jax.tree.map(lambda v, n=n: v[n], encoder) for n in range(LAYERS)}
    own = {}
    for path, value in leaves.params.items():
        if "/layer/" not in path:
            own[path] = value
            continue
        for n in range(LAYERS):
            own[path.replace("/layer/", f"/layer_{n}/")] = jax.tree.map(lambda v, n=n: v[n], value)
    return {**params, "encoder": layers}, Leaves(own)


def _logits(model, plan, params, adapters, **kwargs):
    variables = {"params": params, "adapters": adapters}
    inputs = AdapterInputs(segment_ids=SEGMENTS)
    return Adapted(base=model, plan=plan).apply(
        variables, IDS, None, SEGMENTS, output="logits", adapter_inputs=inputs, **kwargs
    )


@pytest.mark.parametrize(
    "options", [{"form": "input"}, {"form": "block"}, {"form": "middle", "previous": -1}], ids=lambda o: o["form"]
)
def test_loop_equals_the_oracle_and_the_scan_equals_the_loop(options):
    method = ResLoRA(rank=2, **options)
    scanned, params, leaves, plan = _made(method, CONFIG)
    loop = Encoder(dataclasses.replace(CONFIG, scan_layers=False))
    loop_params, loop_leaves = _looped(params, leaves)
    loop_plan = resolve_sites(loop, method, TARGETS, IDS)
    assert loop_plan.num_params() == plan.num_params()

    @jax.jit
    def run(adapters):
        visits = {}
        capture = lambda path, x, delta: visits.setdefault(path, (x, delta))  # noqa: E731
        return _logits(loop, loop_plan, loop_params, adapters, capture=capture), visits

    logits, visits = run(loop_leaves.params)
    given = {"alpha": method.alpha, "rank": 2, "form": method.form, "previous": method.previous}
    for chain in ([f"encoder/layer_{n}/{name}" for n in range(LAYERS)] for name in CHAINED):
        inputs = [np.asarray(visits[path][0]).reshape(12, -1) for path in chain]
        factors = [[loop_leaves.params[path][leaf] for path in chain] for leaf in ("a", "b")]
        for path, delta in zip(chain, changes(*factors, inputs, given), strict=True):
            found = np.asarray(visits[path][1]).reshape(12, -1)
            np.testing.assert_allclose(found, delta, rtol=0, atol=2e-5 * np.abs(delta).max())
    remat = Encoder(dataclasses.replace(CONFIG, remat="full"))
    again, gradient = jax.jit(
        lambda adapters: (
            _logits(scanned, plan, params, adapters),
            jax.grad(lambda a: jnp.sum(jnp.sin(_logits(remat, plan, params, a))))(adapters),
        )
    )(leaves.params)
    np.testing.assert_allclose(again, logits, rtol=0, atol=2e-5 * float(jnp.abs(logits).max()))
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(gradient))
    if method.merges_exactly:
        plain = jax.jit(lambda p: scanned.apply({"params": p}, IDS, None, SEGMENTS))(merge(params, leaves, plan))
        np.testing.assert_allclose(plain, logits, rtol=0, atol=5e-5 * float(jnp.abs(logits).max()))


def test_the_encoder_passes_on_what_it_does_not_know():
    model = Encoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    plain, carried = jax.jit(
        lambda: tuple(model.apply({"params": params}, IDS, carry_extra=extra) for extra in (None, {"x": jnp.ones(3)}))
    )()
    np.testing.assert_array_equal(plain, carried)
