"""Fused attention is plain attention, values and gradients: kernels that this machine lacks run by interpretation."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.models import DecoderConfig
from mor_jax.models import fused_attention as fused
from mor_jax.models.attention import Tokens, attend, default_positions, visible
from mor_jax.training.backend import for_backend
from mor_jax.training.config import ConfigError, TrainConfig
from mor_jax.training.mesh import make_mesh, replicated
from mor_jax.training.sharding import on_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 256, 2, 1, 8
SEGMENTS = np.repeat([1, 2, 3, 0], [90, 60, 86, 20])[None]  # borders within blocks, padding at the end
SEEN = (SEGMENTS > 0)[..., None, None]  # what padding attends to is nobody's concern
CONFIG = DecoderConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1)


def _inputs():
    keys, heads = jax.random.split(jax.random.key(0), 3), (HEADS, KV_HEADS, KV_HEADS)
    return tuple(jax.random.normal(key, (1, LENGTH, n, HEAD_DIM)) for key, n in zip(keys, heads, strict=True))


def _outcome(function, mesh=None):
    """(values, gradients of query, key and value) where tokens are no padding."""

    def total(*arrays):
        out = jnp.where(SEEN, function(*arrays, jnp.asarray(SEGMENTS)), 0)
        return jnp.sum(jnp.sin(out)), out

    run = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    arrays = _inputs() if mesh is None else jax.device_put(_inputs(), replicated(mesh))
    (_, out), gradients = jax.jit(on_mesh(run, mesh))(*arrays)
    return jax.device_get((out, *gradients))


def _plain(query, key, value, segment_ids, window, softcap):
    tokens = Tokens(default_positions(segment_ids), segment_ids)
    return attend(query, key, value, visible(tokens, tokens, window), 5.0, softcap)


def _assert_equal(function, window, softcap, mesh=None):
    expected = _outcome(functools.partial(_plain, window=window, softcap=softcap))
    for one, other in zip(_outcome(function, mesh), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, 2.0)])
def test_the_tpu_kernel_equals_plain_attention(window, softcap):
    options = {"window": window, "softcap": softcap, "scale": 5.0**-0.5, "interpret": True}
    _assert_equal(functools.partial(fused._splash, **options), window, softcap)


def test_the_tpu_kernel_on_a_mesh_equals_plain_attention():
    """Each device has half of the queries and all keys."""
    mesh = make_mesh("sequence=2", jax.devices()[:2])
    options = {"window": 40, "softcap": 2.0, "scale": 5.0**-0.5, "interpret": True}
    _assert_equal(functools.partial(fused._splash, **options), 40, 2.0, mesh)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_tpu_kernel_of_bfloat16_keeps_its_precision_in_any_context(dtype):
    """Its compiler refuses bfloat16 products of the highest precision ("Bad lhs type"), and takes those of float32."""
    arrays = [array.astype(dtype) for array in _inputs()]

    def total(*arrays):
        out = fused._splash(*arrays, jnp.asarray(SEGMENTS), window=None, softcap=None, scale=1.0, interpret=True)
        return jnp.sum(jnp.float32(out))

    gradient = jax.grad(total, argnums=(0, 1, 2))
    with jax.default_matmul_precision("highest"):
        text = str(jax.make_jaxpr(gradient)(*arrays))
        found = jax.jit(gradient)(*arrays)
    assert text.count("dot_general") >= 7
    assert ("HIGHEST" in text) == (dtype == jnp.float32)
    for one, other in zip(found, jax.jit(gradient)(*arrays), strict=True):
        np.testing.assert_allclose(jnp.float32(one), jnp.float32(other), atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_what_is_asked_of_cudnn_equals_plain_attention(window):
    options = {"window": window, "scale": 5.0**-0.5, "implementation": "xla"}
    _assert_equal(functools.partial(fused._cudnn, **options), window, None)


def test_the_window_of_a_scanned_layer_chooses_the_kernel():
    windows, largest = (8, None, 3, 8), jnp.iinfo(jnp.int32).max

    def attend(window):
        return jnp.asarray(-1 if window is None else window)

    choose = jax.jit(lambda window: fused._with_static_window(attend, windows, window))
    assert [int(choose(jnp.int32(window or largest))) for window in windows] == [8, -1, 3, 8]
    assert int(fused._with_static_window(attend, (8,), jnp.int32(8))) == 8
    assert int(fused._with_static_window(attend, windows, None)) == -1


def _chosen(asked, platform, sequence=1, length=256, dtype="bfloat16", **shape):
    devices = np.array([SimpleNamespace(platform=platform)])
    mesh = SimpleNamespace(devices=devices, shape={"sequence": sequence})
    config = TrainConfig(attention_implementation=asked, sequence_length=length, **shape.pop("run", {}))
    shape = dataclasses.replace(CONFIG, dtype=dtype, **shape)
    return for_backend(shape, config, mesh).attention_implementation


@pytest.mark.parametrize(
    ("platform", "options", "chosen"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"attention_softcap": 50.0, "sequence": 2}, "splash"),
        ("tpu", {"sequence": 4}, "xla"),
        ("tpu", {"length": 200}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"sequence": 2}, "xla"),
        ("gpu", {"attention_softcap": 50.0}, "xla"),
    ],
)
def test_each_device_has_its_kernel_where_that_can_run(platform, options, chosen):
    assert _chosen("auto", platform, **options) == chosen


@pytest.mark.parametrize(
    ("asked", "platform", "options", "said"),
    [
        ("splash", "cpu", {}, "'splash' does not run on cpu devices: choose auto"),
        ("splash", "tpu", {"length": 200}, "rows of 200 tokens are no multiple of 128: choose auto"),
        ("cudnn", "gpu", {"dtype": "float32"}, "bfloat16 or float16, not in float32: choose auto"),
        ("auto", "cpu", {"run": {"remat": "offload"}}, "cpu devices have no second memory: choose full"),
    ],
)
def test_what_can_not_run_is_said_in_one_sentence(asked, platform, options, said):
    with pytest.raises(ConfigError, match=said):
        _chosen(asked, platform, **options)
