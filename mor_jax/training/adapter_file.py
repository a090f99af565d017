"""The trained adapter alone, as three files that need nothing of this package to be read.

adapter/adapter.safetensors   "layers/mlp/up_proj/a", …; leaves that no gradient reached under "state:"
adapter/adapter.json          methods and options by site, fingerprint of the base, shapes, checksum of constants
adapter/manifest.json         checksums, written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mor_jax.adapters import Adapter, Leaves
from mor_jax.adapters.registry import make_adapter
from mor_jax.injection import DEFAULT_KINDS, AdapterPlan, LinearKind, init_leaves, resolve_sites
from mor_jax.injection.arguments import check_leaves, check_params, check_plan
from mor_jax.models.tensor_file import save_tensors
from mor_jax.processes import barrier, gathered, is_first
from mor_jax.training.checkpoint import fingerprint
from mor_jax.training.integrity import check_manifest, write_manifest

WEIGHTS = "adapter.safetensors"
DESCRIPTION = "adapter.json"
FORMAT_VERSION = 2  # 1: what `Adapter.read_differently` tells of; everything else is read as it was
_STATE = "state:"


class AdapterFileError(ValueError):
    """An adapter folder cannot be read, or is not for this base; names file, field and remedy."""

    exit_code = 2


def save_adapter(
    directory: str | Path, plan: AdapterPlan, leaves: Leaves, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes the adapter beside `directory` and renames it into place, replacing an older one.

    Of several processes all must call this, and the first writes.

    Args:
      directory: the folder to make.
      plan: where the adapters sit and what they are.
      leaves: their arrays; dtypes are kept.
      metadata: JSON fields for `adapter.json` beside the methods: `base_fingerprint`, `tasks`, `steps` and so on.

    Returns:
      Path of the folder.

    Raises:
      InjectionError: `plan` or `leaves` is something else.
    """
    check_plan(plan)
    check_leaves(leaves)
    directory, leaves = Path(directory), gathered(leaves)
    if is_first():
        _write(directory, plan, leaves, metadata or {})
    barrier(f"{directory.name} is there")
    return directory


