"""LoRA, rsLoRA and DoRA as the adapter folder that PEFT loads on the base, and the way back.

adapter_config.json         ranks and scales, as PEFT's LoraConfig names them
adapter_model.safetensors   base_model.model.<module>.lora_A.weight (rank, in), lora_B.weight (out, rank),
                            lora_magnitude_vector (out,); modules trained whole under their own names
manifest.json               checksums, written last

One table (`_entries`) says which tensor is which leaf, and is read in both directions.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from mor_jax.adapters import Adapter, DoRA, Leaves, LoRA, RsLoRA
from mor_jax.injection import AdapterPlan
from mor_jax.merging import FidelityReport
from mor_jax.models import DecoderConfig, EncoderConfig, ModelConfig
from mor_jax.models.tensor_file import new_folder, save_tensors
from mor_jax.models.tensors import TensorEntry, tensor_table
from mor_jax.processes import gathered
from mor_jax.training.integrity import write_manifest
from mor_jax.training.recorded_base import absolute_path, expanded_path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEAVES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


class ExportError(ValueError):
    """A format cannot hold what was asked of it; the message names the site and the format that can."""

    exit_code = 2


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: row `layer` (None: all) of leaf `keys` of `path`, transposed or not."""

    name: str
    path: str
    keys: tuple[str, ...]
    layer: int | None
    transpose: bool


