"""What is compared on real models: LoRA, LoRA of MoR's total rank, MoR at LoRA's size; alpha / rank is 2 in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {"method": "lora", "rank": 8, "alpha": 16.0},
    "LoRA of the total rank": {"method": "lora", "rank": 16, "alpha": 32.0},
    "MoR": {"method": "mor", "rank": 4, "alpha": 8.0, "num_experts": 4},
}


def slug(method: str) -> str:
    """A variant's name in file names."""
    return method.lower().replace(" ", "_")
