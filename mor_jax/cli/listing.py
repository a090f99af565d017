"""`mor inspect`, `mor methods` and `mor verify`: what there is, without computing anything."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from mor_jax.cli.flags import UsageError
from mor_jax.cli.options import InspectOptions, VerifyOptions

ADAM_BYTES = 8  # two float32 moments for each trained parameter


def methods_command() -> list[dict[str, Any]]:
    """One entry for each registered method.

    Keys: `name`, `title`, `paper`, `routing` (what its gate reads, or "none"), `rule` (what it does while training
    beside the optimiser, "none", or which option switches what on), `merge` ("exact", the approximations, or the option
    that merging needs), `parameters` (option -> default). All of a method with its defaults.
    """
    from mor_jax.adapters import METHODS
    from mor_jax.merging import merge_words

    entries = []
    for name, cls in METHODS.items():
        adapter = cls()
        fields = {f.name: getattr(adapter, f.name) for f in dataclasses.fields(adapter) if f.init}
        entries.append(
            {
                "name": name,
                "title": cls.title,
                "paper": cls.paper,
                "routing": f"{adapter.gate_lifetime} input"
                if adapter.routed
                else "constant"
                if adapter.num_gates
                else "none",
                "rule": adapter.rule or (f"none; {cls.optional_rule}" if cls.optional_rule else "none"),
                "merge": merge_words([adapter]),
                "parameters": fields,
            }
        )
    return entries


def inspect_command(options: InspectOptions) -> dict[str, Any]:
    """What a method would adapt in a model, from its `config.json` or well-known name alone; no array is allocated.

    Keys: `sites` (list of path, kernel, layers, method, rank, trainable_parameters, frozen_parameters, mergeable),
    `trainable_parameters`, `frozen_parameters`, `optimizer_bytes`, `mergeable`, `exportable`.

    Raises:
      ConfigError, ModelFileError, InjectionError: a method, file or target is not usable.
    """
    import jax
    import jax.numpy as jnp

    from mor_jax.injection import resolve_sites
    from mor_jax.merging import merge_words
    from mor_jax.models import abstract_params, known_config, make_model
    from mor_jax.training.config import config_from_mapping

    named = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    given = {name: value for name, value in named.items() if value is not None}
    chosen = config_from_mapping(given, "command line")
    model = dataclasses.replace(known_config(options.model), scan_layers=options.scan_layers)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    overrides, modules = chosen.override_adapters(), chosen.trained_modules
    plan = resolve_sites(
        make_model(model),
        chosen.adapter(),
        chosen.target_modules,
        example,
        overrides=overrides,
        trained_modules=modules,
    )
    shapes = abstract_params(model)
    trainable = plan.num_params()
    replaced = sum(size for _, size in plan.trained_shapes)
    return {
        "model": str(options.model),
        "method": options.method,
        "sites": [_site(adapted) for adapted in plan.sites],
        "trainable_parameters": trainable,
        "frozen_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - replaced,
        "optimizer_bytes": ADAM_BYTES * trainable,
        "mergeable": merge_words([adapted.adapter for adapted in plan.sites]),
        "exportable": ["hf", *_peft(plan, model, shapes), "safetensors"],
    }


def _peft(plan: Any, model: Any, shapes: Any) -> list[str]:
    import jax

    from mor_jax.adapters import NotMergeable
    from mor_jax.export import ExportError, peft_config
    from mor_jax.injection import init_leaves
    from mor_jax.merging import as_lora

    written = []

    def convert(params: Any) -> None:
        written.append(as_lora(plan, init_leaves(jax.random.key(0), plan, params), params)[0])

    try:
        jax.eval_shape(convert, shapes)
        peft_config(written[0], model)
    except (ExportError, NotMergeable):
        return []
    return ["peft"]


def _site(adapted: Any) -> dict[str, Any]:
    from mor_jax.merging import merge_words

    site, adapter = adapted.site, adapted.adapter
    return {
        "path": site.path,
        "kernel": [site.in_features, site.out_features],
        "layers": site.num_layers,
        "method": adapter.name,
        "rank": getattr(adapter, "rank", None),
        "trainable_parameters": adapter.num_params(site),
        "frozen_parameters": site.num_layers * site.in_features * site.out_features,
        "mergeable": merge_words([adapter]).partition(":")[0],
    }


def verify_command(options: VerifyOptions) -> dict[str, Any]:
    """Whether every file below a folder agrees with its manifest.

    The folder is a checkpoint, an adapter or an export; a run folder is checked with everything in it that has a
    manifest. A folder called `bad` holds what was set aside already and is left out.

    Keys: `ok`, `bad` (paths relative to the folder), `checked` (folders with a manifest).

    Raises:
      UsageError: the folder does not exist.
    """
    from mor_jax.training.integrity import MANIFEST, verify_manifest

    root = Path(options.path)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give a checkpoint, an adapter or an export")
    folders = [root] if (root / MANIFEST).is_file() else _manifest_folders(root, MANIFEST)
    if not folders:
        return {"ok": False, "bad": [MANIFEST], "checked": []}
    bad = []
    for folder in folders:
        bad += [(folder / name).relative_to(root).as_posix() for name in verify_manifest(folder)]
    return {"ok": not bad, "bad": bad, "checked": [folder.relative_to(root).as_posix() for folder in folders]}


def _manifest_folders(root: Path, name: str) -> list[Path]:
    """Folders that should have a manifest: those that have one, the adapter, and every checkpoint."""
    found = {path.parent for path in root.rglob(name)}
    found |= {path for path in [root / "adapter", *(root / "checkpoints").glob("*")] if path.is_dir()}
    return sorted(path for path in found if "bad" not in path.relative_to(root).parts)
