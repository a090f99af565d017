"""The training loop: build, show what will train, step, evaluate, save, and leave an adapter behind.

Each turn dispatches a step, then does what falls due on its result (evaluate, save, stop), and only then takes the next
batch, so that the data's place in a checkpoint is that of the next step. A step's metrics are fetched after the next
step was dispatched, hence the device never waits for the host; whatever falls due fetches them first, so that nothing
is ever saved on top of a step that was not finite.

Of several processes each runs this loop on its own rows; process 0 alone writes metrics, adapter and manifest, and a
signal to any of them stops all at the same step.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mor_jax.adapters import Leaves
from mor_jax.data import DataError
from mor_jax.optim import Rules, plan_rules
from mor_jax.processes import barrier, is_alone, is_first
from mor_jax.training.adapter_file import FORMAT_VERSION, check_meaning, save_adapter
from mor_jax.training.build import Run, build_run, target_rows
from mor_jax.training.checkpoint import Checkpoints, fingerprint
from mor_jax.training.config import ConfigError, TrainConfig, config_to_mapping
from mor_jax.training.distributed import (
    LostPeerError,
    Pulse,
    check_same_everywhere,
    is_lost_peer,
)
from mor_jax.training.evaluation import Evaluation, make_evaluation
from mor_jax.training.events import Events, make_events, warn_of
from mor_jax.training.mesh import put_batch
from mor_jax.training.metrics import (
    Output,
    Throughput,
    peak_memory,
    print_targets,
    router_metrics,
)
from mor_jax.training.optimizer import make_schedule
from mor_jax.training.recorded_base import check_base_config, describe_base, expanded, located
from mor_jax.training.run_folder import (
    Start,
    check_same_base,
    check_same_score_batch,
    environment,
    find_start,
    with_decisions,
    write_run_folder,
)
from mor_jax.training.signals import StopRequest
from mor_jax.training.step import NonFiniteError, Step, TrainState, init_state, make_step

_LOGGER = logging.getLogger(__name__)
LAST_LOSSES = 10


def train(config: TrainConfig, optimizer: optax.GradientTransformation | None = None) -> dict[str, Any]:
    """Trains what `config` describes and leaves the adapter in `output_dir`.

    Args:
      config: of the run.
      optimizer: made in Python, instead of the one that `config` names.

    Returns:
      `steps` (the last step), `loss` (training mean of the last 10 steps), `trainable_parameters`, `padded_parameters`
      (entries of the trained leaves, with those that fill ranks up to a static shape), `tokens_per_second`
      (real tokens after step 2; 0 for shorter runs), `step_seconds` (mean, likewise), `output_dir`, and with held-out
      data `eval_loss`, `eval_tokens` and, for several tasks, `eval_loss_by_task`.

    Raises:
      ConfigError, MeshError, ModelFileError, DataError, InjectionError: bad input; nothing was written.
      NonFiniteError: loss, gradient or update of a step was not finite; the last checkpoint is that of a good step.
      IntegrityError: told to resume, and no checkpoint passes its check any more.
      LostPeerError: another process of the run is gone.
      SystemExit: SIGTERM; saved, code 143.
      KeyboardInterrupt: Ctrl-C; saved.
    """
    with StopRequest() as stop:
        config = expanded(config)
        start = find_start(config, optimizer is not None)  # before the model is read
        return _run_from(start, build_run(with_decisions(config, start), optimizer), stop, optimizer is not None)


def run_training(run: Run, stop: StopRequest | None = None, custom_optimizer: bool = False) -> dict[str, Any]:
    """Trains a `Run`; for models that `build_run` does not make. Returns and raises as `train`.

    Args:
      run: what to train; `run.config` says how long and where to.
      stop: tells when to stop; None never does.
      custom_optimizer: whether the optimiser is other than `run.config` names.
    """
    return _run_from(find_start(run.config, custom_optimizer), run, stop or StopRequest(), custom_optimizer)


def _run_from(start: Start, run: Run, stop: StopRequest, custom_optimizer: bool) -> dict[str, Any]:
    loop = _set_up(run, start, stop, custom_optimizer)
    try:
        loop.run_steps()
        result = loop.finish()
    except jax.errors.JaxRuntimeError as error:
        if is_lost_peer(error):
            loop.checkpoints.abandon()
            raise LostPeerError(error) from error
        raise
    finally:
        loop.close()
    return result


@dataclass
class _Loop:
    """A run under way; `state` is that after step `done`."""

    run: Run
    stop: StopRequest
    step: Step
    rules: Rules
    events: Events
    state: TrainState
    constants: Any
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    output: Output | None  # of process 0
    pulse: Pulse | None  # of several processes
    metadata: dict[str, Any]  # of every checkpoint: configuration and fingerprint
    done: int
    losses: collections.deque[float]
    learning_rates: np.ndarray  # of every step
    throughput: Throughput = field(default_factory=Throughput)
    rate: float = 0.0  # tokens a second, after the last step reported
    step_seconds: float = 0.0  # mean, after step 2
    pending: tuple[int, float | None, Any] | None = None  # step, real tokens, metrics on the device
    evaluated: dict[str, Any] = field(default_factory=dict)
    agreed: int = 0  # the signal that all processes know of

    def run_steps(self) -> None:
        """All steps that are left, and what falls due after each."""
        steps = self.run.config.steps
        batch: Any = None
        tokens: float | None = None
        if self.done < steps:
            batch, tokens = self._next_batch()
        self.stop.wait_for_step()
        while self.done < steps:
            self.state, metrics = self.step(self.state, self.run.params, batch)
            self.done += 1
            self.state, reports = self.events(self.done, self.state, self.run.params, batch)
            metrics |= {"events": reports} if reports else {}
            metrics |= {} if self.pulse is None else {"pulse": self.pulse(self.stop.signal, batch)}
            previous, self.pending = self.pending, (self.done, tokens, metrics)
            self._report(previous)
            self._do_what_is_due()
            if self.done < steps:
                batch, tokens = self._next_batch()

    def finish(self) -> dict[str, Any]:
        """Writes the adapter and returns the result."""
        run, config = self.run, self.run.config
        if self.evaluation is not None and not self.evaluated:  # resumed after the last step
            self.evaluated = self.evaluation(self.state, run.params)
        leaves = Leaves(self.state.adapters, self.state.adapter_state, self.constants)
        about = {"base_fingerprint": self.metadata["base_fingerprint"], "model": located(config).model}
        about |= {"seed": config.seed, "tasks": list(run.tasks), "steps": self.done} | describe_base(run.adapted.base)
        save_adapter(Path(config.output_dir) / "adapter", run.plan, leaves, about)
        self.checkpoints.commit()
        barrier("the run is finished")
        return {
            "steps": self.done,
            "loss": float(np.mean(self.losses)),
            "trainable_parameters": run.plan.num_params(),
            "padded_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.adapters)),
            "tokens_per_second": self.rate,
            "step_seconds": self.step_seconds,
            "output_dir": config.output_dir,
        } | self.evaluated

    def close(self) -> None:
        """Commits the checkpoint under way and closes all files."""
        if self.output is not None:
            self.output.close()
        self.checkpoints.close()

    def _do_what_is_due(self) -> None:
        config, last = self.run.config, self.done == self.run.config.steps
        stopping = self._asked_to_stop() is not None
        evaluate = self.evaluation is not None and (last or _is_due(self.done, config.eval_every))
        save = last or stopping or _is_due(self.done, config.save_every)
        if evaluate or save:
            pending, self.pending = self.pending, None
            self._report(pending, evaluate=evaluate and not (stopping and not last))
        if save:
            self._save()
        if stopping and not last:
            self.checkpoints.commit()
            barrier("stopped")
            self.stop.signal = self._asked_to_stop()
            self.stop.raise_if_requested()
        self.checkpoints.poll()

    def _asked_to_stop(self) -> int | None:
        """The signal to this process; of several, the one that all of them know of by now."""
        return self.stop.signal if self.pulse is None else self.agreed or None

    def _save(self) -> None:
        place = {"iterator": self.run.batches.get_state(), "last_losses": list(self.losses)}
        self.checkpoints.save(self.done, _items(self.state), self.metadata | place)

    def _next_batch(self) -> tuple[Any, float | None]:
        """The next batch on the devices, and its real tokens where it tells and all rows are here."""
        batch = next(self.run.batches)
        segments = batch.get("segment_ids") if self.pulse is None else None
        tokens = None if segments is None else float(np.count_nonzero(segments))
        return put_batch(batch, self.run.mesh, self.run.config.batch_size), tokens

    def _report(self, pending: tuple[int, float | None, Any] | None, evaluate: bool = False) -> None:
        """Fetches a step's metrics, stops at what is not finite, and writes its line."""
        if pending is None:
            return
        step, tokens, on_device = pending
        metrics = jax.device_get(on_device)
        bad = int(metrics["bad_leaf"])
        if bad >= 0:
            raise NonFiniteError(step, self.step.names[bad])
        if self.pulse is not None:
            self.agreed, tokens = int(metrics["pulse"]["signal"]), metrics["pulse"].get("real_tokens")
        warn_of(self.rules, step, metrics.get("events", {}))
        self.losses.append(float(metrics["loss"]))
        self.rate = self.throughput.add(float(metrics["tokens"] if tokens is None else tokens))
        self.step_seconds = self.throughput.step_seconds()
        values = {name: metrics[name] for name in ("loss", "tokens", "gradient_norm")}
        if not self.metadata["custom_optimizer"]:
            values["learning_rate"] = self.learning_rates[step - 1]
        values |= {"tokens_per_second": self.rate, **peak_memory()}
        values |= {name: metrics[name] for name in ("penalty", "rank", "events") if name in metrics}
        values |= router_metrics(metrics["statistics"], self.run.tasks)
        if evaluate and self.evaluation is not None:
            started = time.perf_counter()
            self.evaluated = self.evaluation(self.state, self.run.params)
            values |= self.evaluated
            self.throughput.leave_out(time.perf_counter() - started)
        if self.output is not None:
            self.output.write(step, values)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _set_up(run: Run, start: Start, stop: StopRequest, custom_optimizer: bool) -> _Loop:
    """State, restored or new; the table; compiled programs; then, all being well, the run folder."""
    config = run.config
    rules = plan_rules(run.plan, config.steps)
    run = dataclasses.replace(run, optimizer=rules.wrap(run.optimizer))
    key = jax.random.key(config.seed, impl="threefry2x32")
    state, constants, shardings = init_state(key, run.adapted, run.params, run.optimizer, run.mesh, run.specs, rules)
    assert shardings is not None  # there is a mesh
    score_batch = _score_batch(run, rules)
    metadata = _metadata(run, custom_optimizer, score_batch)
    done, state, losses = _restore(run, start, state, metadata) if config.resume else (0, state, [])
    if is_first():
        print_targets(target_rows(run, state.adapters), f"{config.method} on {config.model}")
    step = make_step(
        run.adapted,
        run.optimizer,
        loss=run.loss,
        accumulate=config.accumulate,
        num_tasks=len(run.tasks),
        constants=constants,
        shardings=shardings,
        adapters=state.adapters,
        rules=rules,
    )
    events = make_events(
        rules, run.optimizer, loss=run.loss, constants=constants, shardings=shardings, batch=score_batch
    )
    evaluation = None
    if run.eval_batches is not None:
        evaluation = make_evaluation(
            run.loss, run.eval_batches, mesh=run.mesh, constants=constants, shardings=shardings, tasks=run.tasks
        )
    pulse = None if is_alone() else Pulse(run.mesh)
    _compile(run, step, events, evaluation, pulse, state, done)
    return _Loop(
        run=run,
        stop=stop,
        step=step,
        rules=rules,
        events=events,
        state=state,
        constants=constants,
        evaluation=evaluation,
        checkpoints=start.checkpoints,
        output=Output(write_run_folder(config), config.steps, done, config.log_every) if is_first() else None,
        pulse=pulse,
        metadata=metadata,
        done=done,
        losses=collections.deque(losses, LAST_LOSSES),
        learning_rates=np.asarray(jax.vmap(make_schedule(config))(jnp.arange(config.steps))),
    )


