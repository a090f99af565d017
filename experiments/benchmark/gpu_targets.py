"""The rows G1 to G11 of the GPU table: what each line is, what measures it, and what it is held against.

Shape G: Llama-3-8B widths with random bfloat16 weights, rows of 4,096 tokens, micro-batches of 2 rows, 16 of them a
step, LoRA of rank 16 on the seven linear maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpu_rig import Rig
from gpu_rows import (
    against_floor,
    against_full,
    base_and_peak,
    chosen_attention,
    compile_cold,
    compile_warm,
    deterministic,
    mixture,
    other_throughput,
    packed,
    selective_remat,
    throughput,
)
from gpu_torch import against_peft


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
