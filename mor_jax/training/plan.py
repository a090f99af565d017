"""What a training step needs on a slice that is not there: the exact step of `mor train`, compiled from shapes alone.

The compiler tells memory; operations are counted in the program's own jaxpr, bytes and collectives in its partitioned
text (`hlo.py`). The time is a roofline: the largest of operations / peak, HBM bytes / bandwidth and collective bytes /
link bandwidth, as if the three overlapped perfectly, because the compiler's own estimate counts loop bodies once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.data import BATCH_FIELDS
from mor_jax.injection import Adapted, AdapterPlan, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, abstract_params
from mor_jax.optim import Rules, plan_rules
from mor_jax.training.backend import for_backend
from mor_jax.training.build import base_specs, decoder_loss
from mor_jax.training.config import TrainConfig
from mor_jax.training.hlo import Traffic, count_flops, measure_traffic
from mor_jax.training.mesh import check_batch, check_length, make_mesh
from mor_jax.training.optimizer import make_optimizer, plan_decay_mask
from mor_jax.training.step import Loss, StateShardings, Step, TrainState, abstract_state, make_step
from mor_jax.training.topology import Chip, Topology


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One plan: how a step is laid out and what it costs on one device.

    Attributes:
      topology: name of the slice.
      mesh: "data=1,fsdp=16,sequence=1,tensor=1".
      remat: what the backward pass recomputes.
      accumulate: micro-batches of a step.
      fits: whether the peak is within the capacity.
      peak_bytes_per_device: arguments, outputs that are not theirs, and temporaries.
      capacity_bytes: of one device.
      argument_bytes: base, adapters, optimiser state and batch.
      temporary_bytes: everything alive only inside the step, as the compiler tells it. TPU's counts the gaps between
        buffers twice: a 405B step told to need 54.5 GiB compiled for a chip of 45.5.
      host_bytes: of those, what waits in the host's memory (`remat="offload"`).
      flops: matrix products of the whole step over all devices.
      bytes: memory traffic of one device.
      collectives: {kind: {"bytes": of one device, "count": ..., "largest": bytes of its largest output}}.
      estimated_seconds: by the roofline, whose three roofs follow; None where the chip's speed is not known.
      mfu: 4 N operations a token (forward, and backward to the activations) / peak / estimated_seconds.
      gathered_stacks: stacked base parameters that some device holds whole, or its `tensor` part of; should be none.
      trainable_parameters: of the adapters.
      problem: the compiler's own words when it refused; "" otherwise.
    """

    topology: str
    mesh: str
    remat: str
    accumulate: int
    fits: bool
    peak_bytes_per_device: int
    capacity_bytes: int
    flops: float
    argument_bytes: int = 0
    temporary_bytes: int = 0
    host_bytes: int = 0
    bytes: float = 0.0
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    network_seconds: float | None = None
    estimated_seconds: float | None = None
    mfu: float | None = None
    gathered_stacks: tuple[str, ...] = ()
    trainable_parameters: int = 0
    problem: str = ""


class LaidOut(NamedTuple):
    """A run as shapes on a mesh: nothing is allocated.

    Attributes:
      adapted: the model with its plan.
      params: the frozen base.
      optimizer: wrapped by the rules.
      rules: of the methods.
      state: before step one.
      constants: of the adapters.
      shardings: of all these.
      loss: of the step.
    """

    adapted: Adapted
    params: Any
    optimizer: optax.GradientTransformation
    rules: Rules
    state: TrainState
    constants: Any
    shardings: StateShardings
    loss: Loss

    @property
    def plan(self) -> AdapterPlan:
        """Where the adapters sit."""
        assert self.adapted.plan is not None
        return self.adapted.plan

    def placed(self) -> tuple[Any, Any, Any]:
        """Base, state and constants as shapes that know where they lie."""

        def place(tree: Any, shardings: Any) -> Any:
            return jax.tree.map(
                lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings
            )

        own = self.shardings
        return place(self.params, own.params), place(self.state, own.state), place(self.constants, own.constants)


