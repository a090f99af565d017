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
from mor_jax.models.attention import Tokens, attend, attend_in_blocks, visible
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
@pytest.mark.parametrize("block", [0, 64])
def test_attention_equals_loops_on_packed_rows(dtype, tolerance, block):
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    segments, positions = packed_ids()
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(segments))
    mask = visible(tokens, tokens)

    def in_blocks(query, key, value):
        return attend_in_blocks(query, tokens, tokens, None, block, lambda some, mask: attend(some, key, value, mask))

    with jax.default_matmul_precision("highest"):
        found = jax.jit(in_blocks)(*arrays)
    read = segments > 0
    with np.errstate(invalid="ignore"):  # what padding attends to is nobody's
        expected = attention_by_loops(*(np.asarray(array, np.float64) for array in arrays), np.asarray(mask))
    np.testing.assert_allclose(np.asarray(found, np.float64)[read], expected[read], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("adapter", [LoRA(rank=8), MoR(rank=4, num_experts=4)], ids=["lora", "mor"])
def test_training_in_bfloat16(adapter):
    """The loss falls, the base stays, the program is compiled once, and no step holds more memory than another."""
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "num_heads": 4}
    config = DecoderConfig(**sizes, num_kv_heads=2, dtype="bfloat16", param_dtype="bfloat16", remat="dots")
    tokens = np.random.default_rng(1).integers(1, 256, (4, 129), dtype=np.int32)
    whole = np.ones((4, 128), np.int32)
    batch = {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": whole, "segment_ids": whole}
    batch |= {"positions": np.arange(128, dtype=np.int32) * whole, "task_ids": 0 * whole, "prompt_mask": 0 * whole}
    batch = jax.tree.map(jnp.asarray, batch)
    decoder = Decoder(config)
    params = jax.jit(decoder.init)(jax.random.key(0), batch["input_ids"])["params"]
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
