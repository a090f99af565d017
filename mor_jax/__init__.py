"""Parameter-efficient fine-tuning in JAX: Mixture of Ranks and the LoRA family for any Flax model.

Importing this package imports no jax and starts no backend; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor_jax.adapters import METHODS, AdapterInputs, DoRA, Leaves, LoRA, MoR, NotMergeable, RsLoRA, make_adapter
    from mor_jax.injection import Adapted, LinearKind, init_leaves, resolve_sites
    from mor_jax.merging import check_merge, merge
    from mor_jax.models import Decoder, DecoderConfig, load_params, read_config
    from mor_jax.training import TrainConfig, make_step, train

_ROOMS = {
    "adapters": (
        "METHODS",
        "AdapterInputs",
        "DoRA",
        "Leaves",
        "LoRA",
        "MoR",
        "NotMergeable",
        "RsLoRA",
        "make_adapter",
    ),
    "injection": ("Adapted", "LinearKind", "init_leaves", "resolve_sites"),
    "merging": ("check_merge", "merge"),
    "models": ("Decoder", "DecoderConfig", "load_params", "read_config"),
    "training": ("TrainConfig", "make_step", "train"),
}

__all__ = [
    "METHODS",
    "Adapted",
    "AdapterInputs",
    "Decoder",
    "DecoderConfig",
    "DoRA",
    "Leaves",
    "LinearKind",
    "LoRA",
    "MoR",
    "NotMergeable",
    "RsLoRA",
    "TrainConfig",
    "check_merge",
    "init_leaves",
    "load_params",
    "make_adapter",
    "make_step",
    "merge",
    "read_config",
    "resolve_sites",
    "train",
]


def __getattr__(name: str) -> Any:
    """The public name, imported from its room on first use."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"mor_jax.{room}"), name)
    raise AttributeError(f"module 'mor_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