def local_bytes(tree: Any) -> int:
    """Bytes on one device of shapes that know where they lie."""
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def lay_out(config: TrainConfig, shape: DecoderConfig, mesh: jax.sharding.Mesh) -> LaidOut:
    """The run of `config` on `mesh`.

    Args:
      config: of the run; its batch size, sequence length, method, targets and optimiser count.
      shape: of the base, with the run's dtypes and remat.
      mesh: over real or compile-only devices.

    Raises:
      MeshError, InjectionError: the mesh does not fit the model, or a target matches nothing.
    """
    specs = base_specs(shape, mesh)
    decoder, params = Decoder(shape), abstract_params(shape)
    plan = resolve_sites(
        decoder,
        config.adapter(),
        config.target_modules,
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
        overrides=config.override_adapters(),
        trained_modules=config.trained_modules,
    )
    adapted = Adapted(base=decoder, plan=plan)
    rules = plan_rules(plan, config.steps)
    optimizer = rules.wrap(make_optimizer(config, None, plan_decay_mask(plan)))
    state, constants, shardings = abstract_state(adapted, params, optimizer, mesh, specs, rules)
    loss = decoder_loss(config, adapted, plan, shape)
    return LaidOut(adapted, params, optimizer, rules, state, constants, shardings, loss)


def plan_step(
    config: TrainConfig, shape: DecoderConfig, mesh: jax.sharding.Mesh
) -> tuple[Step, tuple[Any, Any, Any], AdapterPlan]:
    """(the step of a run on `mesh`, its arguments as shapes, its adapter plan); arguments and errors of `lay_out`."""
    run = lay_out(config, shape, mesh)
    return *_step_of(run, config), run.plan


def _step_of(run: LaidOut, config: TrainConfig) -> tuple[Step, tuple[Any, Any, Any]]:
    """(the step of a run that is laid out, its arguments as shapes)."""
    step = make_step(
        run.adapted,
        run.optimizer,
        loss=run.loss,
        accumulate=config.accumulate,
        num_tasks=1,
        constants=run.constants,
        shardings=run.shardings,
        adapters=run.state.adapters,
        rules=run.rules,
    )
    rows = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
    return step, (run.state, run.params, {name: rows for name in BATCH_FIELDS})


def forecast(config: TrainConfig, shape: DecoderConfig, topology: Topology) -> Forecast:
    """The plan of `config` on a slice; a step that does not fit comes back with `fits` false and the reason.

    Args:
      config: of the run; an empty mesh puts every device on `fsdp`.
      shape: of the base, with the run's dtypes.
      topology: of `load_topology`.

    Raises:
      MeshError: the mesh does not fit the slice, the batch or the model.
    """
    mesh = make_mesh(config.mesh or "fsdp=-1", topology.devices)
    check_batch(mesh, config.batch_size, config.accumulate)
    check_length(mesh, config.sequence_length)
    fitted = for_backend(dataclasses.replace(shape, remat=config.remat), config, mesh)
    assert isinstance(fitted, DecoderConfig)  # as it came
    shape = fitted
    run = lay_out(config, shape, mesh)
    step, (state, params, batch) = _step_of(run, config)
    traced = step.function.trace(state, params, step.constants, batch)
    common: dict[str, Any] = {
        "topology": topology.name,
        "mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "remat": config.remat,
        "accumulate": config.accumulate,
        "capacity_bytes": topology.capacity_bytes,
        "flops": count_flops(traced.jaxpr),
        "trainable_parameters": run.plan.num_params(),
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(error, local_bytes(run.placed()), common)
    useful = 4.0 * _matrix_size(shape) * config.batch_size * config.sequence_length
    return _accepted(compiled, run.placed()[0], topology, useful, common)


def _refused(error: Exception, argument_bytes: int, common: dict[str, Any]) -> Forecast:
    """The forecast of a step whose compiler ran out of memory; raises `error` if it says anything else."""
    peak = needed_bytes(str(error), argument_bytes)
    if peak is None:
        raise error
    return Forecast(
        **common,
        fits=False,
        peak_bytes_per_device=peak,
        argument_bytes=argument_bytes,
        temporary_bytes=peak - argument_bytes,
        problem=" ".join(str(error).split())[:300],
    )


def _accepted(compiled: Any, params: Any, topology: Topology, useful: float, common: dict[str, Any]) -> Forecast:
    """The forecast of a compiled step; `useful` operations are what its mfu counts."""
    memory, traffic = compiled.memory_analysis(), measure_traffic(compiled.as_text())
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Forecast(
        **common,
        fits=peak <= topology.capacity_bytes,
        peak_bytes_per_device=peak,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        host_bytes=memory.host_temp_size_in_bytes,
        bytes=traffic.memory,
        collectives={
            kind: {"bytes": size, "count": traffic.counts[kind], "largest": traffic.largest[kind]}
            for kind, size in traffic.collectives.items()
        },
        gathered_stacks=gathered_stacks(params, traffic),
        **roofline(common["flops"], traffic, len(topology.devices), topology.chip, useful),
    )


def roofline(flops: float, traffic: Traffic, devices: int, chip: Chip | None, useful: float) -> dict[str, Any]:
    """The three roofs in seconds, the largest of them, and the share of the peak that useful operations then reach.

    {} where the chip is not known.
    """
    if chip is None:
        return {}
    compute = flops / devices / chip.flops
    memory = traffic.memory / chip.memory_bandwidth
    network = sum(traffic.collectives.values()) / chip.link_bandwidth
    seconds = max(compute, memory, network)
    return {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "network_seconds": network,
        "estimated_seconds": seconds,
        "mfu": useful / devices / chip.flops / seconds,
    }


def gathered_stacks(params: Any, traffic: Traffic) -> tuple[str, ...]:
    """Names of the parameters of several layers that a collective makes whole, or whole but for `tensor`.

    Args:
      params: shapes of the base that know where they lie.
      traffic: of the program.
    """
    leaves = jax.tree.leaves_with_path(params)
    stacks = [(path, leaf) for path, leaf in leaves if leaf.ndim >= 3 and leaf.shape[0] > 1]
    whole = [path for path, leaf in stacks if _gathered_shapes(leaf) & traffic.gathered]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in whole)


