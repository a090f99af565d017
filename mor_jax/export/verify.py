"""Whether what was written computes what the live model computes: logits in float32, side by side.

The live model's parameters are first rounded to the dtypes of the file: that is meant, a fidelity report measures it,
and it would hide what is not meant.

Where torch is installed, transformers (and for adapters PEFT) loads the folder as anybody else would; elsewhere our own
reader loads it again, which finds what was written wrongly but not what was understood wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.adapters import Leaves
from mor_jax.export.peft import read_peft
from mor_jax.injection import Adapted, AdapterPlan
from mor_jax.models import EncoderConfig, ModelConfig, load_params, make_model, round_params, stored_dtypes
from mor_jax.training.adapter_file import load_adapter
from mor_jax.training.mesh import put

TOLERANCE = 1e-4  # of a logit: float32 rounding of two implementations that add in different orders
ROUNDINGS = 8  # of the scale of each norm, that two implementations may be apart where a model magnifies them further
LARGEST_SHARE = 1e-3  # of the largest logit, beyond which no difference is rounding
Reader = Literal["auto", "transformers", "mor_jax"]


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
      verified: whether no logit differs by more than the tolerance.
      max_logit_difference: the largest absolute difference; NaN if either side has one.
      reader: who loaded the folder: "transformers", "peft" or "mor_jax".
      tolerance: the difference that was allowed.
    """

    verified: bool
    max_logit_difference: float
    reader: str
    tolerance: float = TOLERANCE


def torch_installed(*libraries: str) -> bool:
    """Whether torch, and further libraries where named, can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", *libraries))


def probe_tokens(config: ModelConfig, rows: int = 2, length: int = 32) -> np.ndarray:
    """Token rows (rows, length) int32 over the whole vocabulary, the same ones each time."""
    first = 0
    if isinstance(config, EncoderConfig):  # the padding token would move the positions of the others
        first, length = config.position_offset, min(length, config.max_length)
    return np.random.default_rng(0).integers(first, config.vocab_size, (rows, length)).astype(np.int32)


def live_logits(
    params: dict,
    config: ModelConfig,
    tokens: np.ndarray,
    plan: AdapterPlan | None = None,
    leaves: Leaves | None = None,
) -> jax.Array:
    """Logits (B, S, V) computed in float32, of a plain model or of one with adapters, where its parameters are."""
    model: Any = make_model(dataclasses.replace(config, dtype="float32"))
    if plan is None or leaves is None:
        return _logits(model, {"params": params}, tokens)
    own = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
    return _logits(Adapted(base=model, plan=plan), {"params": params, **own}, tokens)


def _logits(model: Any, variables: Any, tokens: np.ndarray) -> jax.Array:
    with jax.default_matmul_precision("highest"):  # by default a GPU rounds to TF32 and a TPU to bfloat16
        return _apply(model, variables, jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Any, variables: Any, tokens: jax.Array) -> jax.Array:
    return model.apply(variables, tokens)


def _rounded(params: dict, config: ModelConfig) -> dict:
    """The parameters with the factor of every norm off by one float32 rounding, up or down at random."""
    draw, step = np.random.default_rng(0), np.finfo(np.float32).eps
    offset = float(getattr(config, "norm_unit_offset", False))  # Gemma's factor is 1 + scale

    def nudged(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key != "scale":
            return leaf
        scale = leaf.astype(jnp.float32)
        return scale + (scale + offset) * draw.choice((-step, step), leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(nudged, params)


def verify_export(
    directory: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    *,
    tokens: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
    reader: Reader = "auto",
) -> Verification:
    """Compares an exported Hugging Face directory with the live merged model.

    Args:
      directory: of `export_hf`.
      params: the merged parameters that were exported, in the dtypes of the file or in others that hold them.
      config: their config.
      tokens: (B, S) int token rows without padding; None takes `probe_tokens`.
      tolerance: largest absolute logit difference that is still rounding. Where the live model's logits move further
        than an eighth of it when the scale of each norm is off by one float32 rounding, `ROUNDINGS` times as far is,
        but no more than `LARGEST_SHARE` of the largest logit (SmolLM2-135M moves by 1e-4 to 2e-4, and two correct
        readers were 5e-4 apart).
      reader: "transformers", "mor_jax", or "auto": transformers where torch is installed.

    Raises:
      ModelFileError: our reader does not accept the directory.
    """
    tokens = probe_tokens(config) if tokens is None else np.asarray(tokens)
    chosen = _chosen(reader, torch_installed())
    params = round_params(params, config, stored_dtypes(directory, config))
    if chosen == "transformers":
        found = _torch_logits(_load_torch(Path(directory), config), tokens)
    else:
        places = None
        if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
            places = jax.tree.map(lambda leaf: leaf.sharding, params)
        stored = load_params(directory, config, places, dtype="stored")
        found = live_logits(stored, config, tokens)
    return _compare(found, lambda own: live_logits(own, config, tokens), (params, config), tolerance, chosen)


def verify_peft(
    directory: str | os.PathLike,
    base_dir: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    plan: AdapterPlan,
    leaves: Leaves,
    *,
    written: tuple[AdapterPlan, Leaves] | None = None,
    tokens: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
    reader: Reader = "auto",
) -> Verification:
    """Compares a PEFT adapter folder on its base with the live adapted model.

    Args:
      directory: of `export_peft`.
      base_dir: the base's Hugging Face directory.
      params: the base's parameters.
      config: its config.
      plan: of the live model.
      leaves: its adapters.
      written: of `as_lora`, what was exported in their place; None where they were exported themselves.
      tokens: as in `verify_export`.
      tolerance: as in `verify_export`.
      reader: "transformers" for PEFT on torch, "mor_jax", or "auto".
    """
    tokens = probe_tokens(config) if tokens is None else np.asarray(tokens)
    if _chosen(reader, torch_installed("peft")) == "transformers":
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property that was renamed
            model = PeftModel.from_pretrained(_load_torch(Path(base_dir), config), str(directory))
        found, name = _torch_logits(model, tokens), "peft"
    else:
        own, like = written or (plan, leaves)
        read = _placed(read_peft(directory, config, own, like), like)
        found, name = live_logits(params, config, tokens, own, read), "mor_jax"
    return _compare(
        found, lambda own: live_logits(own, config, tokens, plan, leaves), (params, config), tolerance, name
    )


def verify_adapter(
    directory: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    plan: AdapterPlan,
    leaves: Leaves,
    *,
    tokens: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compares an adapter folder of `save_adapter` with the live adapted model; arguments as in `verify_peft`.

    Raises:
      AdapterFileError, IntegrityError: the folder is not as it should be.
    """
    tokens = probe_tokens(config) if tokens is None else np.asarray(tokens)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    found_plan, found, _ = load_adapter(Path(directory), make_model(config), params, example)
    stored = live_logits(params, config, tokens, found_plan, _placed(found, leaves))
    return _compare(
        stored, lambda own: live_logits(own, config, tokens, plan, leaves), (params, config), tolerance, "mor_jax"
    )


