"""A tiny adapted decoder with random batches, for the tests of this room."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mor_jax.adapters.registry import make_adapter
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, head_kernel
from mor_jax.optim import plan_rules
from mor_jax.training.losses import cross_entropy
from mor_jax.training.step import init_state, language_model_loss, make_step

# Weights of about 1 / sqrt(width): with 0.02 the residual stream is so small that its norm turns rounding into 1e-5.
CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    initializer_range=0.25,
)
TARGETS = ("o_proj", "up_proj")  # few, since most of a test's time is compiling; both kinds of block


@functools.cache
def params_of(config=CONFIG):
    return Decoder(config).init(jax.random.key(7), jnp.ones((1, 4), jnp.int32))["params"]


def adapted_decoder(method="mor", config=CONFIG, trained_modules=(), targets=TARGETS, **options):
    adapter = make_adapter(method, **options)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plan = resolve_sites(Decoder(config), adapter, targets, ids, trained_modules=trained_modules)
    return Adapted(base=Decoder(config), plan=plan)


def decoder_loss(adapted, config=CONFIG, chunk=16):
    return language_model_loss(adapted, lambda params: head_kernel(params, config), chunk)


def setup(adapted=None, optimizer=None, *, accumulate=1, num_tasks=2, mesh=None, specs=None, config=CONFIG):
    """(step, state, params)."""
    adapted = adapted or adapted_decoder(rank=2, num_experts=3)
    optimizer = optimizer or optax.adam(1e-2)
    rules = plan_rules(adapted.plan, total_steps=10)
    optimizer = rules.wrap(optimizer)
    params = params_of(config)
    if mesh is not None:
        from mor_jax.training.sharding import shardings_of

        params = jax.device_put(params, shardings_of(specs, mesh))
    state, constants, shardings = init_state(jax.random.key(0), adapted, params, optimizer, mesh, specs, rules)
    step = make_step(
        adapted,
        optimizer,
        loss=decoder_loss(adapted, config),
        accumulate=accumulate,
        num_tasks=num_tasks,
        constants=constants,
        shardings=shardings,
        adapters=state.adapters,
        rules=rules,
    )
    return step, state, params


def nudge(state, seed=1):
    """The state with every adapter leaf off its start: zeros would hide mistakes. One numpy draw for all layouts."""
    rng = np.random.default_rng(seed)

    def move(leaf):
        moved = np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
        return jax.device_put(moved, leaf.sharding)

    return state._replace(adapters=jax.tree.map(move, state.adapters))


def random_batch(batch_size=8, length=12, seed=0, vocab=37):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, batch_size)
    batch = {name: np.zeros((batch_size, length), np.int32) for name in FIELDS}
    for row, size in enumerate(lengths):
        fill(batch, row, 0, rng.integers(1, vocab, size), segment=1, task=row % 2, prompt=int(size) // 3)
    return batch


FIELDS = ("input_ids", "targets", "loss_mask", "segment_ids", "positions", "task_ids", "prompt_mask")


def fill(batch, row, start, tokens, segment, task=0, prompt=1):
    """Writes one example into a row from `start`."""
    size = len(tokens)
    here = slice(start, start + size)
    batch["input_ids"][row, here] = tokens
    batch["targets"][row, start : start + size - 1] = tokens[1:]
    batch["loss_mask"][row, start + max(prompt - 1, 0) : start + size - 1] = 1
    batch["segment_ids"][row, here] = segment
    batch["positions"][row, here] = np.arange(size)
    batch["task_ids"][row, here] = task
    batch["prompt_mask"][row, start : start + prompt] = 1


def packed_batch(rows=8, length=16, seed=0, vocab=37):
    """Two examples a row, their border never at the middle, the second up to the row's end or nearly so."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((rows, length), np.int32) for name in FIELDS}
    for row in range(rows):
        first = int(rng.integers(3, length // 2))
        second = length - first - row % 2
        fill(batch, row, 0, rng.integers(1, vocab, first), segment=1, task=row % 2, prompt=first // 2)
        fill(batch, row, first, rng.integers(1, vocab, second), segment=2, task=1 - row % 2, prompt=second // 3)
    return batch


def naive_loss(adapted, params, adapters, batch):
    """Mean over whole logits by autodiff: no chunks, no micro-batches, no prepare outside."""
    from mor_jax.adapters import AdapterInputs

    inputs = AdapterInputs(
        **{n: jnp.asarray(batch[n]) for n in ("segment_ids", "prompt_mask", "task_ids", "positions")}
    )
    variables = {"params": params, "adapters": adapters, "adapter_state": {}, "adapter_constants": {}}
    logits = adapted.apply(
        variables, batch["input_ids"], batch["positions"], batch["segment_ids"], adapter_inputs=inputs
    )
    total, count = cross_entropy(logits, jnp.asarray(batch["targets"]), jnp.asarray(batch["loss_mask"]))
    return total / count


def same(first, second):
    """Whether two pytrees are equal bit by bit."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def close(first, second, atol):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0), first, second
    )