def _write(directory: Path, plan: AdapterPlan, leaves: Leaves, metadata: Mapping[str, Any]) -> None:
    beside = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = _tensors(leaves)
    save_tensors(tensors, beside / WEIGHTS)
    description = dict(metadata) | _describe(plan)  # metadata that was read may be that of a larger rank
    description["shapes"] = {name: list(value.shape) for name, value in tensors.items()}
    description["constants_sha256"] = constants_sha256(leaves.constants)
    (beside / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    write_manifest(beside)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    os.replace(beside, directory)
    shutil.rmtree(old, ignore_errors=True)


def load_adapter(
    directory: str | Path,
    model: nn.Module,
    params: Mapping[str, Any],
    *example: Any,
    check_base: bool = True,
    kinds: tuple[LinearKind, ...] = DEFAULT_KINDS,
    **kwargs: Any,
) -> tuple[AdapterPlan, Leaves, dict[str, Any]]:
    """The adapter in a folder, resolved against a model.

    Args:
      directory: of `save_adapter`.
      model: the base it was trained on.
      params: the base's parameters, for their fingerprint and for leaves that are rebuilt from them.
      *example: example inputs of the model, arrays or shapes.
      check_base: whether another base than the adapter's own is an error.
      kinds: the model's linear modules, as its sites were resolved with.
      **kwargs: more example inputs, by name.

    Returns:
      (plan, leaves, metadata): what was saved are NumPy's arrays, for `jax.device_put`; the metadata are the fields of
      `adapter.json`.

    Raises:
      IntegrityError: a file fails its check.
      AdapterFileError: the format is newer, or older and its numbers meant something else; the base is another, names
        or shapes do not fit, or other constants come out than those it was trained with.
      InjectionError: the model lacks one of the sites, `kinds` does not name its class, or `params` are not its own.
    """
    from safetensors.numpy import load_file

    directory = Path(directory)
    metadata = read_description(directory)
    plan = resolve_plan(metadata, model, *example, kinds=kinds, **kwargs)
    check_meaning(directory / DESCRIPTION, plan, metadata["version"])
    check_params(params, plan)
    stored = metadata.get("base_fingerprint")
    if check_base and stored is not None and stored != fingerprint(params):
        raise AdapterFileError(
            f"{directory / DESCRIPTION}: base_fingerprint is not that of this base: load its own base"
        )
    expected = jax.eval_shape(lambda key, params: init_leaves(key, plan, params), jax.random.key(0), params)
    tensors = load_file(str(directory / WEIGHTS))
    _compare(directory, {name: leaf.shape for name, leaf in _named(expected)}, {k: v.shape for k, v in tensors.items()})
    constants: Any = {}
    if jax.tree.leaves(expected.constants):
        seed = jax.random.fold_in(jax.random.key(int(metadata.get("seed", 0))), 0)
        constants = init_leaves(seed, plan, params).constants
        _check_constants(directory, metadata, constants)
    treedef = jax.tree.structure((expected.params, expected.state))
    trees = jax.tree.unflatten(treedef, [tensors[name] for name, _ in _named(expected)])
    return plan, Leaves(trees[0], trees[1], constants), metadata


def check_meaning(where: str | Path, plan: AdapterPlan, version: int) -> None:
    """Returns when leaves that were written under format `version` still mean what they were trained to mean.

    Args:
      where: the file, for the message.
      plan: whose methods know what they changed.
      version: of the adapter file, or that a checkpoint was written with.

    Raises:
      AdapterFileError: a method reads them otherwise now.
    """
    reasons = {s.site.path: s.adapter.read_differently(version, s.site) for s in plan.sites}
    path = next((path for path, reason in reasons.items() if reason), None)
    if path is not None:
        raise AdapterFileError(
            f"{where}: version={version} and this package writes {FORMAT_VERSION}: in {path} {reasons[path]} "
            f"({sum(map(bool, reasons.values()))} such sites): train it anew, or go on with the mor_jax that saved it"
        )


def constants_sha256(constants: Any) -> str:
    """SHA-256 of all constants in the order of their names, of which dtype, shape and bytes count; "" without any."""
    found = hashlib.sha256()
    pairs = jax.tree.leaves_with_path(constants)
    for path, leaf in pairs:
        value = np.ascontiguousarray(np.asarray(leaf))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.update(f"{name} {value.dtype.name} {value.shape} ".encode())
        found.update(value.tobytes())
    return found.hexdigest() if pairs else ""


def _check_constants(directory: Path, metadata: Mapping[str, Any], constants: Any) -> None:
    stored, rebuilt = metadata.get("constants_sha256"), constants_sha256(constants)
    if stored != rebuilt:
        raise AdapterFileError(
            f"{directory / DESCRIPTION}: constants_sha256={stored!r} and rebuilding the frozen factors gives "
            f"{rebuilt!r}: they would not be those it was trained with; use the versions it was saved with"
        )


def read_description(directory: str | Path) -> dict[str, Any]:
    """`adapter.json` of a folder whose files all pass their check.

    Raises:
      AdapterFileError: there is no such folder, or its format is newer than this package.
      IntegrityError: a file fails its check.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterFileError(f"{directory}: no such folder: give the adapter/ folder of a run")
    check_manifest(directory)
    metadata = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    version = metadata.get("version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise AdapterFileError(
            f"{directory / DESCRIPTION}: version={version!r} and this package reads 1 to {FORMAT_VERSION}: "
            "upgrade mor_jax"
        )
    return metadata


def resolve_plan(
    metadata: Mapping[str, Any],
    model: nn.Module,
    *example: Any,
    kinds: tuple[LinearKind, ...] = DEFAULT_KINDS,
    **kwargs: Any,
) -> AdapterPlan:
    """The plan that `adapter.json` describes, on a model whose sites have the same paths; arguments as `load_adapter`.

    Raises:
      InjectionError: the model lacks one of the sites, or `kinds` does not name its class.
    """
    sites = {f"(?:{re.escape(path)})": _adapter_of(entry) for path, entry in metadata["sites"].items()}
    first = next(iter(sites.values()))
    overrides = tuple((path, adapter) for path, adapter in sites.items() if adapter != first)
    return resolve_sites(
        model,
        first,
        tuple(sites),
        *example,
        overrides=overrides,
        trained_modules=tuple(metadata["trained_modules"]),
        fuse=bool(metadata["fuse"]),
        kinds=kinds,
        **kwargs,
    )


def _describe(plan: AdapterPlan) -> dict[str, Any]:
    sites = {}
    for adapted in plan.sites:
        options = {f.name: getattr(adapted.adapter, f.name) for f in dataclasses.fields(adapted.adapter) if f.init}
        sites[adapted.site.path] = {
            "method": adapted.adapter.name,
            "options": options,
            "in_features": adapted.site.in_features,
            "out_features": adapted.site.out_features,
            "num_layers": adapted.site.num_layers,
        }
    main = plan.sites[0].adapter.name if plan.sites else ""
    return {
        "version": FORMAT_VERSION,
        "method": main,
        "sites": sites,
        "trained_modules": list(plan.trained_modules),
        "fuse": plan.fuse,
    }


def _adapter_of(entry: Mapping[str, Any]) -> Adapter:
    return make_adapter(entry["method"], **entry["options"])


def _named(leaves: Leaves) -> list[tuple[str, Any]]:
    """(name in the file, leaf) in the order of `jax.tree.leaves((params, state))`."""
    pairs = []
    for prefix, tree in (("", leaves.params), (_STATE, leaves.state)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            pairs.append((prefix + jax.tree_util.keystr(path, simple=True, separator="/"), leaf))
    return pairs


def _tensors(leaves: Leaves) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(np.asarray(leaf)) for name, leaf in _named(leaves)}


def _compare(directory: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for problem, names in (
        ("is missing", expected.keys() - found.keys()),
        ("is extra", found.keys() - expected.keys()),
    ):
        if names:
            raise AdapterFileError(
                f"{directory / WEIGHTS}: {min(names)} {problem} ({len(names)} such): another model or method?"
            )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise AdapterFileError(f"{directory / WEIGHTS}: {name} has shape {found[name]}, the model needs {shape}")
