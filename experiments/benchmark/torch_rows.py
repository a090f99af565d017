"""Row C15: our step against PEFT's on torch, with the same weights, rows, dtype, optimiser and threads.

Both sides run what PEFT's users run: its model's own loss (with AdaLoRA's penalty) and, for AdaLoRA, its
``update_and_allocate`` after each step. Needs the extra ``oracle``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optax
from programs import (
    LINEARS,
    RULE_STEPS,
    AdapterStep,
    Program,
    Shape,
    adapter_step,
    make_batch,
    make_params,
    time_ratio,
)

from mor_jax.adapters import AdaLoRA, Adapter, DoRA, LoRA, VeRA
from mor_jax.adapters.adalora import CutBudget
from mor_jax.models import save_params

RANK, LEARNING_RATE, CHECKED_STEPS = 16, 1e-3, 5
METHODS: tuple[Adapter, ...] = (LoRA(rank=RANK), DoRA(rank=RANK), VeRA(), AdaLoRA(rank=RANK))
# Our leaf -> PEFT's, of what does not start as a constant. Ours are transposed.
COPIED: dict[str, dict[str, str]] = {
    "lora": {"a": "lora_A"},
    "dora": {"a": "lora_A"},
    "vera": {},  # the shared factors, below
    "adalora": {"a": "lora_A", "b": "lora_B"},
}


def peft_config(adapter: Adapter) -> Any:
    """PEFT's configuration of the same method on the same linear maps.

    Of a causal language model, since only then does PEFT call AdaLoRA's own forward, which adds the penalty.
    """
    import peft

    common: dict[str, Any] = {"target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    if isinstance(adapter, VeRA):
        return peft.VeraConfig(r=adapter.rank, d_initial=adapter.d_initial, **common)
    if isinstance(adapter, AdaLoRA):
        (cut,) = (rule for rule in adapter.rules(RULE_STEPS) if isinstance(rule, CutBudget))
        return peft.AdaLoraConfig(
            init_r=adapter.width,
            target_r=adapter.rank,
            lora_alpha=adapter.alpha,
            tinit=cut.start,
            tfinal=RULE_STEPS - cut.end,
            deltaT=cut.interval,
            beta1=adapter.decay,
            beta2=adapter.decay,
            orth_reg_weight=2 * adapter.orthogonality_weight,  # its mean is over factors, ours over sites of two
            total_step=RULE_STEPS,
            **common,
        )
    assert isinstance(adapter, LoRA | DoRA)
    use_dora = isinstance(adapter, DoRA)
    return peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, use_dora=use_dora, **common)


class TorchProgram:
    """PEFT's model with AdamW; ``run`` does one step and returns its loss, penalties included."""

    def __init__(self, adapter: Adapter, shape: Shape, params: Any, step: AdapterStep, batch: dict[str, Any]):
        """The base goes through a Hugging Face directory; factors that start at random come from our step's state."""
        import peft
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        with tempfile.TemporaryDirectory() as scratch:
            save_params(params, shape.model, f"{scratch}/base")
            base = transformers.AutoModelForCausalLM.from_pretrained(f"{scratch}/base", dtype=torch.float32)
        self.model = peft.get_peft_model(base, peft_config(adapter)).train()
        self._copy_factors(adapter, step)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=1e-8, weight_decay=0.0)
        self.input_ids, self.targets = (
            torch.from_numpy(np.array(batch[field], np.int64)) for field in ("input_ids", "targets")
        )
        self.step, self.allocates = 0, isinstance(adapter, AdaLoRA)

    def _copy_factors(self, adapter: Adapter, step: AdapterStep) -> None:
        modules = dict(self.model.named_modules())
        for path, leaves in step.state.adapters.items():
            for leaf, name in COPIED[adapter.name].items():
                for layer, value in enumerate(np.asarray(leaves[leaf])):
                    where = path.replace("layers/", f"layers.{layer}.").replace("/", ".")
                    _copy(getattr(modules[f"base_model.model.model.{where}"], name), value)
        if isinstance(adapter, VeRA):
            shared = _find(step.rest, "shared/vera")
            _copy(self.model.base_model.vera_A, shared["a"])
            _copy(self.model.base_model.vera_B, shared["b"])

    def run(self) -> float:
        """One step."""
        loss = self.model(input_ids=self.input_ids, labels=self.targets, shift_labels=self.targets).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        if self.allocates:
            self.model.base_model.update_and_allocate(self.step)
        return loss.item()


def _copy(factors: Any, ours: Any) -> None:
    """Into PEFT's only adapter, a parameter or the weight of a module."""
    import torch

    theirs = factors["default"]
    with torch.no_grad():
        getattr(theirs, "weight", theirs).copy_(torch.from_numpy(np.asarray(ours).T.copy()))


def _find(arguments: tuple[Any, ...], name: str) -> Any:
    """What is called ``name`` in the arguments of a step."""
    return next(argument[name] for argument in arguments if isinstance(argument, Mapping) and name in argument)


def against_peft(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """C15: time of our step ÷ PEFT's, and how far the losses of the first steps are apart.

    Of AdaLoRA the steps are those before its first cut.
    """
    params, batch = make_params(shape), make_batch(shape)
    for adapter in METHODS:
        ours, theirs = both_programs(adapter, shape, params, batch)
        pairs = [(total_loss(ours.run()), theirs.run()) for _ in range(CHECKED_STEPS)]
        apart = max(abs(a - b) for a, b in pairs)
        what = f"{adapter.title} r{getattr(adapter, 'rank', None)}: ours ÷ PEFT on torch"
        note = f"loss {pairs[0][0]:.4f} to {pairs[-1][0]:.4f} in {CHECKED_STEPS} steps"
        yield {"id": "C15", "what": what, "must": "", **time_ratio(ours.run, theirs.run, rounds), "note": note}
        yield {"id": "C15", "what": f"{what}: losses apart", "must": "<= 0.0001", "figure": apart}


def both_programs(adapter: Adapter, shape: Shape, params: Any, batch: Any) -> tuple[Program, TorchProgram]:
    """Our step and PEFT's, from the same start."""
    optimizer = optax.adamw(LEARNING_RATE, eps=1e-8, weight_decay=0.0)
    step = adapter_step(adapter, shape.model, params, batch, optimizer=optimizer)
    theirs = TorchProgram(adapter, shape, params, step, batch)
    return step.compile(adapter.name), theirs


def total_loss(metrics: dict[str, Any]) -> float:
    """Loss and penalty."""
    return float(metrics["loss"]) + float(metrics.get("penalty", 0.0))
