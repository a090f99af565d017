"""The generation loop: cache against full forward, ends, sampling, one compilation, adapted models."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import make_adapter
from mor_jax.injection import Adapted, init_leaves, resolve_sites
from mor_jax.models import (
    CachedForward,
    Decoder,
    DecoderConfig,
    abstract_params,
    generate,
    init_cache,
)
from mor_jax.models import generation as generation_file
from tests.models.continuations import continue_prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, abstract_params(CONFIG))}


@lru_cache
def full_forward(model):
    return jax.jit(model.apply)


def greedy_by_full_forwards(model, variables, prompts, steps):
    """Row by row the most likely next token of the whole text so far, without a cache; later tokens are unseen."""
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), max(lengths) + steps), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for step in range(steps):
        logits = np.asarray(full_forward(model)(variables, ids))
        ids[rows, lengths + step] = logits[rows, lengths + step - 1].argmax(axis=-1)
    return [row[n : n + steps].tolist() for row, n in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_cached_equals_full_forward(variables, scan_layers):
    config = replace(CONFIG, scan_layers=scan_layers)
    model = Decoder(config)
    if not scan_layers:
        stacked = variables["params"]["layers"]
        rows = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(CONFIG.num_layers)}
        variables = {"params": {**{k: v for k, v in variables["params"].items() if k != "layers"}, **rows}}
    found = continue_prompts(model, config, variables, PROMPTS, max_new_tokens=7)
    assert found == greedy_by_full_forwards(model, variables, PROMPTS, 7)


def test_a_prompt_may_enter_the_cache_in_pieces_and_packed(variables):
    ids = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4]], jnp.int32)
    whole = full_forward(Decoder(CONFIG))(variables, ids, positions, segments)
    cached = jax.jit(lambda *inputs: Decoder(CONFIG).apply(*inputs, decode=True, mutable=["cache"]))
    cache, parts = init_cache(CONFIG, 1, 10), []
    for piece in (slice(0, 4), slice(4, 8)):  # the first ends within the second segment
        inputs = ids[:, piece], positions[:, piece], segments[:, piece]
        logits, changed = cached({**variables, "cache": cache}, *inputs)
        cache = changed["cache"]
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    assert int(cache["index"]) == 8


def test_a_row_ends_with_its_own_end_token(variables):
    free = greedy_by_full_forwards(Decoder(CONFIG), variables, PROMPTS, 8)
    end = free[0][2]
    wanted = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in wanted}) > 1  # the rows do end at different steps
    assert continue_prompts(Decoder(CONFIG), CONFIG, variables, PROMPTS, max_new_tokens=8, eos_ids=(end,)) == wanted
    ids, mask = padded_left(PROMPTS)
    cache = init_cache(CONFIG, len(PROMPTS), ids.shape[1] + 8)
    options = {"max_new_tokens": 8, "eos_ids": (end,), "pad_id": 40}
    raw = generate(CachedForward(Decoder(CONFIG)), variables, cache, ids, mask, **options)
    assert raw.tolist() == [row + [40] * (8 - len(row)) for row in wanted]


def padded_left(prompts):
    length = max(map(len, prompts))
    ids = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32)


def nucleus(logits, temperature, top_p):
    """Closed form in float64: the distribution that is sampled from."""
    weights = np.exp((logits - logits.max()) / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights)
    kept = order[: np.searchsorted(np.cumsum(weights[order]), top_p) + 1]
    found = np.zeros_like(weights)
    found[kept] = weights[kept] / weights[kept].sum()
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.3, 1.0), (0.7, 0.8)])
def test_sampled_tokens_have_the_distribution_of_the_logits(variables, temperature, top_p):
    rows, prompt = 4000, PROMPTS[0]
    logits = full_forward(Decoder(CONFIG))(variables, jnp.asarray([prompt + [0, 0]], jnp.int32))
    wanted = nucleus(np.asarray(logits, np.float64)[0, len(prompt) - 1], temperature, top_p)
    ids, mask = padded_left([prompt] * rows)
    cache = init_cache(CONFIG, rows, len(prompt) + 1)
    options = {"max_new_tokens": 1, "temperature": temperature, "top_p": top_p, "key": jax.random.key(5)}
    drawn = np.asarray(generate(CachedForward(Decoder(CONFIG)), variables, cache, ids, mask, **options))[:, 0]
    counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
    assert not counts[wanted == 0].any()
    likely = wanted * rows >= 5
    assert likely.sum() > 2
    deviations = (counts - wanted * rows)[likely] / np.sqrt(rows * wanted * (1 - wanted))[likely]
    assert np.abs(deviations).max() < 4.5  # standard deviations of a binomial count
    assert np.abs(counts - rows * (wanted > 0) / (wanted > 0).sum()).max() > 0.05 * rows  # and it is far from uniform


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
    plan = resolve_sites(model, make_adapter("mor", rank=2, num_experts=2), ("q_proj",), example)
    leaves = init_leaves(jax.random.key(1), plan, variables["params"])
    adapted = Adapted(base=model, plan=plan)
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    moved = jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), leaves.params)
    both = {**variables, "adapters": moved, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
    found = continue_prompts(adapted, CONFIG, both, PROMPTS, max_new_tokens=7)
    assert found == greedy_by_full_forwards(adapted, both, PROMPTS, 7)
    assert found != greedy_by_full_forwards(model, variables, PROMPTS, 7)


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
    with pytest.raises(ValueError, match="init_cache"):
        Decoder(CONFIG).apply(variables, jnp.ones((1, 2), jnp.int32), decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="output must be"):
        Decoder(CONFIG).apply(variables, jnp.ones((1, 2), jnp.int32), output="loss")
