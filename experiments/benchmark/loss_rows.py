"""Row C7: the chunked cross-entropy against the naive one in a whole LoRA step with a vocabulary of 131,072."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from programs import Shape, adapter_step, make_batch, make_params, time_ratio, whole_logits_loss

from mor_jax.adapters import LoRA
from mor_jax.training.step import language_model_loss

LARGE_VOCABULARY = 131_072


def chunked_loss(shape: Shape, rounds: int, vocabulary: int = LARGE_VOCABULARY) -> Iterator[dict[str, Any]]:
    """C7: time, temporary memory, and the relative difference of the adapters' gradients; chunks of a quarter batch.

    The gradients are AdamW's first moments after one step from nonzero factors.
    """
    shape = shape.with_model(vocab_size=vocabulary, tie_word_embeddings=True)
    params, batch = make_params(shape), make_batch(shape)
    chunk = shape.rows * shape.length // 4
    losses = {"chunked": partial(language_model_loss, chunk=chunk), "naive": whole_logits_loss}
    programs, gradients = {}, {}
    for name, make_loss in losses.items():
        step = adapter_step(LoRA(rank=16), shape.model, params, batch, make_loss)
        programs[name] = step.compile(name)
        programs[name].state = step.state._replace(adapters=jax.tree.map(lambda leaf: leaf + 0.01, step.state.adapters))
        programs[name].run()
        # (1 - b1) times the gradient; a copy, because the next step donates it
        gradients[name] = jax.tree.map(jnp.copy, programs[name].state.opt_state[0].mu)
    error = _relative_difference(gradients["chunked"], gradients["naive"])
    what = f"chunked ÷ naive cross-entropy, LoRA r16 step, V {vocabulary:,}"
    note = f"chunks of {chunk} of {shape.rows * shape.length} tokens"
    found = time_ratio(programs["chunked"].run, programs["naive"].run, rounds)
    yield {"id": "C7", "what": f"{what}: time", "must": "<= 1.02", **found, "note": note}
    memory = {name: program.temporary_bytes for name, program in programs.items()}
    note = f"{memory['chunked'] / 2**20:,.0f} of {memory['naive'] / 2**20:,.0f} MiB"
    figure = memory["chunked"] / memory["naive"]
    yield {"id": "C7", "what": f"{what}: temporary memory", "must": "<= 0.45", "figure": figure, "note": note}
    note = "largest difference of a leaf ÷ its largest entry"
    yield {"id": "C7", "what": f"{what}: gradients", "must": "<= 0.00001", "figure": error, "note": note}


def _relative_difference(first: Any, second: Any) -> float:
    def difference(a, b):
        return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))

    return float(max(jax.tree.leaves(jax.tree.map(difference, first, second))))
