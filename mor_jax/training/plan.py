"""What a training step needs on a slice that is not there: the exact step of `mor train`, compiled from shapes alone.

The compiler tells memory; operations are counted in the program's own jaxpr, bytes and collectives in its partitioned
text (`hlo.py`). The time is a roofline: the largest of operations / peak, HBM bytes / bandwidth and collective bytes /
link bandwidth, as if the three overlapped perfectly, because the compiler's own estimate counts loop bodies once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.injection import Adapted, AdapterPlan, resolve_sites
from mor_jax.models import Decoder, DecoderConfig, abstract_params
from mor_jax.training.build import frozen_head
from mor_jax.training.config import TrainConfig
from mor_jax.training.hlo import Traffic, count_flops, measure_traffic
from mor_jax.training.mesh import MeshError, check_batch, make_mesh, param_specs
from mor_jax.training.optimizer import make_optimizer, plan_decay_mask
from mor_jax.training.step import Step, abstract_state, language_model_loss, make_step
from mor_jax.training.topology import Chip, Topology

BATCH_FIELDS = ("input_ids", "targets", "loss_mask", "segment_ids", "positions", "task_ids", "prompt_mask")


@dataclass(frozen=True)
class Forecast:
    """One plan: how a step is laid out and what it costs on one device.

    Attributes:
      mesh: "data=1,fsdp=16".
      remat: what the backward pass recomputes.
      accumulate: micro-batches of a step.
      fits: whether the peak is within the capacity.
      peak_bytes_per_device: arguments, outputs that are not theirs, and temporaries.
      capacity_bytes: of one device; 0 where it is not known (the CPU).
      argument_bytes: base, adapters, optimiser state and batch.
      temporary_bytes: everything alive only inside the step.
      flops: matrix products of the whole step over all devices.
      bytes: HBM traffic of one device.
      collectives: bytes of one device by kind.
      estimated_seconds: by the roofline; None where the chip is not known.
      compute_seconds, memory_seconds, network_seconds: its three roofs.
      mfu: 4 N operations a token (forward, and backward to the activations) / peak / estimated_seconds.
      problem: the compiler's own words when it refused; "" otherwise.
    """

    mesh: str
    remat: str
    accumulate: int
    fits: bool
    peak_bytes_per_device: int
    capacity_bytes: int
    argument_bytes: int = 0
    temporary_bytes: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    collective_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    largest_collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    network_seconds: float | None = None
    estimated_seconds: float | None = None
    mfu: float | None = None
    trainable_parameters: int = 0
    problem: str = ""


def lower_step(config: TrainConfig, shape: DecoderConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Step, Any, AdapterPlan]:
    """(lowered step, the step, its abstract arguments, its plan) of a run on `mesh`; nothing is allocated.

    Args:
      config: of the run; its batch size, sequence length, method, targets and optimiser count.
      shape: of the base, with the run's dtypes and remat.
      mesh: over real or compile-only devices.
    """
    decoder = Decoder(shape)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plan = resolve_sites(
        decoder,
        config.adapter(),
        config.target_modules,
        example,
        overrides=config.override_adapters(),
        trained_modules=config.trained_modules,
    )
    adapted = Adapted(base=decoder, plan=plan)
    optimizer = make_optimizer(config, None, plan_decay_mask(plan))
    params = abstract_params(shape)
    specs = param_specs(params, mesh)
    state, constants, shardings = abstract_state(adapted, params, optimizer, mesh, specs)
    step = make_step(
        adapted,
        optimizer,
        loss=language_model_loss(adapted, frozen_head(plan, shape), config.loss_chunk),
        accumulate=config.accumulate,
        constants=constants,
        shardings=shardings,
        adapters=state.adapters,
    )
    rows = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
    arguments = (state, params, {name: rows for name in BATCH_FIELDS})
    return step.lower(*arguments), step, arguments, plan


def forecast(config: TrainConfig, shape: DecoderConfig, topology: Topology) -> Forecast:
    """The plan of `config` on a slice; a step that does not fit comes back with `fits` false and the reason.

    Raises:
      MeshError: the mesh does not fit the slice or the batch.
    """
    mesh = make_mesh(config.mesh or "fsdp=-1", topology.devices)
    check_batch(mesh, config.batch_size, config.accumulate)
    shape = dataclasses.replace(shape, remat=config.remat)
    lowered, step, arguments, plan = lower_step(config, shape, mesh)
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    common: dict[str, Any] = {
        "mesh": sizes,
        "remat": config.remat,
        "accumulate": config.accumulate,
        "capacity_bytes": 0 if topology.chip is None else topology.chip.capacity_bytes,
        "trainable_parameters": plan.num_params(),
    }
    try:
        compiled = lowered.compile()
    except Exception as error:  # the compiler's error type differs between backends; only memory is a verdict
        used = _used_bytes(str(error))
        if used is None:
            raise
        return Forecast(**common, fits=False, peak_bytes_per_device=used, problem=" ".join(str(error).split())[:300])
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = count_flops(step.function, arguments[0], arguments[1], step.constants, arguments[2])
    traffic = measure_traffic(compiled.as_text())
    tokens = config.batch_size * config.sequence_length
    return Forecast(
        **common,
        fits=not common["capacity_bytes"] or peak <= common["capacity_bytes"],
        peak_bytes_per_device=peak,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=flops,
        bytes=traffic.memory,
        collectives=traffic.collectives,
        collective_counts=traffic.counts,
        largest_collectives=traffic.largest,
        **roofline(flops, traffic, mesh.size, topology.chip, 4.0 * _matrix_size(shape) * tokens),
    )


def roofline(flops: float, traffic: Traffic, devices: int, chip: Chip | None, useful: float) -> dict[str, float]:
    """The three roofs in seconds, the largest of them, and the share of the peak that useful operations then reach."""
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


def _matrix_size(shape: DecoderConfig) -> int:
    """Parameters that a token is multiplied with: all matrices but the embedding table's look-up."""
    leaves = jax.tree.leaves_with_path(abstract_params(shape))
    size = sum(math.prod(leaf.shape) for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path))
    return size + (shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0)


def _used_bytes(message: str) -> int | None:
    """Bytes that a compiler's out-of-memory message says it needed, or None for any other message."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT])(?:iB)? of", message)
    if found is None:
        return 0
    return int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))


def candidates(config: TrainConfig, devices: int, remats: Sequence[str]) -> Iterator[TrainConfig]:
    """The layouts that `search` tries: every split of the devices over data and fsdp, remat policy and micro-batch."""
    for fsdp in (size for size in range(devices, 0, -1) if devices % size == 0):
        for accumulate in _divisors(config.batch_size // devices):
            for remat in remats:
                mesh = f"data={devices // fsdp},fsdp={fsdp}"
                yield dataclasses.replace(config, mesh=mesh, accumulate=accumulate, remat=remat)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0] or [1]


def advice(found: Forecast, config: TrainConfig) -> str:
    """One line on what would not fit and what to change; "" when it fits."""
    if found.fits:
        return ""
    over = found.peak_bytes_per_device - found.capacity_bytes
    change = "--remat full" if config.remat != "full" else "a higher --accumulate, a shorter --sequence-length"
    return (
        f"{found.peak_bytes_per_device / 2**30:.1f} GiB a device, {over / 2**30:.1f} more than there are: "
        f"try {change}, more fsdp in --mesh, or a larger slice"
    )


__all__ = ["Forecast", "MeshError", "advice", "candidates", "forecast", "lower_step", "roofline"]
