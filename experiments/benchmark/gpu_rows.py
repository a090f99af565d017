"""How each row of the GPU table is measured; ``gpu_targets.py`` says what the figures are held against.

Every ratio of steps is of one micro-batch, every rate of a whole step with all its micro-batches.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_rig import (
    GIB,
    NotMeasuredError,
    Rig,
    about,
    memory_limit,
    memory_statistics,
    peak_flops,
)
from programs import Program, Shape, adapter_step, make_batch

from mor_jax.adapters import LoRA, MoR
from mor_jax.models import abstract_params

SEGMENTS = 16  # of a packed row


def _rate(rig: Rig, shape: Shape, reference: float) -> dict[str, Any]:
    """Tokens a second of a whole step ÷ the reference's, and the share of the peak at 4 N operations a token."""
    accumulate = rig.shapes.accumulate
    program = rig.lora(shape, accumulate)
    seconds, low, high, rounds = rig.seconds(program.run)
    tokens = shape.rows * shape.length * accumulate
    size, peak = sum(leaf.size for leaf in jax.tree.leaves(rig.params(shape.model))), peak_flops()
    mfu = None if peak is None else 4 * size * tokens / seconds / peak
    measured = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    notes = (
        f"{tokens / seconds:,.0f} tokens/s",
        "" if mfu is None else f"MFU {100 * mfu:.1f} % at 4 N, N = {size / 1e9:.2f}e9",
        f"peak {(measured or program.peak_bytes) / GIB:.1f} GiB" + ("" if measured else " by XLA's count"),
        f"{shape.rows} x {shape.length:,} tokens x {accumulate} micro-batches, {about(shape)}",
        f"{rounds} steps",
    )
    return {
        "figure": tokens / seconds / reference,
        "low": tokens / high / reference,
        "high": tokens / low / reference,
        "rounds": rounds,
        "tokens_per_second": tokens / seconds,
        "mfu": mfu,
        "peak_bytes": measured or program.peak_bytes,
        "note": ", ".join(note for note in notes if note),
    }


def throughput(rig: Rig) -> dict[str, Any]:
    """G1."""
    return _rate(rig, rig.fitted("main", rig.shapes.accumulate), 12_473)


def other_throughput(rig: Rig) -> dict[str, Any]:
    """G1b."""
    return _rate(rig, rig.fitted("other", rig.shapes.accumulate), 14_110)


def against_full(rig: Rig, remat: str) -> dict[str, Any]:
    """G2."""
    shape = rig.shape("small").with_model(remat=remat)
    lora, full = rig.lora(shape), rig.full(shape)
    found = rig.ratio(lora.run, full.run)
    return {**found, "note": f"{found['note']}; weights and moments of full in bfloat16; {about(shape)}"}


def against_floor(rig: Rig) -> dict[str, Any]:
    """G3."""
    shape = rig.fitted("main")
    found = rig.ratio(rig.lora(shape).run, rig.floor(shape).run)
    return {**found, "note": f"{found['note']}; {about(shape)}"}


def base_and_peak(rig: Rig) -> dict[str, Any]:
    """G4: in a process that has done nothing else, as the allocator's peak cannot be set back."""
    memory_statistics()
    shape = rig.shape("short").with_model(remat="full")
    program = rig.lora(shape)
    program.run()
    program.run()
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(rig.params(shape.model)))
    peak = memory_statistics()["peak_bytes_in_use"]
    note = f"{peak / GIB:.2f} of {base / GIB:.2f} GiB; by XLA's count the step needs {program.peak_bytes / GIB:.2f}"
    return {"figure": peak / base, "peak_bytes": peak, "base_bytes": base, "note": note}


def _require_fused(rig: Rig) -> None:
    """A row about the attention we choose needs a choice."""
    if rig.attention() == "xla":
        raise NotMeasuredError("; ".join(["only XLA's attention runs here", *rig.problems]))


