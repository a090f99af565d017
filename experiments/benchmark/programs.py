"""The compiled programs that the benchmark's rows compare, and how two of them are timed against each other.

``floor``: frozen weights, gradient of the embedding's output only, no optimiser: what any adapter must pay. ``full``:
full fine-tuning with AdamW. ``adapter_program``: the step that ``mor train`` takes, made by the same ``make_step``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mor_jax.adapters import Adapter, LoRA, make_adapter, method_options
from mor_jax.injection import Adapted, AdapterPlan, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, HeadKernel, head_kernel
from mor_jax.optim import plan_rules
from mor_jax.training.hlo import count_compiled_flops, measure_traffic
from mor_jax.training.losses import chunked_cross_entropy, cross_entropy
from mor_jax.training.step import Loss, init_state, language_model_loss, make_step

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RULE_STEPS = 1000  # of the run that rules which change with the step are made for
LARGEST_RANK = 64  # a method whose rank would have to be larger to have LoRA's parameters keeps this one


@dataclass(frozen=True)
class Shape:
    """A model and a batch: ``rows`` x ``length`` tokens."""

    model: DecoderConfig
    rows: int
    length: int

    def with_model(self, **changes: Any) -> Shape:
        """The same with other fields of the model."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **changes))


def _config(vocab: int, width: int, feed_forward: int, layers: int, heads: int, length: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=length,
    )


SHAPES = {
    "S": Shape(_config(8192, 512, 704, 8, 8, 256), rows=4, length=256),  # that of the targets
    "tiny": Shape(_config(256, 32, 48, 2, 2, 32), rows=2, length=32),  # for tests
}


def make_batch(shape: Shape) -> dict[str, jax.Array]:
    """Full rows of random tokens."""
    size = (shape.rows, shape.length)
    tokens = np.random.default_rng(0).integers(1, shape.model.vocab_size, (size[0], size[1] + 1), dtype=np.int32)
    whole = np.ones(size, np.int32)
    return {
        "input_ids": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_mask": jnp.asarray(whole),
        "segment_ids": jnp.asarray(whole),
        "positions": jnp.asarray(np.broadcast_to(np.arange(size[1], dtype=np.int32), size)),
        "task_ids": jnp.asarray(0 * whole),
        "prompt_mask": jnp.asarray(0 * whole),
    }


def make_params(shape: Shape) -> Any:
    """Random weights of the base."""
    return jax.jit(Decoder(shape.model).init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]


class Program:
    """A compiled program whose ``run`` does one step and waits for it."""

    def __init__(self, name: str, function: Any, state: Any, *rest: Any, options: dict[str, Any] | None = None):
        """Compiles ``function(state, *rest) -> (state, metrics)`` ahead of time; ``state`` may be donated.

        ``options`` are the compiler's. A compiled program that is kept has its state and arguments alive.
        """
        self.name, self.state, self.rest = name, state, rest
        self.compiled = function.lower(state, *rest).compile(compiler_options=options)

    def run(self) -> Any:
        """One step; its metrics."""
        self.state, metrics = self.compiled(self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))
        return metrics

    def run_on(self, batch: Any) -> Any:
        """One step on another batch of the same shape."""
        self.rest = (*self.rest[:-1], batch)
        return self.run()

    @property
    def flops(self) -> float:
        """By XLA's count, which counts a loop's body once: meaningful for unrolled layers."""
        return self.compiled.cost_analysis()["flops"]

    @cached_property
    def counted(self) -> tuple[float, float]:
        """(operations of its matrix products, bytes read and written), loops counted in full, in the compiled text."""
        text = self.compiled.as_text()
        return count_compiled_flops(text), measure_traffic(text).memory

    @property
    def temporary_bytes(self) -> int:
        """Memory that the program needs beside its arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def peak_bytes(self) -> int:
        """By XLA's count: arguments, results that are not theirs, and temporaries."""
        memory = self.compiled.memory_analysis()
        own = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + own + memory.temp_size_in_bytes


@dataclass(frozen=True)
class AdapterStep:
    """Everything of an adapter's step before it is compiled."""

    plan: AdapterPlan
    function: Any
    state: Any
    rest: tuple[Any, ...]

    def compile(self, name: str, options: dict[str, Any] | None = None) -> Program:
        """The program."""
        return Program(name, self.function, self.state, *self.rest, options=options)


def make_plan(adapter: Adapter, config: DecoderConfig) -> AdapterPlan:
    """The adapter on the seven linear maps of each layer."""
    return resolve_sites(Decoder(config), adapter, LINEARS, jax.ShapeDtypeStruct((1, 8), jnp.int32))


def whole_logits_loss(adapted: Adapted, head: Callable[[Any], HeadKernel]) -> Loss:
    """The loss without chunks: all logits at once, differentiated by jax."""

    def loss(variables, batch, inputs):
        arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        hidden = adapted.apply(variables, *arguments, output="hidden", adapter_inputs=inputs)
        kernel, axis = head(variables["params"])
        kernel = jax.lax.stop_gradient(kernel)
        logits = jnp.tensordot(hidden, kernel, ((-1,), (1 - axis,)), preferred_element_type=jnp.float32)
        return cross_entropy(logits, batch["targets"], batch["loss_mask"])

    return loss