def _metadata(run: Run, custom_optimizer: bool, score_batch: Any) -> dict[str, Any]:
    """What every checkpoint says of the run, once all processes have found that they are about to do the same."""
    config = config_to_mapping(run.config)
    check_same_everywhere(
        config | {"place in the data": run.batches.get_state(), "versions": environment()["versions"]}
    )
    return {
        "config": config_to_mapping(located(run.config)),
        "base_fingerprint": fingerprint(run.params),
        "adapter_version": FORMAT_VERSION,
        "custom_optimizer": custom_optimizer,
        "score_batch": None if score_batch is None else fingerprint(score_batch),
    } | describe_base(run.adapted.base)


def _score_batch(run: Run, rules: Rules) -> Any:
    """The first held-out batch on the devices, which events score on; None where nothing is held out or scored."""
    if run.eval_batches is None or not any(rule.event.scores for rule in rules.events):
        return None
    return put_batch(next(iter(run.eval_batches())), run.mesh)


def _restore(
    run: Run, start: Start, state: TrainState, metadata: Mapping[str, Any]
) -> tuple[int, TrainState, list[float]]:
    """(steps done, state, last losses) of the newest good checkpoint, the data at its place; a start without one."""
    step, saved = start.newest or (None, None)
    if saved is not None:
        where = f"{run.config.model} is not the base of {run.config.output_dir}"
        check_base_config(where, saved, getattr(run.adapted.base, "config", None))
        check_same_base(run.config, saved, metadata["base_fingerprint"])
        check_same_score_batch(run.config, saved, metadata["score_batch"])
        check_meaning(start.checkpoints.directory / str(step), run.plan, saved.get("adapter_version", 1))
        _check_place(run, saved["iterator"])
    found = start.checkpoints.restore(_items(state), step)
    if found is None:
        _LOGGER.warning("%s has no checkpoint: starting from step 0", run.config.output_dir)
        return 0, state, []
    done, items, saved = found
    run.batches.set_state(saved["iterator"])
    counters = items.pop("counters")
    return done, state._replace(**items, **counters), saved["last_losses"]


def _check_place(run: Run, place: dict[str, Any]) -> None:
    """Goes to a saved place in the data, which fails for other data."""
    try:
        run.batches.set_state(place)
    except DataError as error:
        raise ConfigError(f"data={list(run.config.data)!r}: {error}") from error


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of the state as checkpoints keep them apart."""
    parts = state._asdict()
    counters = {name: parts.pop(name) for name in ("step", "key")}
    return parts | {"counters": counters}


def _compile(
    run: Run,
    step: Step,
    events: Events,
    evaluation: Evaluation | None,
    pulse: Pulse | None,
    state: TrainState,
    done: int,
) -> None:
    """Compiles step, events, evaluation and pulse, so that no later call compiles anything."""
    batch: Any = None
    if done < run.config.steps:
        place = run.batches.get_state()
        batch = put_batch(next(run.batches), run.mesh, run.config.batch_size)
        run.batches.set_state(place)
        step.lower(state, run.params, batch).compile()
        events.compile(range(done + 1, run.config.steps + 1), state, run.params, batch)
    if evaluation is not None:
        evaluation.compile(state, run.params)
    barrier("compiled")  # on CPUs those that never met wait for each other for half a minute only
    if pulse is not None and batch is not None:
        pulse(None, batch)
