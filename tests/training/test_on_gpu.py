"""What must be right on a GPU: attention, and bfloat16 training that compiles once and leaves the base alone.

Skipped where jax has no GPU; there, `JAX_PLATFORMS=cuda python -m pytest -m gpu` runs these alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.adapters import LoRA, MoR
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, head_kernel
from mor_jax.models.attention import attend
from mor_jax.training.step import init_state, language_model_loss, make_step

pytestmark = pytest.mark.gpu

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 256, 8, 2, 64


def packed_ids():
    """Segments of unequal lengths and padding behind them, (B, S) each."""
    segments = np.repeat(np.array([[1, 2, 3, 0], [1, 2, 2, 0]]), [100, 60, 64, 32], axis=1)
    positions = np.zeros_like(segments)
    for row in range(ROWS):
        for segment in (1, 2, 3):
            own = segments[row] == segment
            positions[row, own] = np.arange(own.sum())
    return segments.astype(np.int32), positions.astype(np.int32)


def attention_by_loops(query, key, value, mask):
    """Row by row and head by head in float64."""
    out = np.zeros(query.shape, np.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            own = head // (query.shape[2] // key.shape[2])
            scores = query[row, :, head] @ key[row, :, own].T / np.sqrt(query.shape[3])
            scores = np.where(mask[row], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row, :, head] = weights / weights.sum(axis=1, keepdims=True) @ value[row, :, own]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_attention_equals_loops_on_packed_rows(dtype, tolerance):
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    segments, _ = packed_ids()
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(LENGTH, dtype=bool)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(attend)(*arrays, jnp.asarray(mask))
    expected = attention_by_loops(*(np.asarray(array, np.float64) for array in arrays), mask)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance, rtol=tolerance)


def small_decoder(**options):
    """Two bfloat16 layers."""
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "num_heads": 4}
    config = DecoderConfig(**sizes, num_kv_heads=2, dtype="bfloat16", param_dtype="bfloat16", **options)
    decoder = Decoder(config)
    return config, decoder, jax.jit(decoder.init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]


def gradients(decoder, params, ids, segments, positions, read):
    """(hidden states, gradient of their masked sum of squares for the embedding), float32."""

    def total(embedding):
        variables = {"params": params | {"embed_tokens": {"embedding": embedding}}}
        hidden = decoder.apply(variables, ids, positions, segments, output="hidden").astype(jnp.float32)
        return jnp.sum(jnp.where(read[..., None], hidden * hidden * jnp.arange(hidden.shape[-1]) / 256, 0)), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params["embed_tokens"]["embedding"])
    return np.asarray(hidden, np.float32), np.asarray(gradient, np.float32)


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_packed_segments_equal_each_alone(implementation):
    """Hidden states and gradients of packed rows are those of their segments in rows of their own."""
    _, decoder, params = small_decoder(attention_block=64, attention_implementation=implementation)
    segments, positions = packed_ids()
    ids = np.random.default_rng(2).integers(1, 256, segments.shape).astype(np.int32)
    packed, packed_gradient = gradients(decoder, params, ids, segments, positions, segments > 0)
    gradient = 0.0
    for row in range(ROWS):
        for segment in range(1, segments[row].max() + 1):
            own = np.flatnonzero(segments[row] == segment)
            alone = [np.zeros((1, LENGTH), np.int32) for _ in range(3)]
            for array, values in zip(alone, (ids[row, own], np.ones_like(own), np.arange(own.size)), strict=True):
                array[0, : own.size] = values
            hidden, part = gradients(decoder, params, *alone, alone[1] > 0)
            np.testing.assert_allclose(hidden[0, : own.size], packed[row, own], atol=0.05, rtol=0.02)
            gradient = gradient + part
    np.testing.assert_allclose(gradient, packed_gradient, atol=0.02 * np.abs(gradient).max())


@pytest.mark.parametrize("adapter", [LoRA(rank=8), MoR(rank=4, num_experts=4)], ids=["lora", "mor"])
def test_training_in_bfloat16(adapter):
    """The loss falls, the base stays, the program is compiled once, and no step holds more memory than another."""
    config, decoder, params = small_decoder(remat="dots")
    tokens = np.random.default_rng(1).integers(1, 256, (4, 129), dtype=np.int32)
    whole = np.ones((4, 128), np.int32)
    batch = {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": whole, "segment_ids": whole}
    batch |= {"positions": np.arange(128, dtype=np.int32) * whole, "task_ids": 0 * whole, "prompt_mask": 0 * whole}
    batch = jax.tree.map(jnp.asarray, batch)
    before = jax.device_get(params)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    plan = resolve_sites(decoder, adapter, linears, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    adapted = Adapted(base=decoder, plan=plan)
    optimizer = optax.adamw(1e-2)
    state, constants, _ = init_state(jax.random.key(1), adapted, params, optimizer)
    loss = language_model_loss(adapted, lambda params: head_kernel(params, config), chunk=128)
    step = make_step(adapted, optimizer, loss=loss, accumulate=2, constants=constants)
    losses, in_use = [], []
    for _ in range(30):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
        assert int(metrics["bad_leaf"]) == -1
        in_use.append((jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use"))
    assert losses[0] == pytest.approx(np.log(256), rel=0.05)
    assert losses[-1] < 0.8 * losses[0]
    assert step.cache_size() == 1
    assert len(set(in_use[2:])) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.adapters)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))
