"""The table of methods: name -> class. A new method is one file and one line here."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from mor_jax.adapters.adalora import AdaLoRA
from mor_jax.adapters.alora import ALoRA
from mor_jax.adapters.base import Adapter
from mor_jax.adapters.beamlora import BeamLoRA
from mor_jax.adapters.dora import DoRA
from mor_jax.adapters.dylora import DyLoRA
from mor_jax.adapters.halora import HaLoRA
from mor_jax.adapters.lora import LoRA, RsLoRA
from mor_jax.adapters.lora_mini import LoRAMini
from mor_jax.adapters.melora import MELoRA
from mor_jax.adapters.mor import MoR
from mor_jax.adapters.mora import MoRA
from mor_jax.adapters.prilora import PRILoRA
from mor_jax.adapters.reslora import ResLoRA
from mor_jax.adapters.vera import VeRA

METHODS: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "mor": MoR,
    "vera": VeRA,
    "lora_mini": LoRAMini,
    "melora": MELoRA,
    "mora": MoRA,
    "halora": HaLoRA,
    "reslora": ResLoRA,
    "dylora": DyLoRA,
    "prilora": PRILoRA,
    "adalora": AdaLoRA,
    "alora": ALoRA,
    "beamlora": BeamLoRA,
}


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def get_method(name: str) -> type[Adapter]:
    """The class of a method.

    Raises:
        ValueError: if no method has this name; lists the known names and the nearest.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}{_nearest(name, list(METHODS))}")
    return METHODS[name]


def method_options(name: str) -> tuple[str, ...]:
    """The names of a method's hyper-parameters."""
    return tuple(f.name for f in dataclasses.fields(get_method(name)))


def make_adapter(name: str, **options: Any) -> Adapter:
    """A method with its hyper-parameters.

    Raises:
        ValueError: for an unknown name or option, or a value out of range.
    """
    known = list(method_options(name))
    for option in options:
        if option not in known:
            near = _nearest(option, known)
            raise ValueError(f"method {name!r} has no option {option!r}; it has {', '.join(known)}{near}")
    return get_method(name)(**options)
