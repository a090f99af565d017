"""Row C15: our step against PEFT's on torch, with the same weights, rows, dtype, optimiser and threads.

Needs the extra ``oracle``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
from programs import LINEARS, AdapterStep, Program, Shape, adapter_step, make_batch, make_params, time_ratio

from mor_jax.adapters import Adapter, DoRA, LoRA
from mor_jax.models import save_params

RANK, LEARNING_RATE, CHECKED_STEPS = 16, 1e-3, 5
METHODS: dict[str, tuple[type[Adapter], dict[str, Any]]] = {"lora": (LoRA, {}), "dora": (DoRA, {"use_dora": True})}


class TorchProgram:
    """PEFT's model with AdamW; ``run`` does one step and returns its loss."""

    def __init__(self, name: str, shape: Shape, params: Any, step: AdapterStep, batch: dict[str, Any]):
        """The base goes through a Hugging Face directory; A comes from our step's state, B is zero in both."""
        import peft
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as scratch:
            save_params(params, shape.model, f"{scratch}/base")
            base = transformers.AutoModelForCausalLM.from_pretrained(f"{scratch}/base", dtype=torch.float32)
        alpha = step.plan.sites[0].adapter.alpha
        config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(LINEARS), **METHODS[name][1])
        self.name, self.model = f"PEFT {name}", peft.get_peft_model(base, config).train()
        self._copy_factors(step)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=1e-8, weight_decay=0.0)
        self.input_ids, self.targets = (
            torch.from_numpy(np.array(batch[field], np.int64)) for field in ("input_ids", "targets")
        )

    def _copy_factors(self, step: AdapterStep) -> None:
        import torch

        modules = dict(self.model.named_modules())
        for path, leaves in step.state.adapters.items():
            for layer, a in enumerate(np.asarray(leaves["a"])):
                name = path.replace("layers/", f"layers.{layer}.").replace("/", ".")
                with torch.no_grad():
                    weight = modules[f"base_model.model.model.{name}"].lora_A["default"].weight
                    weight.copy_(torch.from_numpy(a.T.copy()))

    def run(self) -> float:
        """One step."""
        import torch

        logits = self.model(input_ids=self.input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def against_peft(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """C15: time of our step ÷ PEFT's, and how far the losses of the first steps are apart."""
    params, batch = make_params(shape), make_batch(shape)
    optimizer = optax.adamw(LEARNING_RATE, eps=1e-8, weight_decay=0.0)
    for name, (method, _) in METHODS.items():
        step = adapter_step(method(rank=RANK), shape.model, params, batch, optimizer=optimizer)
        theirs = TorchProgram(name, shape, params, step, batch)
        ours: Program = step.compile(name)
        pairs = [(float(ours.run()["loss"]), theirs.run()) for _ in range(CHECKED_STEPS)]
        apart = max(abs(a - b) for a, b in pairs)
        what = f"{method.title} r{RANK}: ours ÷ PEFT on torch"
        note = f"loss {pairs[0][0]:.4f} to {pairs[-1][0]:.4f} in {CHECKED_STEPS} steps"
        yield {"id": "C15", "what": what, "must": "", **time_ratio(ours.run, theirs.run, rounds), "note": note}
        yield {"id": "C15", "what": f"{what}: losses apart", "must": "<= 0.0001", "figure": apart}