def packed_batch(shape: Shape, segments: int = SEGMENTS) -> dict[str, jax.Array]:
    """The rows of ``make_batch`` cut into segments of equal length."""
    size = max(1, shape.length // segments)
    index = np.arange(shape.length, dtype=np.int32)
    rows = {"segment_ids": index // size + 1, "positions": index % size}
    whole = {name: jnp.asarray(np.broadcast_to(row, (shape.rows, shape.length))) for name, row in rows.items()}
    return make_batch(shape) | whole


def packed(rig: Rig) -> dict[str, Any]:
    """G6: one program on two batches, so that both pay for what segments need whether a row has them or not."""
    _require_fused(rig)
    shape = rig.fitted("main")
    program = rig.lora(shape)
    segments, one = packed_batch(shape), make_batch(shape)
    found = rig.ratio(lambda: program.run_on(segments), lambda: program.run_on(one))
    return {**found, "note": f"{found['note']}; one program for both; {about(shape)}"}


def chosen_attention(rig: Rig) -> dict[str, Any]:
    """G7: how much longer a step takes with plain XLA attention."""
    _require_fused(rig)
    shape = rig.fitted("main")
    found = rig.ratio(rig.lora(shape.with_model(attention_implementation="xla")).run, rig.lora(shape).run)
    return {**found, "note": f"{found['note']}; {about(shape)}"}


def mixture(rig: Rig, top_k: int) -> dict[str, Any]:
    """G8: MoR with 8 experts of rank 4 against LoRA of rank 32."""
    shape = rig.fitted("main")
    lora = rig.adapter("LoRA r32", LoRA(rank=32), shape)
    mor = rig.adapter(f"MoR r4 N8 top {top_k}", MoR(rank=4, num_experts=8, top_k=top_k), shape)
    found = rig.ratio(mor.run, lora.run)
    return {**found, "note": f"{found['note']}; {about(shape)}"}


def compile_cold(rig: Rig) -> dict[str, Any]:
    """G9: in a process that has compiled nothing, with an empty cache."""
    rig.scratch["cache"] = tempfile.TemporaryDirectory()  # lives as long as the process, which goes on using it
    jax.config.update("jax_compilation_cache_dir", rig.scratch["cache"].name)
    return _compile(rig)


def compile_warm(rig: Rig) -> dict[str, Any]:
    """G9: the same again when jax has forgotten all that it traced, so that only the cache on disk helps."""
    if "cache" not in rig.scratch:
        raise NotMeasuredError("needs the cold compile before it")
    jax.clear_caches()
    return _compile(rig)


def _compile(rig: Rig) -> dict[str, Any]:
    """Seconds to trace, lower and compile a whole step of shape G, from shapes alone."""
    rig.require_device()
    shapes, functions = rig.shapes, []
    shape = dataclasses.replace(rig.shape("main").with_model(remat="dots"), rows=shapes.main.rows * shapes.accumulate)
    start = time.perf_counter()

    def build(params: Any, batch: Any) -> Any:
        step = adapter_step(LoRA(rank=16), shape.model, params, batch, accumulate=shapes.accumulate)
        functions.append(step.function)
        return step.state, step.rest

    state, rest = jax.eval_shape(build, abstract_params(shape.model), jax.eval_shape(partial(make_batch, shape)))
    Program("LoRA r16", functions[0], state, *rest)
    return {"figure": time.perf_counter() - start, "note": f"trace, lower and compile; {about(shape)}"}


def selective_remat(rig: Rig, remat: str) -> dict[str, Any]:
    """G10."""
    main, limit = rig.shape("main"), memory_limit()
    first = rig.lora(main.with_model(remat=remat))
    if first.peak_bytes > limit:
        raise NotMeasuredError(f"remat {remat} needs {first.peak_bytes / GIB:.1f} GiB of {limit / GIB:.1f}")
    second = rig.lora(main.with_model(remat="full"))
    found = rig.ratio(first.run, second.run)
    memory = f"{first.peak_bytes / GIB:.1f} and {second.peak_bytes / GIB:.1f} GiB by XLA's count"
    return {**found, "note": f"{found['note']}; {memory}"}


def deterministic(rig: Rig) -> dict[str, Any]:
    """G11."""
    shape = rig.fitted("main")
    options = {"xla_gpu_deterministic_ops": True}
    on = rig.adapter("LoRA r16 deterministic", LoRA(rank=16), shape, options=options)
    found = rig.ratio(on.run, rig.lora(shape).run)
    return {**found, "note": f"{found['note']}; xla_gpu_deterministic_ops; {about(shape)}"}
