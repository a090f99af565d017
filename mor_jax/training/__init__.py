"""Training: one frozen configuration, a pure step, and a loop that can be killed anywhere and goes on bit for bit.

Each name is loaded when it is first used, so that reading a configuration starts no jax backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor_jax.training.build import Run, build_run
    from mor_jax.training.config import TrainConfig, load_config, save_config
    from mor_jax.training.loop import run_training, train
    from mor_jax.training.step import init_state, language_model_loss, make_step

_MODULES = {
    "build": ("Run", "build_run"),
    "config": ("TrainConfig", "load_config", "save_config"),
    "loop": ("run_training", "train"),
    "step": ("init_state", "language_model_loss", "make_step"),
}

__all__ = [
    "Run",
    "TrainConfig",
    "build_run",
    "init_state",
    "language_model_loss",
    "load_config",
    "make_step",
    "run_training",
    "save_config",
    "train",
]


def __getattr__(name: str) -> Any:
    """The public name, imported from its module on first use."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"mor_jax.training.{module}"), name)
    raise AttributeError(f"module 'mor_jax.training' has no attribute {name!r}")
