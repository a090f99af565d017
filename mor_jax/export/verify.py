"""Whether what was written computes what the live model computes: logits in float32, side by side.

Where torch is installed, transformers (and for adapters PEFT) loads the folder as anybody else would; elsewhere our own
reader loads it again, which finds what was written wrongly but not what was understood wrongly.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.adapters import Leaves
from mor_jax.export.peft import read_peft
from mor_jax.injection import Adapted, AdapterPlan
from mor_jax.models import EncoderConfig, ModelConfig, load_params, make_model
from mor_jax.training.adapter_file import load_adapter

TOLERANCE = 1e-4  # of a logit: float32 rounding of two implementations that add in different orders
RELATIVE_TOLERANCE = 1e-5  # of the largest logit: 84 float32 roundings; more than TOLERANCE where logits exceed 10
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
    model = make_model(dataclasses.replace(config, dtype="float32"))
    if plan is None or leaves is None:
        return jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))  # pyright: ignore[reportReturnType]
    own = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
    logits: Any = jax.jit(Adapted(base=model, plan=plan).apply)({"params": params, **own}, jnp.asarray(tokens))
    return logits


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
      params: the merged parameters that were exported.
      config: their config.
      tokens: (B, S) int token rows without padding; None takes `probe_tokens`.
      tolerance: largest absolute logit difference that is still rounding; 1e-5 of the largest logit is allowed always,
        since float32 can promise no more (SmolLM2-135M, logits to 33: 1.3e-4 between two correct readers).
      reader: "transformers", "mor_jax", or "auto": transformers where torch is installed.

    Raises:
      ModelFileError: our reader does not accept the directory.
    """
    tokens = probe_tokens(config) if tokens is None else np.asarray(tokens)
    chosen = _chosen(reader, torch_installed())
    if chosen == "transformers":
        found = _torch_logits(_load_torch(Path(directory), config), tokens)
    else:
        places = jax.tree.map(lambda leaf: leaf.sharding, params)
        stored = load_params(directory, config, places, dtype=jax.tree.leaves(params)[0].dtype)
        found = live_logits(stored, config, tokens)
    return _compare(found, live_logits(params, config, tokens), tolerance, chosen)


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
        found, name = live_logits(params, config, tokens, own, read_peft(directory, config, own, like)), "mor_jax"
    return _compare(found, live_logits(params, config, tokens, plan, leaves), tolerance, name)


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
    stored = live_logits(params, config, tokens, found_plan, found)
    return _compare(stored, live_logits(params, config, tokens, plan, leaves), tolerance, "mor_jax")


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


def _compare(found: Any, expected: jax.Array, tolerance: float, reader: str) -> Verification:
    """Both float32 (B, S, V); the differences are taken where `expected` lies."""
    difference = float(jnp.abs(jnp.asarray(found) - expected).max())
    allowed = max(tolerance, RELATIVE_TOLERANCE * float(jnp.abs(expected).max()))
    same = bool(np.isfinite(difference)) and difference <= allowed
    return Verification(same, difference, reader, allowed)
