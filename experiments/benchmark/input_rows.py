"""Rows about data and checkpoints.

Real packed batches against a constant one (C11), packed rows against padded ones (C12), saving every 50 steps against
not saving (C13).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from programs import Program, Shape, adapter_program, make_batch, make_params, time_ratio

from mor_jax.adapters import LoRA
from mor_jax.data import load_examples, load_tokenizer, make_iterator, make_plan, parse_sources
from mor_jax.training.checkpoint import Checkpoints

SAVE_EVERY = 50


def _read(data: tuple[str, ...], tokenizer: str, row_length: int) -> tuple[Any, int]:
    """The examples, over-long ones cut at a row, and the vocabulary that they need."""
    found = load_tokenizer(tokenizer)
    return load_examples(parse_sources(data), found, row_length), len(found)


def _program(shape: Shape, vocabulary: int, batch: dict[str, Any]) -> Program:
    shape = shape.with_model(vocab_size=vocabulary, tie_word_embeddings=True)
    return adapter_program("LoRA r16", LoRA(rank=16), shape.model, make_params(shape), batch)


def input_overlap(shape: Shape, rounds: int, data: tuple[str, ...], tokenizer: str) -> Iterator[dict[str, Any]]:
    """C11: taking a packed batch, moving it and a step on it ÷ a step on one of these batches, already there."""
    examples, vocabulary = _read(data, tokenizer, shape.length)
    plan = make_plan(examples, shape.length)
    batches = make_iterator(examples, plan, shape.rows)
    constant = {name: jnp.asarray(value) for name, value in next(batches).items()}
    program = _program(shape, vocabulary, constant)
    found = time_ratio(
        lambda: program.run_on(jax.device_put(dict(next(batches)))), lambda: program.run_on(constant), rounds
    )
    what = "LoRA r16 step on packed JSONL ÷ on a constant batch"
    note = f"{len(examples):,} examples, rows of {shape.length} tokens"
    yield {"id": "C11", "what": what, "must": "<= 1.05", **found, "note": note}


def packing(shape: Shape, rounds: int, data: tuple[str, ...], tokenizer: str, length: int) -> Iterator[dict[str, Any]]:
    """C12: useful tokens a second of packed rows ÷ of padded ones, and how full the packed rows are.

    The same examples, batches of as many tokens in rows of ``length``, as they come from the iterators; a program's CPU
    time does not depend on what is in a row, so its tokens are those of whole epochs.
    """
    examples, vocabulary = _read(data, tokenizer, length)
    plans = {mode: make_plan(examples, length, mode=mode) for mode in ("best_fit", "padded")}
    rows = max(1, shape.rows * shape.length // length)
    shape = shape.with_model(max_position_embeddings=length)
    packed, padded = (make_iterator(examples, plan, rows) for plan in plans.values())
    program = _program(shape, vocabulary, {name: jnp.asarray(value) for name, value in next(packed).items()})
    found = time_ratio(
        lambda: program.run_on(jax.device_put(dict(next(packed)))),
        lambda: program.run_on(jax.device_put(dict(next(padded)))),
        rounds,
    )
    fill = {mode: plan.efficiency() for mode, plan in plans.items()}
    gain = fill["best_fit"] / fill["padded"]
    note = f"{len(examples):,} examples of {examples.lengths.mean():.0f} tokens on average, rows of {length}"
    ratios = {"figure": gain / found["figure"], "low": gain / found["high"], "high": gain / found["low"]}
    what = "useful tokens a second, packed ÷ padded"
    yield {"id": "C12", "what": what, "must": ">= 2.5", **(found | ratios), "note": note}
    note = f"{fill['padded']:.3f} padded; {examples.truncated} cut"
    yield {"id": "C12", "what": "fill of packed rows", "must": ">= 0.95", "figure": fill["best_fit"], "note": note}


def saving(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """C13: CPU time of 50 steps and a save (its background work and manifest included) ÷ of 50 steps."""
    program = adapter_program("LoRA r16", LoRA(rank=16), shape.model, make_params(shape), make_batch(shape))
    steps, saves = [], []
    program.run()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch) / "checkpoints")
        for number in range(1, rounds + 2):
            start = time.process_time()
            program.run()
            between = time.process_time()
            items = {"adapters": program.state.adapters, "opt_state": program.state.opt_state}
            checkpoints.save(number, items, {})
            checkpoints.commit()
            steps.append(between - start)
            saves.append(time.process_time() - between)
    step, save = statistics.median(steps[1:]), statistics.median(saves[1:])  # the first save imports orbax
    note = f"step {1e3 * step:.0f} ms, save {1e3 * save:.0f} ms of CPU time"
    what = f"LoRA r16, a save every {SAVE_EVERY} steps ÷ none"
    yield {"id": "C13", "what": what, "must": "<= 1.03", "figure": 1 + save / (SAVE_EVERY * step), "note": note}
