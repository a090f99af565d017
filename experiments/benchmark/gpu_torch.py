"""Row G1p: PEFT's LoRA step on torch with CUDA, then ours, in one process: the two do not fit the memory together."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import numpy as np
from gpu_rig import GIB, NotMeasuredError, Rig
from programs import LINEARS, Shape

from mor_jax.models import config_to_hf

LEARNING_RATE = 1e-4


def against_peft(rig: Rig) -> dict[str, Any]:
    """Our tokens a second ÷ PEFT's, on the same micro-batch with full recomputation.

    Raises:
      NotMeasuredError: torch with CUDA, or peft, is not here.
    """
    shape = rig.shapes.main.with_model(remat="full")
    try:
        import peft  # noqa: F401 - asked for before anything is made
        import torch
    except ImportError as error:
        raise NotMeasuredError(f"needs torch with CUDA and peft: {error}") from error
    if not torch.cuda.is_available():
        raise NotMeasuredError(f"needs torch with CUDA and peft: torch {torch.__version__} finds no GPU")
    theirs, peak = peft_seconds(shape, rig.rounds, (time.monotonic() + rig.until) / 2)
    program = rig.lora(shape)  # the first use of jax, when torch has given its memory back
    ours, _, _, rounds = rig.seconds(program.run)
    tokens = shape.rows * shape.length
    note = (
        f"{tokens / ours:,.0f} and {tokens / theirs:,.0f} tokens/s, medians, one after the other, {rounds} rounds; "
        f"peak {program.peak_bytes / GIB:.1f} GiB by XLA's count and {peak / GIB:.1f} by torch's; micro-batch of "
        f"{shape.rows} x {shape.length:,}; theirs: sdpa, gradient checkpointing, fused AdamW, not compiled"
    )
    return {"figure": theirs / ours, "tokens_per_second": tokens / ours, "peft_tokens_per_second": tokens / theirs} | {
        "note": note
    }


def peft_seconds(shape: Shape, rounds: int, until: float, device: str = "cuda") -> tuple[float, int]:
    """(median seconds of PEFT's step, torch's peak of memory in bytes); the model is gone afterwards.

    Args:
      shape: of model and batch; the weights are random, in the model's dtype.
      rounds: timed steps, after two to warm up.
      until: of ``time.monotonic``; no round after the second begins later.
      device: torch's name of it.
    """
    import torch

    times = _step_times(shape, rounds, until, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return statistics.median(times), peak


def _step_times(shape: Shape, rounds: int, until: float, device: str) -> list[float]:
    import torch

    model = _model(shape, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4, fused=device == "cuda")
    tokens = np.random.default_rng(0).integers(1, shape.model.vocab_size, (shape.rows, shape.length + 1))
    rows = torch.from_numpy(tokens).to(device)

    def run() -> float:
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    run()
    run()
    times: list[float] = []
    while len(times) < 2 or (len(times) < rounds and time.monotonic() < until):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _model(shape: Shape, device: str) -> Any:
    """PEFT's model for training, made on the device."""
    import peft
    import torch
    import transformers

    values = config_to_hf(shape.model)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    dtype = getattr(torch, str(shape.model.param_dtype))
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    settings = peft.LoraConfig(r=16, lora_alpha=16, target_modules=list(LINEARS))
    return peft.get_peft_model(base, settings).to(device).train()
