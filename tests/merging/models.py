"""Small linen models of shapes unlike the decoder's, and routed adapters whose deltas are far from zero."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.adapters import AdapterInputs, Leaves
from mor_jax.injection import init_leaves, resolve_sites

WIDTH, INNER, CLASSES, LAYERS = 12, 20, 7, 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _=None):
        u = nn.Dense(INNER, name="up")(h)
        return h + nn.Dense(WIDTH, name="down", use_bias=False)(jnp.tanh(u)), None


class Stack(nn.Module):
    """Token rows (B, S) -> logits (B, S, CLASSES); scanned over an axis, or a Python loop."""

    scan_axis: int | None = 0
    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(64, WIDTH, name="embed")(ids)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        if self.scan_axis is None:
            for i in range(LAYERS):
                h, _ = block(name=f"layers_{i}")(h)
        else:
            axes = {"params": self.scan_axis}
            h, _ = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=LAYERS)(name="layers")(
                h, None
            )
        return nn.Dense(CLASSES, name="head")(h)


def call(batch):
    """Batch -> (args, kwargs, adapter inputs) of ``Stack``."""
    marks = {k: jnp.asarray(batch[k]) for k in ("segment_ids", "task_ids") if k in batch}
    return (jnp.asarray(batch["input_ids"]),), {}, AdapterInputs(**marks, num_tasks=2)


def batches(count=3, seed=0, rows=4, length=16):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        task = rng.integers(0, 2, (rows, 1))
        made.append(
            {
                "input_ids": (rng.integers(0, 32, (rows, length)) + 32 * task).astype(np.int32),
                "segment_ids": (np.arange(length) < rng.integers(length // 2, length + 1, (rows, 1))).astype(np.int32),
                "task_ids": np.broadcast_to(task, (rows, length)).astype(np.int32),
            }
        )
    return made


def random_leaves(key, plan, params, scale=0.3):
    """Leaves with noise on every trained array, so that nothing is zero and gates are uneven."""
    leaves = init_leaves(key, plan, params)
    arrays, tree = jax.tree.flatten(leaves.params)
    keys = jax.random.split(key, len(arrays))
    noisy = [a + scale * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(arrays, keys, strict=True)]
    return leaves._replace(params=jax.tree.unflatten(tree, noisy))


def make(method, targets=("up", "down"), seed=0, scale=0.3, dtype=None, **options):
    """(model, params, leaves, plan)."""
    model = Stack(**options)
    ids = jnp.zeros((2, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), ids)["params"]
    if dtype is not None:
        params = jax.tree.map(lambda v: v.astype(dtype), params)
    plan = resolve_sites(model, method, targets, ids)
    return model, params, random_leaves(jax.random.key(seed + 1), plan, params, scale), plan


def unrolled(params, leaves):
    """A scanned stack's parameters and leaves (scan axis 0) as the loop's."""
    loop = {k: v for k, v in params.items() if k != "layers"}
    own = {k: v for k, v in leaves.params.items() if not k.startswith("layers")}
    for i in range(LAYERS):
        loop[f"layers_{i}"] = jax.tree.map(lambda v, i=i: v[i], params["layers"])
        for path, tree in leaves.params.items():
            if path.startswith("layers"):
                own[path.replace("layers", f"layers_{i}", 1)] = jax.tree.map(lambda v, i=i: v[i], tree)
    return loop, Leaves(own)
