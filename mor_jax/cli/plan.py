"""`mor plan`: what a training step needs on a slice that is not there, compiled from shapes alone."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from typing import Any

from mor_jax.cli.options import PlanOptions

_GIB = 2**30


def plan_command(options: PlanOptions) -> dict[str, Any]:
    """The step of `mor train` with these options, compiled for a slice.

    Keys: those of `training.plan.Forecast` (`fits`, `peak_bytes_per_device`, `capacity_bytes`, `flops`,
    `estimated_seconds`, `collectives` and more), `advice` (one line, empty when it fits), `merge` (the keys of
    `training.plan_merge.MergeForecast`), and with `search` also `tried` (mesh, remat, accumulate, fits, peak and
    estimate of each plan that was compiled). `train` are the words of `mor train` that take this step.

    Raises:
      TopologyError, MeshError, ConfigError, ModelFileError, InjectionError: a name, file or layout is not usable.
    """
    from mor_jax.training.topology import load_topology, parse_topology, prepare_environment

    prepare_environment(options.topology)  # before jax reads the environment
    from mor_jax.models import DecoderConfig, known_config
    from mor_jax.training.config import ConfigError, TrainConfig, config_from_mapping
    from mor_jax.training.plan import advice, forecast
    from mor_jax.training.plan_merge import forecast_merge
    from mor_jax.training.plan_search import search

    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"model"}
    given = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    on_cpu = parse_topology(options.topology)[0] == "cpu"
    config = config_from_mapping({"dtype": "float32" if on_cpu else "bfloat16"} | given, "command line")
    stored = known_config(options.model)
    if not isinstance(stored, DecoderConfig):
        raise ConfigError(f"model={options.model!r} is an encoder: only steps of causal decoders are planned")
    shape = dataclasses.replace(
        stored,
        dtype=config.dtype,
        param_dtype=config.param_dtype or config.dtype,
        scan_layers=config.scan_layers,
    )
    topology = load_topology(options.topology)
    more: dict[str, Any] = {}
    if options.search:
        found, tried = search(config, shape, topology, _tell)
        more = {"tried": [_row(plan) for plan in tried]}
    else:
        found = forecast(config, shape, topology)
    taken = dataclasses.replace(config, mesh=found.mesh, remat=found.remat, accumulate=found.accumulate)
    merge = dataclasses.asdict(forecast_merge(taken, shape, topology))
    more |= {"train": train_words(options.model, taken)}
    return dataclasses.asdict(found) | {"advice": advice(found), "merge": merge} | more


def train_words(model: str, config: Any) -> str:
    """`mor train` with a flag for each field that is not its default; `mor plan` has other defaults of its own."""
    words = ["mor", "train", "--model", model]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            words += [f"--{flag}", json.dumps(value)]
        else:
            words += [f"--{flag}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _row(found: Any) -> dict[str, Any]:
    names = ("mesh", "remat", "accumulate", "fits", "peak_bytes_per_device", "estimated_seconds")
    return {name: getattr(found, name) for name in names}


def _tell(found: Any) -> None:
    verdict = "fits" if found.fits else "does not fit"
    print(f"{found.mesh} remat={found.remat} accumulate={found.accumulate}: {verdict}", file=sys.stderr)


def readable(result: dict[str, Any]) -> dict[str, Any]:
    """The result for people: GiB and seconds, the estimate called one, one line for each kind of collective."""

    def seconds(name: str) -> str:
        return "not known" if result[name] is None else f"{result[name]:.4g} s"

    roofs = ("compute_seconds", "memory_seconds", "network_seconds")
    names = ("topology", "mesh", "remat", "accumulate", "trainable_parameters", "fits")
    shown = {name: result[name] for name in names} | {
        "peak a device": f"{_gib(result['peak_bytes_per_device'])} of {_gib(result['capacity_bytes'])}",
        "arguments": _gib(result["argument_bytes"]),
        "temporaries": _gib(result["temporary_bytes"]),
        "in the host's memory": _gib(result["host_bytes"]),
        "operations of a step": f"{result['flops']:.4g}",
        "memory traffic a device": _gib(result["bytes"]),
        "step time (an estimate: the highest of three roofs)": seconds("estimated_seconds"),
        "roofs (compute, memory, network)": ", ".join(map(seconds, roofs)),
        "mfu (of that estimate)": result["mfu"],
        "merge, peak a device": _merge(result["merge"]),
        "collectives": [_collective(kind, own) for kind, own in result["collectives"].items()],
    }
    if "tried" in result:
        peak = "peak_bytes_per_device"
        shown["tried"] = [row | {peak: _gib(row[peak])} for row in result["tried"]]
    notes = {name: result[name] for name in ("problem", "advice", "train") if result[name]}
    return shown | notes


def _gib(size: float) -> str:
    return f"{size / _GIB:.3f} GiB"


def _merge(own: dict[str, Any]) -> str:
    return _gib(own["peak_bytes_per_device"]) if own["fits"] else own["problem"]


def _collective(kind: str, own: dict[str, Any]) -> dict[str, Any]:
    sizes = {"bytes a device": _gib(own["bytes"]), "largest": _gib(own["largest"])}
    return {"kind": kind, "a step": int(own["count"])} | sizes
