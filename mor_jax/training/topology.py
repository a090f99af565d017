"""Accelerator slices by name, without the hardware: their devices for compiling, and what a chip can do.

v5e:4x4      16 chips of TPU v5e; compiled by XLA's TPU compiler, which runs on any machine with the `tpu` extra
cpu:8        8 virtual devices of this machine's CPU
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any


class TopologyError(ValueError):
    """A slice that does not exist, or whose compiler is not installed; says what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Chip:
    """Published peak figures of one chip (Google Cloud's TPU system architecture pages).

    Attributes:
      capacity_bytes: HBM of one JAX device.
      flops: bfloat16 operations a second of one JAX device.
      memory_bandwidth: HBM bytes a second of one JAX device.
      link_bandwidth: interconnect bytes a second out of one JAX device, over all its links.
      accelerator: pattern of the accelerator type that the compiler asks for; `{chips}` or `{cores}` is filled in.
      devices_per_chip: JAX devices of a chip.
      torus: slices whose axes are all multiples of 4 are compiled for as tori: each axis has links from its end to its
        start (of v5p Google's pages say so).
    """

    capacity_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    accelerator: str
    devices_per_chip: int = 1
    torus: bool = False


_DEVICE_COUNT = "xla_force_host_platform_device_count"
_GIB = 2**30
CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, 1.228e12, 300e9, "v4-{cores}"),
    "v5e": Chip(16 * _GIB, 197e12, 0.819e12, 200e9, "v5litepod-{chips}"),
    "v5p": Chip(95 * _GIB, 459e12, 2.765e12, 600e9, "v5p-{cores}", torus=True),
    "v6e": Chip(32 * _GIB, 918e12, 1.640e12, 448e9, "v6e-{chips}"),
    "tpu7x": Chip(96 * _GIB, 1153e12, 3.690e12, 600e9, "tpu7x-{cores}", devices_per_chip=2),
}
_CUBE = 4  # chips along each axis of the cubes that tori are made of


@dataclass(frozen=True)
class Topology:
    """A slice: its name, its devices (for compiling only, unless it is the CPU) and its chip (None for the CPU)."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None

    @property
    def capacity_bytes(self) -> int:
        """Memory of one device; this machine's divided by its virtual devices for the CPU."""
        if self.chip is not None:
            return self.chip.capacity_bytes
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(self.devices)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5e", (4, 4)) of "v5e:4x4"; ("cpu", (8,)) of "cpu:8".

    Raises:
      TopologyError: the name is malformed or the kind unknown.
    """
    kind, _, shape = name.partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise TopologyError(
            f"topology {name!r}: write KIND:SHAPE, KIND of {', '.join(CHIPS)} or cpu, as in v5e:4x4, cpu:8"
        )
    sizes = tuple(int(size) for size in shape.split("x"))
    if min(sizes) < 1:
        raise TopologyError(f"topology {name!r}: every size must be at least 1")
    return kind, sizes


def prepare_environment(name: str) -> None:
    """Sets what the compiler reads from the environment; call before the first use of jax in the process.

    Raises:
      TopologyError: as `parse_topology`.
    """
    kind, sizes = parse_topology(name)
    count = math.prod(sizes)
    if kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        if (given := re.search(rf"--{_DEVICE_COUNT}=(\d+)", flags)) is None or int(given[1]) < count:
            os.environ["XLA_FLAGS"] = f"{flags} --{_DEVICE_COUNT}={count}".strip()  # the last one counts
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        return
    accelerator = CHIPS[kind].accelerator.format(chips=count, cores=2 * count)
    wanted = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for variable, value in wanted.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def wrap_options(kind: str, sizes: tuple[int, ...]) -> dict[str, list[int]]:
    """What tells the compiler that a slice is a torus; {} for a mesh, which is what it takes every slice for.

    On a mesh in three dimensions it has no all-gather over all chips: it adds up whole arrays that are zero but for
    each chip's part, which sends twice the bytes and holds every gathered kernel twice.
    """
    return {"wrap": [1] * len(sizes)} if CHIPS[kind].torus and all(size % _CUBE == 0 for size in sizes) else {}


def load_topology(name: str) -> Topology:
    """The slice called `name`.

    Raises:
      TopologyError: it is malformed, its compiler is missing, or the CPU has fewer virtual devices.
    """
    import jax
    from jax.experimental import topologies

    kind, sizes = parse_topology(name)
    count = math.prod(sizes)
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < count:
            raise TopologyError(
                f"topology {name!r}: this process has {len(devices)} CPU devices; "
                f"start it with XLA_FLAGS=--{_DEVICE_COUNT}={count}"
            )
        return Topology(name, tuple(devices[:count]), None)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **wrap_options(kind, sizes))
    except Exception as error:  # the plugin raises errors of many kinds for a missing library and for a wrong shape
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TopologyError(
            f"topology {name!r} cannot be compiled for ({reason}): check the shape, and install mor_jax[tpu]"
        ) from error
    return Topology(name, tuple(found.devices), CHIPS[kind])