def _gathered_shapes(leaf: Any) -> set[tuple[int, ...]]:
    """What `Traffic.gathered` has of a parameter that is gathered over all mesh axes, or over all but `tensor`.

    Nothing that a device holds anyway.
    """
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    inner = PartitionSpec(*("tensor" if "tensor" in part else None for part in parts))
    shapes = {leaf.shape, NamedSharding(mesh, inner).shard_shape(leaf.shape)} - {leaf.sharding.shard_shape(leaf.shape)}
    return {tuple(sorted(size for size in shape if size > 1)) for shape in shapes}


def _matrix_size(shape: DecoderConfig) -> int:
    """Parameters that a token is multiplied with: all matrices but the embedding table's look-up."""
    leaves = jax.tree.leaves_with_path(abstract_params(shape))
    size = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    return size + (shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0)


def needed_bytes(message: str, argument_bytes: int) -> int | None:
    """Bytes of a device that a compiler's out-of-memory message asks for; None for other messages.

    Args:
      message: of the error.
      argument_bytes: what is told if the message has no figure, and added where it tells of temporaries only.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    size = r"([\d.]+)([KMGT])(?:iB?)?"
    total, temporaries = (re.search(form, message) for form in (rf"[Uu]sed {size} of", rf"temporaries \({size}\)"))
    if (found := total or temporaries) is None:
        return argument_bytes
    told = int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))
    return told if total else told + argument_bytes


def advice(found: Forecast) -> str:
    """One line on what does not fit and what to change; "" when it fits."""
    if found.fits:
        return ""
    gib = 2**30
    lacking = "the step does not fit a device"
    if found.peak_bytes_per_device > found.capacity_bytes:
        over = found.peak_bytes_per_device - found.capacity_bytes
        lacking = f"the step needs {found.peak_bytes_per_device / gib:.1f} GiB a device, {over / gib:.1f} too many"
        if found.argument_bytes > found.capacity_bytes:
            return f"{lacking}, and the base alone is too large: use a larger slice, or more fsdp or tensor in --mesh"
    less = "--remat full" if found.remat in ("none", "dots") else "a higher --accumulate or a shorter --sequence-length"
    if found.remat == "full" and not found.topology.startswith("cpu"):
        less = f"--remat offload, {less}"
    return f"{lacking}: try {less}, more fsdp or tensor in --mesh, a smaller --batch-size, or a larger slice"
