"""Each number that a method trains has a gradient, whatever the sizes: what has none is not trained, and not counted.

Walks the registry on a small model of blocks with one map up and one down, so that every pair of sizes is met both ways
round. The sizes divide by nothing; ranks go from 1 to more than either side of a map.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

from mor_jax.adapters import METHODS, AdapterInputs
from mor_jax.injection import Adapted, init_leaves, resolve_sites

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 3
TOKENS = (4, 9)


class Block(nn.Module):
    width: int
    inner: int

    @nn.compact
    def __call__(self, carried, _=None):
        h, extra = carried
        inner = jnp.sin(nn.Dense(self.inner, dtype=h.dtype, name="up")(h))
        return (h + nn.Dense(self.width, dtype=h.dtype, name="down")(inner), extra), None


class Blocks(nn.Module):
    """(..., width) -> (..., width); what ResLoRA hands on goes through the layers beside it."""

    width: int
    inner: int
    depth: int

    @nn.compact
    def __call__(self, h, carry_extra=None):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        blocks = nn.scan(Block, length=self.depth, **axes)(self.width, self.inner, name="layers")
        return blocks((h, carry_extra), None)[0][0]


# (width, inner, depth, rank)
SHAPES = {"several layers": (5, 13, 3, 3), "one layer, rank 1": (7, 4, 1, 1), "rank above both": (2, 6, 2, 7)}
CASES = [(name, options) for name in METHODS for options in one_layer.oracle(name).VARIANTS]


def _random(tree, generator, scale):
    """Float64 for every array or shape of a tree; whole numbers become 0. Drawn by NumPy: nothing is compiled."""

    def draw(leaf):
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        return np.zeros(leaf.shape, leaf.dtype) if whole else scale * generator.standard_normal(leaf.shape)

    return jax.tree.map(draw, tree)


def _plan(adapter, width, inner, depth):
    model, x = Blocks(width, inner, depth), jax.ShapeDtypeStruct((*TOKENS, width), jnp.float64)
    return Adapted(model, resolve_sites(model, adapter, ("up", "down"), x)), x


def _reached(adapted, shape):
    """{site: {leaf: bool array}}: the entries whose gradient was not 0 in one of three steps of regression.

    In float64, from leaves that are away from their start. A gradient that is not finite counts as none.
    """
    generator, key = np.random.default_rng(0), jax.random.key(0)
    x, target = (generator.standard_normal(shape.shape) for _ in range(2))
    params = _random(jax.eval_shape(adapted.base.init, key, shape)["params"], generator, 0.5)
    leaves = jax.eval_shape(lambda params: init_leaves(key, adapted.plan, params), params)
    trained, constants = (_random(tree, generator, 0.5) for tree in (leaves.params, leaves.constants))
    state = jax.jit(lambda params: init_leaves(key, adapted.plan, params).state)(params) if leaves.state else {}

    drawn = max(site.adapter.largest_drawn_rank for site in adapted.plan.sites)  # all ranks, where a step draws one
    inputs = AdapterInputs(rank=np.int32(drawn) if drawn else None)

    @jax.jit
    def gradient(trained):
        def loss(trained):
            variables = {"params": params, "adapters": trained, "adapter_state": state, "adapter_constants": constants}
            return jnp.mean(jnp.square(adapted.apply(variables, x, adapter_inputs=inputs) - target))

        return jax.grad(loss)(trained)

    found = jax.tree.map(lambda v: np.zeros(v.shape, bool), trained)
    for _ in range(STEPS):
        step = jax.tree.map(np.asarray, gradient(trained))
        trained = jax.tree.map(lambda v, d: v - 1e-3 * d, trained, step)
        found = jax.tree.map(lambda seen, d: seen | (d != 0) & np.isfinite(d), found, step)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values())) or 'default'}" for n, o in CASES]
)
def test_each_trained_entry_has_a_gradient_within_three_steps(name, options, shape):
    width, inner, depth, rank = SHAPES[shape]
    width, inner = one_layer.fitting(name, width, inner)
    adapter = one_layer.small(name, options, rank=rank)
    with jax.enable_x64(True):
        adapted, x = _plan(adapter, width, inner, depth)
        found = _reached(adapted, x)
    assert adapted.plan is not None
    counts = {path: {leaf: (int(v.sum()), v.size) for leaf, v in own.items()} for path, own in found.items()}
    padded = sum(s.adapter.padded_params(s.site) - s.adapter.num_params(s.site) for s in adapted.plan.sites)
    assert sum(one for own in counts.values() for one, _ in own.values()) == adapted.plan.num_params(), counts
    assert sum(size for own in counts.values() for _, size in own.values()) == adapted.plan.num_params() + padded