def export_peft(
    plan: AdapterPlan,
    leaves: Leaves,
    config: ModelConfig,
    directory: str | os.PathLike,
    *,
    base_model: str | os.PathLike = "",
    report: FidelityReport | None = None,
) -> Path:
    """Writes a PEFT adapter folder, beside its final place and renamed: it is there whole or not at all.

    Args:
      plan: where the adapters sit; all of them LoRA and rsLoRA, or all DoRA.
      leaves: their arrays.
      config: of the base, which names the modules.
      directory: to be made; must not exist, or be empty.
      base_model: what `base_model_name_or_path` says: a folder, by its absolute path, so that PEFT finds it from
        anywhere on this machine, or else a name on the hub. The `_name_or_path` in a base's config.json is no such
        name: in a fine-tuned model it is that of its parent.
      report: how well this adapter imitates another, saved as `fidelity.json`.

    Raises:
      ExportError: a method or a trained module has no place in PEFT's format.
      FileExistsError: `directory` is there and not empty.
    """
    target = Path(directory)
    described = peft_config(plan, config, base_model=base_model)
    params = gathered(leaves.params)
    with new_folder(target) as folder:
        if folder is not None:
            save_tensors(_tensors(params, _entries(plan, config)), folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            if report is not None:
                report.save(folder)
            write_manifest(folder)
    return target


def _tensors(params: Mapping[str, Any], entries: list[_Entry]) -> dict[str, np.ndarray]:
    tensors = {}
    for entry in entries:
        value: Any = params[entry.path]
        for key in entry.keys:
            value = value[key]
        array = np.asarray(value if entry.layer is None else value[entry.layer])
        tensors[entry.name] = np.ascontiguousarray(array.T if entry.transpose else array)
    return tensors


def read_peft(directory: str | os.PathLike, config: ModelConfig, plan: AdapterPlan, like: Leaves) -> Leaves:
    """The leaves in a folder of `export_peft`; `like` has their structure and the leaves that PEFT does not hold."""
    tensors = load_file(Path(directory) / WEIGHTS)
    params = _empty(like.params)
    for entry in _entries(plan, config):
        tree: Any = params[entry.path]
        for key in entry.keys[:-1]:
            tree = tree[key]
        value = tensors[entry.name].T if entry.transpose else tensors[entry.name]
        if entry.layer is None:
            tree[entry.keys[-1]] = value
        else:
            tree[entry.keys[-1]][entry.layer] = value
    return Leaves(_as_jax(params), like.state, like.constants)


def _empty(tree: Any) -> Any:
    return (
        {k: _empty(v) for k, v in tree.items()} if isinstance(tree, dict) else np.full(tree.shape, np.nan, tree.dtype)
    )


def _as_jax(tree: Any) -> Any:
    return {k: _as_jax(v) for k, v in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)


def peft_config(plan: AdapterPlan, config: ModelConfig, *, base_model: str | os.PathLike = "") -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    Raises:
      ExportError: a method or a trained module has no place in PEFT's format.
    """
    table = tensor_table(config)
    methods = _check_methods(plan)
    rs = all(type(method) is RsLoRA for method in methods)
    modules = {name: site.adapter for site in plan.sites for name, _ in _modules(table, site.site.path)}
    (rank, alpha), _ = Counter(_rank_alpha(method, rs) for method in modules.values()).most_common(1)[0]
    own = {name: _rank_alpha(method, rs) for name, method in modules.items()}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(config, EncoderConfig) else "CAUSAL_LM",
        "base_model_name_or_path": _base_name(base_model),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in own.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in own.items() if a != alpha},
        "lora_dropout": max(method.dropout for method in methods),
        "use_rslora": rs,
        "use_dora": isinstance(methods[0], DoRA),
        "target_modules": _target_names(table, set(modules)),
        "modules_to_save": _trained_names(table, plan, config) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _base_name(base_model: str | os.PathLike) -> str | None:
    name = expanded_path(base_model)
    return absolute_path(name) if name and os.path.isdir(name) else name or None


def _check_methods(plan: AdapterPlan) -> list[Any]:
    methods: list[Adapter] = [adapted.adapter for adapted in plan.sites]
    for adapted in plan.sites:
        if not isinstance(adapted.adapter, LoRA | DoRA):
            raise ExportError(
                f"{adapted.site.path}: PEFT has no {adapted.adapter.name}; use --format hf for the merged model or "
                "--format safetensors for the adapter alone"
            )
    if len({isinstance(method, DoRA) for method in methods}) > 1:
        raise ExportError("a PEFT folder holds DoRA at every site or at none; use --format hf for the merged model")
    return methods


def _rank_alpha(method: Any, rs: bool) -> tuple[int, float]:
    """Among LoRAs an rsLoRA's alpha is its scale times rank: PEFT divides all by the rank, or all by its root."""
    return method.rank, method.alpha if rs or isinstance(method, DoRA) else method.scale * method.rank


def _modules(table: list[TensorEntry], path: str) -> list[tuple[str, int | None]]:
    """(module name in torch, row of the stacked leaf) of a site."""
    kernel = (*path.split("/"), "kernel")
    found = [(entry.name.removesuffix(".weight"), entry.layer) for entry in table if entry.path == kernel]
    if not found:
        raise ExportError(f"{path}: has no module of its own in a Hugging Face checkpoint; use --format hf")
    return found


def _target_names(table: list[TensorEntry], chosen: set[str]) -> list[str]:
    """Last names where every module of that name is adapted, whole names else."""
    last = lambda name: name.rsplit(".", 1)[-1]  # noqa: E731
    every = {entry.name.removesuffix(".weight") for entry in table if entry.path[-1] == "kernel"}
    left_out = {last(name) for name in every - chosen}
    return sorted({name if last(name) in left_out else last(name) for name in chosen})


def _trained_entries(table: list[TensorEntry], path: str) -> list[TensorEntry]:
    parts = tuple(path.split("/"))
    return [entry for entry in table if entry.path[: len(parts)] == parts]


def _trained_names(table: list[TensorEntry], plan: AdapterPlan, config: ModelConfig) -> list[str]:
    tied = isinstance(config, DecoderConfig) and config.tie_word_embeddings
    if "embed_tokens" in plan.trained_modules and tied:
        raise ExportError("embed_tokens: is the output head too, which PEFT would leave as it was; use --format hf")
    entries = [entry for path in plan.trained_modules for entry in _trained_entries(table, path)]
    return sorted({entry.name.rsplit(".", 1)[0] for entry in entries})


def _entries(plan: AdapterPlan, config: ModelConfig) -> list[_Entry]:
    table = tensor_table(config)
    found = []
    for adapted in plan.sites:
        path = adapted.site.path
        names = _LEAVES if isinstance(adapted.adapter, DoRA) else {key: _LEAVES[key] for key in ("a", "b")}
        for module, layer in _modules(table, path):
            found += [_Entry(f"{_PREFIX}{module}.{v}", path, (k,), layer, k != "m") for k, v in names.items()]
    for path in plan.trained_modules:
        depth = len(path.split("/"))
        found += [
            _Entry(_PREFIX + entry.name, path, entry.path[depth:], entry.layer, entry.transpose)
            for entry in _trained_entries(table, path)
        ]
    return found
