"""`mor plan --search`: mesh, remat policy and micro-batches compiled one after the other, and the fastest that fits.

A compile takes a minute for a large slice, so only what may be the best is tried:

    mesh            all devices on fsdp, or 2 or 4 of them on data or tensor; `sequence` where rows are long, and as
                    much of it as is needed where the rows of a batch are fewer than the devices
    remat           none, dots, full; offload only where nothing else fits: it computes as much again as full does, and
                    the estimate knows no time for what travels to the host
    micro-batches   the fewest that fit: more only add gathers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from mor_jax.models import DecoderConfig
from mor_jax.training.config import TrainConfig
from mor_jax.training.mesh import MeshError
from mor_jax.training.plan import Forecast, forecast
from mor_jax.training.topology import Topology

REMATS = ("none", "dots", "full")
LONG = 2**14  # tokens of a row whose activations may cost a device more than gathering the keys of its other parts
_SPLITS = (1, 2, 4)  # sizes of data, tensor and, for long rows, sequence that are tried beside fsdp


def search(
    config: TrainConfig, shape: DecoderConfig, topology: Topology, tell: Callable[[Forecast], None] = lambda _: None
) -> tuple[Forecast, list[Forecast]]:
    """(the fastest plan that fits, or the smallest if none does; all that were compiled).

    Args:
      config: of the run; its mesh, remat and accumulate are what is searched.
      shape: of the base.
      topology: of `load_topology`.
      tell: called with each plan as it is known.

    Raises:
      MeshError: no mesh fits the batch and the model; says why the first that was tried does not.
    """
    tried: list[Forecast] = []
    problems: list[MeshError] = []

    def compile_until_one_fits(layout: str, remat: str) -> None:
        for accumulate in (n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0):
            candidate = dataclasses.replace(config, mesh=layout, remat=remat, accumulate=accumulate)
            try:
                found = forecast(candidate, shape, topology)
            except MeshError as error:
                problems.append(error)
                return
            tried.append(found)
            tell(found)
            if found.fits:
                return

    layouts = list(_layouts(len(topology.devices), config))
    for layout in layouts:
        for remat in REMATS:
            compile_until_one_fits(layout, remat)
    if not any(found.fits for found in tried) and not topology.name.startswith("cpu"):
        for layout in layouts:
            compile_until_one_fits(layout, "offload")
    if not tried:
        raise problems[0]
    return min(tried, key=_preference), tried


def _layouts(devices: int, config: TrainConfig) -> Iterator[str]:
    for data in _SPLITS:
        for tensor in _SPLITS:
            if min(data, tensor) == 1 and devices % (data * tensor) == 0:
                yield f"data={data},fsdp={devices // data // tensor},sequence=1,tensor={tensor}"
    for sequence in _sequence_splits(devices, config):
        yield f"data=1,fsdp={devices // sequence},sequence={sequence},tensor=1"


def _sequence_splits(devices: int, config: TrainConfig) -> list[int]:
    """Sizes of `sequence`: those of long rows, and the least that leaves each device a row or a part of one."""
    sizes = [size for size in range(2, devices + 1) if devices % size == 0 and config.sequence_length % size == 0]
    chosen = [size for size in sizes if size in _SPLITS and config.sequence_length >= LONG]
    if config.batch_size < devices:
        chosen += [size for size in sizes if config.batch_size % (devices // size) == 0][:1]
    return sorted(set(chosen))


def _preference(found: Forecast) -> tuple[bool, float, float, int]:
    """What fits first, then the faster, then the fewer operations, then the smaller."""
    seconds = found.estimated_seconds or 0.0
    costs = (seconds, found.flops) if found.fits else (0.0, 0.0)
    return not found.fits, *costs, found.peak_bytes_per_device
