"""What a decoder writes after prompts, as lists of ids."""

import jax.numpy as jnp

from mor_jax.evaluation import left_padded
from mor_jax.models import CachedForward, generate, init_cache


def continue_prompts(model, config, variables, prompts, **options):
    """The continuation of each prompt, its end token last; `options` are `max_new_tokens` and others of `generate`."""
    length = max(map(len, prompts))
    ids, mask = map(jnp.asarray, left_padded(prompts, len(prompts), length))
    cache = init_cache(config, len(prompts), length + options["max_new_tokens"])
    tokens = generate(CachedForward(model), variables, cache, ids, mask, **options).tolist()
    ends = set(options.get("eos_ids", ()))
    stops = [next((place for place, token in enumerate(row, 1) if token in ends), len(row)) for row in tokens]
    return [row[:stop] for row, stop in zip(tokens, stops, strict=True)]
