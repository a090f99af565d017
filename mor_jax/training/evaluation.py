"""The held-out loss of a run: one compiled function of one batch, summed in float64 over a pass.

Dropout is off and balance losses are left out. A batch whose counted tokens are all of one task counts for that task
too; `build_run` makes such batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mor_jax.adapters import AdapterInputs
from mor_jax.training.accumulation import batch_inputs
from mor_jax.training.backend import compiler_options
from mor_jax.training.mesh import put_batch, replicated
from mor_jax.training.sharding import on_mesh
from mor_jax.training.step import Loss, StateShardings, TrainState


@dataclass(frozen=True)
class Evaluation:
    """Calling it makes one pass over the held-out batches.

    Attributes:
      function: compiled (adapters, adapter_state, constants, params, batch) -> (loss sum, tokens).
      constants: of the adapters.
      mesh: where the batches go.
      batches: makes a pass over held-out batches, all of one shape.
      tasks: names in the order of their ids.
    """

    function: Any
    constants: Any
    mesh: jax.sharding.Mesh
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
    tasks: tuple[str, ...]

    def __call__(self, state: TrainState, params: Any) -> dict[str, Any]:
        """`eval_loss` (mean over the tokens), `eval_tokens`, and `eval_loss_by_task` where batches are of one task.

        Raises:
          ValueError: no held-out token counts.
        """
        sums, owners = [], []
        for batch in self.batches():
            sums.append(self._sum(state, params, put_batch(batch, self.mesh)))
            owners.append(_task_of(batch))
        totals = np.array(jax.device_get(sums), np.float64).reshape(len(sums), 2)
        loss, tokens = totals.sum(0)
        if tokens == 0:
            raise ValueError("eval_data: no token counts: give held-out records with something to learn")
        result: dict[str, Any] = {"eval_loss": loss / tokens, "eval_tokens": int(tokens)}
        if len(self.tasks) > 1:
            result["eval_loss_by_task"] = self._by_task(totals, np.array(owners))
        return result

    def compile(self, state: TrainState, params: Any) -> None:
        """Compiles for the shape of the first batch; a pass then compiles nothing."""
        batch = next(iter(self.batches()))
        arguments = (state.adapters, state.adapter_state, self.constants, params)
        self.function.lower(*arguments, put_batch(batch, self.mesh)).compile()

    def _sum(self, state: TrainState, params: Any, batch: Any) -> Any:
        return self.function(state.adapters, state.adapter_state, self.constants, params, batch)

    def _by_task(self, totals: np.ndarray, owners: np.ndarray) -> dict[str, float]:
        by_task = {name: totals[owners == number].sum(0) for number, name in enumerate(self.tasks)}
        return {name: loss / tokens for name, (loss, tokens) in by_task.items() if tokens}


def make_evaluation(
    loss: Loss,
    batches: Callable[[], Iterable[Any]],
    *,
    mesh: jax.sharding.Mesh,
    constants: Any,
    shardings: StateShardings,
    tasks: tuple[str, ...] = (),
) -> Evaluation:
    """The evaluation of a run.

    Args:
      loss: of the run.
      batches: makes a pass over held-out batches.
      mesh: of the run.
      constants: of `init_state`.
      shardings: of `init_state`.
      tasks: names in the order of their ids.
    """

    def function(adapters, adapter_state, constants, params, batch):
        collections = {"adapters": adapters, "adapter_state": adapter_state, "adapter_constants": constants}
        inputs = batch_inputs(AdapterInputs(deterministic=True), batch, None)
        return loss({"params": params, **collections}, batch, inputs)

    state = shardings.state
    places = (state.adapters, state.adapter_state, shardings.constants, shardings.params, shardings.batch)
    options = compiler_options(mesh)
    compiled = jax.jit(
        on_mesh(function, mesh), in_shardings=places, out_shardings=replicated(mesh), compiler_options=options
    )
    return Evaluation(compiled, constants, mesh, batches, tasks)


def _task_of(batch: Mapping[str, np.ndarray]) -> int:
    """The one task of the counted tokens, or -1."""
    if "task_ids" not in batch or "loss_mask" not in batch:
        return -1
    tasks = np.unique(np.asarray(batch["task_ids"])[np.asarray(batch["loss_mask"]) > 0])
    return int(tasks[0]) if len(tasks) == 1 else -1