def adapter_step(
    adapter: Adapter,
    config: DecoderConfig,
    params: Any,
    batch: Any,
    make_loss: Callable[[Adapted, Callable[[Any], HeadKernel]], Loss] = language_model_loss,
    optimizer: optax.GradientTransformation | None = None,
    accumulate: int = 1,
) -> AdapterStep:
    """The step of ``mor train`` for an adapter on the seven linear maps, with AdamW unless told otherwise.

    ``accumulate`` is the number of micro-batches that the rows of ``batch`` are dealt to.
    """
    plan = make_plan(adapter, config)
    adapted = Adapted(base=Decoder(config), plan=plan)
    rules = plan_rules(plan, total_steps=RULE_STEPS)
    optimizer = rules.wrap(optax.adamw(1e-4) if optimizer is None else optimizer)
    state, constants, _ = init_state(jax.random.key(1), adapted, params, optimizer, rules=rules)
    loss = make_loss(adapted, lambda p: head_kernel(p, config))
    step = make_step(
        adapted,
        optimizer,
        loss=loss,
        accumulate=accumulate,
        constants=constants,
        adapters=state.adapters,
        rules=rules,
    )
    return AdapterStep(plan, step.function, state, (params, step.constants, batch))


def adapter_program(name: str, adapter: Adapter, config: DecoderConfig, params: Any, batch: Any) -> Program:
    """``adapter_step``, compiled."""
    return adapter_step(adapter, config, params, batch).compile(name)


def floor_program(config: DecoderConfig, params: Any, batch: Any) -> Program:
    """Forward and backward to the embedding's output, no weight gradient, no optimiser."""

    def loss(offset, params, batch):
        def add_offset(next_fun, args, kwargs, context):
            if context.module.path == () and context.method_name == "_layers":
                (embedded, extra), *rest = args
                args = ((embedded + offset, extra), *rest)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(add_offset):
            arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
            hidden = Decoder(config).apply({"params": params}, *arguments, output="hidden")
        head, axis = head_kernel(params, config)
        told = (batch["targets"], batch["loss_mask"])
        total, count = chunked_cross_entropy(hidden, head, *told, vocabulary_axis=axis)
        return total / count

    def step(offset, params, batch):
        value, gradient = jax.value_and_grad(loss)(offset, params, batch)
        return gradient * 0, value

    offset = jnp.zeros((*batch["input_ids"].shape, config.hidden_size), config.dtype)
    return Program("floor", jax.jit(step, donate_argnums=0), offset, params, batch)


def full_program(config: DecoderConfig, params: Any, batch: Any) -> Program:
    """Full fine-tuning with AdamW."""
    optimizer = optax.adamw(1e-4)

    def loss(params, batch):
        arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        logits = Decoder(config).apply({"params": params}, *arguments)
        total, count = cross_entropy(logits, batch["targets"], batch["loss_mask"])
        return total / count

    def step(state, batch):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    copy = jax.tree.map(jnp.copy, params)
    return Program("full", jax.jit(step, donate_argnums=0), (copy, optimizer.init(copy)), batch)


def sized_adapter(method: str, config: DecoderConfig, rank: int = 16) -> Adapter:
    """The method at the rank, up to 64, that brings its parameters closest to those of LoRA at ``rank``.

    A method without a rank, or whose own default is above 64, keeps its defaults.
    """
    default = make_adapter(method)
    if "rank" not in method_options(method) or getattr(default, "rank", 0) > LARGEST_RANK:
        return default
    sites = [found.site for found in make_plan(LoRA(rank=rank), config).sites]
    wanted = sum(LoRA(rank=rank).num_params(site) for site in sites)
    candidates = []
    for number in range(1, LARGEST_RANK + 1):
        try:
            adapter = make_adapter(method, rank=number)
            candidates.append((abs(sum(adapter.num_params(site) for site in sites) - wanted), number, adapter))
        except ValueError:  # some methods take only ranks that divide something
            continue
    return min(candidates, key=lambda found: found[:2])[2] if candidates else default


def time_ratio(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    until: float = math.inf,
) -> dict[str, Any]:
    """Median and quartiles of the per-round ratio of process CPU time, and each function's median milliseconds.

    Two calls of each to warm up, then ``rounds`` (at least 2) of first, second in turn; no round after the second
    begins later than ``until``, of ``time.monotonic``. Another ``clock`` takes the place of the CPU time.
    """
    for function in (first, second, first, second):
        function()
    times: dict[str, list[float]] = {"first": [], "second": []}
    for number in range(rounds):
        if number >= 2 and time.monotonic() > until:
            break
        for key, function in (("first", first), ("second", second)):
            start = clock()
            function()
            times[key].append(clock() - start)
    ratios = [a / b for a, b in zip(times["first"], times["second"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "figure": median,
        "low": low,
        "high": high,
        "rounds": len(ratios),
        "first_ms": 1e3 * statistics.median(times["first"]),
        "second_ms": 1e3 * statistics.median(times["second"]),
    }
