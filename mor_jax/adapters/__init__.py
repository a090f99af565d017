"""Fine-tuning methods as pure functions over small pytrees."""

from mor_jax.adapters.adalora import AdaLoRA
from mor_jax.adapters.alora import ALoRA
from mor_jax.adapters.base import GATED_PRODUCT, Adapter, AdapterInputs, Kernel, Leaves, NotMergeable, Site, site_id
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
from mor_jax.adapters.registry import METHODS, get_method, make_adapter, method_options
from mor_jax.adapters.reslora import ResLoRA
from mor_jax.adapters.vera import VeRA

__all__ = [
    "GATED_PRODUCT",
    "ALoRA",
    "AdaLoRA",
    "Adapter",
    "AdapterInputs",
    "BeamLoRA",
    "DoRA",
    "DyLoRA",
    "HaLoRA",
    "Kernel",
    "Leaves",
    "LoRA",
    "LoRAMini",
    "MELoRA",
    "METHODS",
    "MoR",
    "MoRA",
    "NotMergeable",
    "PRILoRA",
    "ResLoRA",
    "RsLoRA",
    "Site",
    "VeRA",
    "get_method",
    "make_adapter",
    "method_options",
    "site_id",
]
