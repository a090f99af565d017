"""The rows G1 to G11 of the GPU table: what each line measures, against what, and what it should be.

Shape G: Llama-3-8B widths with random bfloat16 weights, rows of 4,096 tokens, micro-batches of 2 rows, 16 of them a
step, LoRA of rank 16 on the seven linear maps. Every ratio but those of whole steps is of one micro-batch.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_rig import GIB, NotMeasuredError, Rig, memory_limit, memory_statistics, peak_flops
from gpu_torch import against_peft
from programs import Program, Shape, adapter_step, make_batch

from mor_jax.adapters import LoRA, MoR
from mor_jax.models import abstract_params

SEGMENTS = 16  # of a packed row


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
      what: what the figure is.
      measure: gives {"figure", "note", ...}, or raises; None where nothing can be measured yet.
      must: as ``table.is_met`` reads it.
      stretch: what we aim at.
      reference: the figure that others print.
      missing: why there is nothing to measure.
    """

    what: str
    measure: Callable[[Rig], dict[str, Any]] | None
    must: str = ""
    stretch: str = ""
    reference: str = ""
    missing: str = ""

    def note(self, found: str) -> str:
        """A note with what the figure is held against."""
        stretch = f"stretch {self.stretch}" if self.stretch else ""
        reference = f"reference: {self.reference}" if self.reference else ""
        return "; ".join(part for part in (found, stretch, reference) if part)


@dataclass(frozen=True)
class Row:
    """Lines that are measured together; ``weight`` and ``fresh`` as those of a ``supervise.Job``."""

    lines: tuple[Line, ...]
    weight: float = 1.0
    fresh: bool = False


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
        f"{shape.rows} x {shape.length:,} tokens x {accumulate} micro-batches, remat {shape.model.remat}",
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
    return _rate(rig, rig.fitted(rig.shapes.main, rig.shapes.accumulate), 12_473)


def other_throughput(rig: Rig) -> dict[str, Any]:
    """G1b."""
    return _rate(rig, rig.fitted(rig.shapes.other, rig.shapes.accumulate), 14_110)


def against_full(rig: Rig, remat: str) -> dict[str, Any]:
    """G2."""
    shape = rig.shapes.small.with_model(remat=remat)
    lora, full = rig.lora(shape), rig.full(shape)
    found = rig.ratio(lora.run, full.run)
    return {**found, "note": f"{found['note']}; weights and moments of full in bfloat16"}


def against_floor(rig: Rig) -> dict[str, Any]:
    """G3."""
    shape = rig.fitted(rig.shapes.main)
    found = rig.ratio(rig.lora(shape).run, rig.floor(shape).run)
    return {**found, "note": f"{found['note']}; remat {shape.model.remat}"}


def base_and_peak(rig: Rig) -> dict[str, Any]:
    """G4: in a process that has done nothing else, as the allocator's peak cannot be set back."""
    memory_statistics()
    program = rig.lora(rig.shapes.short.with_model(remat="full"))
    program.run()
    program.run()
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(rig.params(rig.shapes.short.model)))
    peak = memory_statistics()["peak_bytes_in_use"]
    note = f"{peak / GIB:.2f} of {base / GIB:.2f} GiB; by XLA's count the step needs {program.peak_bytes / GIB:.2f}"
    return {"figure": peak / base, "peak_bytes": peak, "base_bytes": base, "note": note}


def _with_chosen_attention(shape: Shape) -> Shape:
    """With the kernel that a run would choose on this machine."""
    kernel = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return shape.with_model(attention_implementation=kernel)


