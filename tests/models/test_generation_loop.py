"""The generation loop: cache against full forward, ends, sampling, one compilation, adapted models."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import make_adapter
from mor_jax.injection import Adapted, init_leaves, resolve_sites
from mor_jax.models import CachedForward, Decoder, DecoderConfig, continue_prompts, generate, init_cache
from mor_jax.models import generation as generation_file

CONFIG = DecoderConfig(
    vocab_size=41,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    sliding_window=4,
    sliding_layers=(True, False),
    initializer_range=0.5,
)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7], [6, 5, 3, 5]]


@pytest.fixture(scope="module")
def variables():
    return Decoder(CONFIG).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))


def greedy_by_full_forwards(model, variables, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        logits = model.apply(variables, jnp.asarray([ids], jnp.int32))
        ids.append(int(jnp.argmax(logits[0, -1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_cached_equals_full_forward(variables, scan_layers):
    config = replace(CONFIG, scan_layers=scan_layers)
    model = Decoder(config)
    if not scan_layers:
        stacked = variables["params"]["layers"]
        rows = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(CONFIG.num_layers)}
        variables = {"params": {**{k: v for k, v in variables["params"].items() if k != "layers"}, **rows}}
    found = continue_prompts(model, config, variables, PROMPTS, max_new_tokens=7)
    assert found == [greedy_by_full_forwards(model, variables, prompt, 7) for prompt in PROMPTS]


def test_a_prompt_may_enter_the_cache_in_pieces_and_packed(variables):
    ids = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4]], jnp.int32)
    whole = Decoder(CONFIG).apply(variables, ids, positions, segments)
    cache, parts = init_cache(CONFIG, 1, 10), []
    for piece in (slice(0, 5), slice(5, 6), slice(6, 8)):
        logits, changed = Decoder(CONFIG).apply(
            {**variables, "cache": cache},
            ids[:, piece],
            positions[:, piece],
            segments[:, piece],
            decode=True,
            mutable=["cache"],
        )
        cache = changed["cache"]
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    assert int(cache["index"]) == 8


def test_a_row_ends_with_its_own_end_token(variables):
    free = continue_prompts(Decoder(CONFIG), CONFIG, variables, PROMPTS, max_new_tokens=8)
    end = free[0][2]
    wanted = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in wanted}) > 1  # the rows do end at different steps
    assert continue_prompts(Decoder(CONFIG), CONFIG, variables, PROMPTS, max_new_tokens=8, eos_ids=(end,)) == wanted
    ids = jnp.asarray([PROMPTS[0]], jnp.int32)
    raw = generate(
        CachedForward(Decoder(CONFIG)),
        variables,
        init_cache(CONFIG, 1, 14),
        ids,
        jnp.ones_like(ids),
        max_new_tokens=8,
        eos_ids=(end,),
        pad_id=40,
    )
    assert raw[0].tolist() == wanted[0] + [40] * (8 - len(wanted[0]))


def test_nothing_compiles_twice(variables):
    options = {"max_new_tokens": 5, "top_p": 0.9}
    ask = lambda seed, t: continue_prompts(  # noqa: E731
        Decoder(CONFIG), CONFIG, variables, PROMPTS, temperature=t, key=jax.random.key(seed), **options
    )
    first = ask(0, 1.0)
    before = generation_file._generate._cache_size()
    assert ask(0, 1.0) == first
    assert any(ask(seed, 0.7 + seed) != first for seed in range(1, 4))
    assert generation_file._generate._cache_size() == before


def test_sampled_frequencies_are_those_of_the_nucleus():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: generation_file.sample(logits[None], key, 1.0, jnp.float32(0.75))[0])
    counts = np.bincount(draw(keys), minlength=4) / len(keys)
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.03)
    draw = jax.vmap(lambda key: generation_file.sample(logits[None], key, 0.5, jnp.float32(1.0))[0])
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(np.bincount(draw(keys), minlength=4) / 4000, squared / squared.sum(), atol=0.03)


@pytest.mark.oracle
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p):
    torch = pytest.importorskip("torch")
    from transformers import TopPLogitsWarper

    logits = np.random.default_rng(1).normal(0, 2, (16, 50)).astype(np.float32)
    theirs = TopPLogitsWarper(top_p=top_p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(np.asarray(generation_file.top_p_filter(jnp.asarray(logits), top_p)), theirs)


def test_an_adapted_model_generates(variables):
    model = Decoder(CONFIG)
    example = jnp.ones((1, 2), jnp.int32)
    plan = resolve_sites(model, make_adapter("mor", rank=2, num_experts=2), ("q_proj", "down_proj"), example)
    leaves = init_leaves(jax.random.key(1), plan, variables["params"])
    adapted = Adapted(base=model, plan=plan)
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    moved = jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), leaves.params)
    both = {**variables, "adapters": moved, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
    found = continue_prompts(adapted, CONFIG, both, PROMPTS, max_new_tokens=6)
    assert found == [greedy_by_full_forwards(adapted, both, prompt, 6) for prompt in PROMPTS]
    assert found != continue_prompts(model, CONFIG, variables, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 2, "temperature": 1.0}, "needs a key"),
        ({"max_new_tokens": 2, "top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_options_are_errors(variables, options, message):
    with pytest.raises(ValueError, match=message):
        continue_prompts(Decoder(CONFIG), CONFIG, variables, PROMPTS, **options)


def test_wrong_calls_are_errors(variables):
    with pytest.raises(ValueError, match="at least one token"):
        continue_prompts(Decoder(CONFIG), CONFIG, variables, [[1], []], max_new_tokens=2)
    with pytest.raises(ValueError, match="init_cache"):
        Decoder(CONFIG).apply(variables, jnp.ones((1, 2), jnp.int32), decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="output must be"):
        Decoder(CONFIG).apply(variables, jnp.ones((1, 2), jnp.int32), output="loss")