def _placed(found: Leaves, like: Leaves) -> Leaves:
    """What was read, where the live leaves lie."""
    return jax.tree.map(lambda new, old: put(new, old.sharding) if isinstance(old, jax.Array) else new, found, like)


def _chosen(reader: Reader, torch_there: bool) -> Reader:
    if reader != "auto":
        return reader
    return "transformers" if torch_there else "mor_jax"


def _load_torch(directory: Path, config: ModelConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    if not isinstance(config, EncoderConfig):
        return AutoModelForCausalLM.from_pretrained(str(directory), **options)
    names = dict(enumerate(config.labels))  # a base without a head gets a fresh one, which an adapter replaces
    return AutoModelForSequenceClassification.from_pretrained(str(directory), id2label=names, **options)


def _torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model.eval()(torch.as_tensor(tokens.astype(np.int64))).logits.float().numpy()


def _compare(
    found: Any, live: Callable[[dict], jax.Array], model: tuple[dict, ModelConfig], tolerance: float, reader: str
) -> Verification:
    """`found`, float32 (B, S, V), against the live logits, where those lie."""
    expected = live(model[0])
    difference = float(jnp.abs(jnp.asarray(found) - expected).max())
    if np.isfinite(difference) and difference > tolerance:
        moved = float(jnp.abs(live(_rounded(*model)) - expected).max())
        most = LARGEST_SHARE * float(jnp.abs(expected).max())
        tolerance = max(tolerance, min(ROUNDINGS * moved, most)) if np.isfinite(moved) else tolerance
    same = bool(np.isfinite(difference)) and difference <= tolerance
    return Verification(same, difference, reader, tolerance)