def packed_batch(shape: Shape, segments: int = SEGMENTS) -> dict[str, jax.Array]:
    """The rows of ``make_batch`` cut into segments of equal length."""
    size = max(1, shape.length // segments)
    index = np.arange(shape.length, dtype=np.int32)
    rows = {"segment_ids": index // size + 1, "positions": index % size}
    whole = {name: jnp.asarray(np.broadcast_to(row, (shape.rows, shape.length))) for name, row in rows.items()}
    return make_batch(shape) | whole


def packed(rig: Rig) -> dict[str, Any]:
    """G6: one program on two batches."""
    shape = _with_chosen_attention(rig.fitted(rig.shapes.main))
    program = rig.lora(shape)
    segments, one = packed_batch(shape), make_batch(shape)
    found = rig.ratio(lambda: program.run_on(segments), lambda: program.run_on(one))
    return {
        **found,
        "note": f"{found['note']}; attention {shape.model.attention_implementation}, remat {shape.model.remat}",
    }


def chosen_attention(rig: Rig) -> dict[str, Any]:
    """G7: how much longer a step takes with plain XLA attention."""
    shape = rig.fitted(rig.shapes.main)
    plain, ours = rig.lora(shape), rig.lora(_with_chosen_attention(shape))
    found = rig.ratio(plain.run, ours.run)
    return {**found, "note": f"{found['note']}; remat {shape.model.remat}"}


def mixture(rig: Rig, top_k: int) -> dict[str, Any]:
    """G8: MoR with 8 experts of rank 4 against LoRA of rank 32."""
    shape = rig.fitted(rig.shapes.main)
    lora = rig.adapter("LoRA r32", LoRA(rank=32), shape)
    mor = rig.adapter(f"MoR r4 N8 top {top_k}", MoR(rank=4, num_experts=8, top_k=top_k), shape)
    found = rig.ratio(mor.run, lora.run)
    return {**found, "note": f"{found['note']}; remat {shape.model.remat}"}


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
    shape = dataclasses.replace(shapes.main.with_model(remat="dots"), rows=shapes.main.rows * shapes.accumulate)
    start = time.perf_counter()

    def build(params: Any, batch: Any) -> Any:
        step = adapter_step(LoRA(rank=16), shape.model, params, batch, accumulate=shapes.accumulate)
        functions.append(step.function)
        return step.state, step.rest

    state, rest = jax.eval_shape(build, abstract_params(shape.model), jax.eval_shape(partial(make_batch, shape)))
    Program("LoRA r16", functions[0], state, *rest)
    return {"figure": time.perf_counter() - start, "note": "trace, lower and compile; remat dots"}


def selective_remat(rig: Rig, remat: str) -> dict[str, Any]:
    """G10."""
    main, limit = rig.shapes.main, memory_limit()
    first = rig.lora(main.with_model(remat=remat))
    if first.peak_bytes > limit:
        raise NotMeasuredError(f"remat {remat} needs {first.peak_bytes / GIB:.1f} GiB of {limit / GIB:.1f}")
    second = rig.lora(main.with_model(remat="full"))
    found = rig.ratio(first.run, second.run)
    memory = f"{first.peak_bytes / GIB:.1f} and {second.peak_bytes / GIB:.1f} GiB by XLA's count"
    return {**found, "note": f"{found['note']}; {memory}"}


def deterministic(rig: Rig) -> dict[str, Any]:
    """G11."""
    shape = rig.fitted(rig.shapes.main)
    options = {"xla_gpu_deterministic_ops": True}
    on = rig.adapter("LoRA r16 deterministic", LoRA(rank=16), shape, options=options)
    found = rig.ratio(on.run, rig.lora(shape).run)
    return {**found, "note": f"{found['note']}; xla_gpu_deterministic_ops; remat {shape.model.remat}"}


_NEMO = "NeMo AutoModel on an H100"

# in the order in which they are measured, the most telling first
ROWS: dict[str, Row] = {
    "G1": Row(
        (
            Line(
                "Llama-3-8B, LoRA r16: tokens/s ÷ 12,473",
                throughput,
                ">= 0.80",
                ">= 1.00, >= 1.10 on an H200",
                f"12,473 tokens/s, 40.6 % MFU at 4 N, {_NEMO}",
            ),
        ),
        weight=3.0,
        fresh=True,
    ),
    "G3": Row(
        (
            Line(
                "LoRA r16 ÷ floor",
                against_floor,
                "<= 1.15",
                "<= 1.08",
                "LoRAFusion implies about 1.27 at the kernel",
            ),
        ),
    ),
    "G2": Row(
        (
            Line(
                "1B, LoRA r16 ÷ full, no remat",
                partial(against_full, remat="none"),
                "<= 0.75",
                "<= 0.70",
                "bound 0.667; NVIDIA 0.62 to 0.64 at 70B",
            ),
            Line(
                "1B, LoRA r16 ÷ full, full remat",
                partial(against_full, remat="full"),
                "<= 0.82",
                "<= 0.78",
                "bound 0.75; torchtune 0.85 to 0.88 on an A100",
            ),
        ),
        weight=1.5,
    ),
    "G8": Row(
        (
            Line(
                "MoR r4 N8 ÷ LoRA r32",
                partial(mixture, top_k=0),
                "<= 1.20",
                "<= 1.10",
                "dense mixtures 1.9 to 2.2 in print",
            ),
            Line("MoR r4 N8 top 2 ÷ LoRA r32", partial(mixture, top_k=2), "<= 1.40", "<= 1.25"),
        ),
        weight=1.5,
    ),
    "G1p": Row(
        (
            Line(
                "Llama-3-8B, LoRA r16, full remat: tokens/s, ours ÷ PEFT on torch",
                against_peft,
            ),
        ),
        weight=1.5,
        fresh=True,
    ),
    "G4": Row(
        (
            Line(
                "peak memory ÷ bfloat16 base, 2 x 2,048 tokens, full remat",
                base_and_peak,
                "<= 1.35",
                "<= 1.20",
                "torchtune 1.15 (Llama-2 7B), 1.08 (8B)",
            ),
        ),
        fresh=True,
    ),
    "G6": Row(
        (
            Line(
                "16 segments a row ÷ 1, LoRA r16 step",
                packed,
                "<= 1.05",
                "<= 1.00",
                "an explicit mask made cuDNN's attention 2.6 times slower",
            ),
        ),
    ),
    "G10": Row(
        (
            Line(
                "LoRA r16, remat dots ÷ full",
                partial(selective_remat, remat="dots"),
                "<= 0.85",
                "<= 0.75",
                "bound 0.67",
            ),
            Line("LoRA r16, remat none ÷ full", partial(selective_remat, remat="none")),
        ),
    ),
    "G9": Row(
        (
            Line(
                "seconds to compile shape G's step, cold",
                compile_cold,
                "<= 90",
                "<= 45",
                "Tunix 31B 3 to 8 min, SkyRL 4B 276 s",
            ),
            Line("seconds to compile shape G's step, warm", compile_warm, "<= 20", "<= 10"),
        ),
        weight=1.5,
        fresh=True,
    ),
    "G1b": Row(
        (
            Line(
                "Qwen2.5-7B, LoRA r16: tokens/s ÷ 14,110",
                other_throughput,
                ">= 0.80",
                ">= 1.00",
                f"14,110 tokens/s, 42.8 % MFU at 4 N, {_NEMO}",
            ),
        ),
        weight=2.0,
        fresh=True,
    ),
    "G7": Row(
        (
            Line(
                "LoRA r16 step at 4,096, XLA attention ÷ the one chosen",
                chosen_attention,
                ">= 1.2",
                ">= 1.5",
                "1.05 to 2 end to end on GPT-3",
            ),
        ),
    ),
    "G11": Row(
        (Line("deterministic ÷ default, LoRA r16", deterministic, "", "<= 1.10", "1.06, TensorFlow"),),
    ),
    "G5": Row(
        (
            Line(
                "QLoRA peak ÷ LoRA peak",
                None,
                "<= 0.60",
                "<= 0.50",
                "0.46 to 0.60",
                missing="not built: no quantised base",
            ),
            Line(
                "QLoRA step ÷ LoRA step",
                None,
                "<= 1.35",
                "<= 1.15",
                "1.02 to 1.56",
                missing="not built: no quantised base",
            ),
        ),
        weight=0.1,
    ),
}
