"""Fine-tuning methods as pure functions over small pytrees."""

from mor_jax.adapters.base import Adapter, AdapterInputs, Kernel, Leaves, NotMergeable, Site
from mor_jax.adapters.dora import DoRA
from mor_jax.adapters.lora import LoRA, RsLoRA
from mor_jax.adapters.mor import MoR
from mor_jax.adapters.registry import METHODS, get_method, make_adapter, method_options

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterInputs",
    "DoRA",
    "Kernel",
    "Leaves",
    "LoRA",
    "MoR",
    "NotMergeable",
    "RsLoRA",
    "Site",
    "get_method",
    "make_adapter",
    "method_options",
]
